//! The choice of experts; CUDA source: `route.cu`.

mod host;

use std::ops::Range;

use bcg_runtime::{DType, DevicePtr, Dims, Kernel, KernelArgs, OpStream, Result, Source, Tensor};

use super::permute::{ExpertPlan, PlanOut, counts_bytes, moe_permute};
use crate::check::Check;
use host::{host, host_fused};

static SOURCE: Source = source!("moe/route/route.cu")
    .takes::<MoeRouteArgs>()
    .define("WARPS", WARPS as usize)
    .define("WARPS_MAX", WARPS_MAX);
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("moe_route");

/// The most experts of a token: a lane of a warp has each.
const CHOSEN_MAX: usize = 32;
/// The most groups, for the same reason.
const GROUPS_MAX: usize = 32;
/// The most `(token, k)` pairs that one block chooses and orders.
const FUSED_PAIRS_MAX: usize = 1024;
/// Warps of a block where routing is a kernel of its own, and of the largest block.
const WARPS: u32 = 4;
const WARPS_MAX: usize = 32;

/// What experts are chosen by, and what they are weighted with.
#[derive(Clone, Debug)]
pub enum Scores {
    /// The softmax over all experts; experts are chosen by their logits, which order alike.
    Softmax,
    /// The sigmoid of each logit; experts are chosen by it plus `bias`, `[E]` f32, and weighted without.
    Sigmoid {
        /// The checkpoint's `e_score_correction_bias`.
        bias: Tensor,
    },
}

/// How a router chooses.
#[derive(Clone, Debug)]
pub struct Scoring {
    /// The scores.
    pub scores: Scores,
    /// K: experts of a token.
    pub chosen: usize,
    /// Groups of neighbouring experts, of equal size. A group's score is its best one; with sigmoid scores it is the sum of
    /// its two best, biases included.
    pub groups: usize,
    /// How many of the best groups experts are chosen from.
    pub kept_groups: usize,
    /// Whether the weights of a token are divided by their sum (plus 1e-20 with sigmoid scores).
    pub is_renormalised: bool,
    /// Multiplies the weights, last.
    pub scale: f32,
}

/// The experts of each token.
#[derive(Clone, Debug)]
pub struct Choices {
    /// `[T, K]` i32, the best first; -1 in padded rows.
    pub experts: Tensor,
    /// `[T, K]` f32; 0 in padded rows.
    pub weights: Tensor,
}

/// The experts of each token, and the tokens of each expert.
#[derive(Clone, Debug)]
pub struct Routing {
    /// The experts of each token.
    pub choices: Choices,
    /// The choices in the order of the experts, of those experts that were asked for.
    pub plan: ExpertPlan,
    /// `[1]` i32: rows from there on are padded.
    pub num_valid: Tensor,
}

impl Choices {
    fn empty(cx: &mut OpStream, shape: &[usize]) -> Result<Self> {
        Ok(Self { experts: cx.empty(shape, DType::I32)?, weights: cx.empty(shape, DType::F32)? })
    }

    /// Refuses choices that are not those of so many tokens.
    pub(crate) fn check(&self, check: Check, tokens: usize) -> Result<()> {
        check.rank("experts", &self.experts, &["T", "K"])?;
        let shape = [tokens, self.experts.dim(1)];
        check.dense("experts", &self.experts, &shape, DType::I32)?;
        check.dense("weights", &self.weights, &shape, DType::F32)
    }
}

impl Routing {
    /// Refuses a routing whose tensors do not fit together, and what experts made of other rows than those of the plan.
    pub(crate) fn check(&self, check: Check, y: &Tensor) -> Result<()> {
        let places = &self.plan.places;
        check.rank("y", y, &["T K", "C"])?;
        check.rank("places", places, &["T", "K"])?;
        check.dense("places", places, places.shape(), DType::I32)?;
        check.dense("weights", &self.choices.weights, places.shape(), DType::F32)?;
        check.dense("num_valid", &self.num_valid, &[1], DType::I32)?;
        check.dense("y", y, &[places.num_elements(), y.dim(1)], y.dtype())
    }
}

/// How many experts each rank owns.
pub(crate) fn experts_of_rank(check: Check, num_experts: usize, num_ranks: usize) -> Result<usize> {
    if num_experts == 0 || !num_experts.is_multiple_of(num_ranks) {
        return Err(check.error(format!("experts that {num_ranks} ranks divide"), num_experts));
    }
    Ok(num_experts / num_ranks)
}

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct MoeRouteArgs {
    #[points_to(const f32)]
    logits: DevicePtr,
    /// Of sigmoid scores; null for softmax.
    #[points_to(const f32)]
    bias: DevicePtr,
    #[points_to(const i32)]
    num_valid: DevicePtr,
    #[points_to(i32)]
    experts: DevicePtr,
    #[points_to(f32)]
    weights: DevicePtr,
    plan: PlanOut,
    logits_stride: i64,
    tokens: u32,
    num_experts: u32,
    chosen: u32,
    groups: u32,
    kept_groups: u32,
    is_renormalised: u32,
    scale: f32,
    /// Where the rows stand among those that `num_valid` counts.
    first_row: u32,
}

// SAFETY: `moe_route` has checked the shapes when it launches, and the source indexes by these alone.
static MOE_ROUTE: Kernel<MoeRouteArgs> =
    unsafe { Kernel::new("moe_route", &SOURCE, |a, _, memory| host(a, memory).map(|_| ())) }.programmatic();
// SAFETY: as above.
static MOE_ROUTE_AND_PERMUTE: Kernel<MoeRouteArgs> =
    unsafe { Kernel::new("moe_route_and_permute", &SOURCE, host_fused) }.programmatic();

/// Chooses K experts for each token and orders the choices by expert.
///
/// Scores, groups and weights are as [`Scoring`] says; among equals the lower index is first. NaN is chosen last. Rows
/// from `num_valid` on are padded: they are not read, and have no experts. The plan is of the experts `own`, 0..E for all:
/// choices of others stand in `experts` and `weights`, and have no place.
///
/// # Shapes
/// - `logits`: `[T, E]` f32, may be row-sliced; at most 512 experts, 65,536 choices.   - `num_valid`: `[1]` i32.
/// - The rest as [`Scoring`] and [`Routing`] say; at most 32 groups, and 32 experts of a token.
///
/// # Capture
/// Enqueues one kernel of one block up to 1024 choices, or else two. Frozen: shapes, addresses, the numbers of `scoring`.
/// Read again at each replay: `logits`, `num_valid`, the bias.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs, or if the groups cannot be made; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_kernels::{Scores, Scoring};
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let logits = device.tensor(&[2, 3], &[0.0f32, 2f32.ln(), 6f32.ln(), f32::NAN, f32::NAN, f32::NAN])?;
/// let num_valid = device.tensor(&[1], &[1])?;
/// let scoring =
///     Scoring { scores: Scores::Softmax, chosen: 2, groups: 1, kept_groups: 1, is_renormalised: true, scale: 1.0 };
/// let routing = runner.eager(&(), |cx| bcg_kernels::moe_route(cx, &logits, &scoring, &num_valid, 0..3))?;
/// assert_eq!(runner.read::<i32>(&routing.choices.experts)?, [2, 1, -1, -1]);
/// let weights = runner.read::<f32>(&routing.choices.weights)?;
/// assert!((weights[0] - 0.75).abs() < 1e-6 && (weights[1] - 0.25).abs() < 1e-6);
/// assert_eq!(runner.read::<i32>(&routing.plan.offsets)?, [0, 0, 1, 2]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn moe_route(
    cx: &mut OpStream,
    logits: &Tensor,
    scoring: &Scoring,
    num_valid: &Tensor,
    own: Range<usize>,
) -> Result<Routing> {
    let (choices, mut args) = route_args(cx, logits, scoring, num_valid, 0)?;
    let (shape, num_experts) = (choices.experts.shape(), logits.dim(1));
    let plan = if choices.experts.num_elements() <= FUSED_PAIRS_MAX {
        let plan = ExpertPlan::empty(cx, CHECK, shape, num_experts, &own)?;
        args.plan = PlanOut::new(cx, &plan, &own)?;
        let dims = fused_dims(shape[0], own.len(), choices.experts.num_elements());
        cx.launch(&MOE_ROUTE_AND_PERMUTE, dims, args)?;
        plan
    } else {
        cx.launch(&MOE_ROUTE, dims(args.tokens), args)?;
        moe_permute(cx, &choices.experts, num_experts, own)?
    };
    Ok(Routing { choices, plan, num_valid: num_valid.clone() })
}

/// Chooses K experts for each token, as [`moe_route`] does, and orders nothing.
///
/// The tokens are some of those that `num_valid` counts: row `t` is padded if `first_row + t` is not below it.
///
/// # Shapes
/// As [`moe_route`].
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes, addresses, `first_row`, the numbers of `scoring`. Read again at each replay:
/// `logits`, `num_valid`, the bias.
///
/// # Errors
/// As [`moe_route`].
pub fn moe_choose(
    cx: &mut OpStream,
    logits: &Tensor,
    scoring: &Scoring,
    num_valid: &Tensor,
    first_row: usize,
) -> Result<Choices> {
    let (choices, args) = route_args(cx, logits, scoring, num_valid, first_row)?;
    cx.launch(&MOE_ROUTE, dims(args.tokens), args)?;
    Ok(choices)
}

/// The choices to be made, and what makes them, without a plan.
fn route_args(
    cx: &mut OpStream,
    logits: &Tensor,
    scoring: &Scoring,
    num_valid: &Tensor,
    first_row: usize,
) -> Result<(Choices, MoeRouteArgs)> {
    CHECK.rank("logits", logits, &["T", "E"])?;
    CHECK.dtype("logits", logits, DType::F32)?;
    CHECK.dense("num_valid", num_valid, &[1], DType::I32)?;
    let (tokens, num_experts) = (logits.dim(0), logits.dim(1));
    let bias = scoring.check(cx, num_experts)?;
    let choices = Choices::empty(cx, &[tokens, scoring.chosen])?;
    let args = MoeRouteArgs {
        logits: cx.addr(logits)?,
        bias,
        num_valid: cx.addr(num_valid)?,
        experts: cx.addr(&choices.experts)?,
        weights: cx.addr(&choices.weights)?,
        plan: PlanOut::NULL,
        logits_stride: logits.row_stride() as i64,
        tokens: CHECK.u32("T", tokens)?,
        num_experts: CHECK.u32("E", num_experts)?,
        chosen: scoring.chosen as u32,
        groups: scoring.groups as u32,
        kept_groups: scoring.kept_groups as u32,
        is_renormalised: scoring.is_renormalised.into(),
        scale: scoring.scale,
        first_row: CHECK.u32("the first row", first_row)?,
    };
    Ok((choices, args))
}

/// A warp for each row.
fn dims(tokens: u32) -> Dims {
    Dims::linear(tokens.div_ceil(WARPS), 32 * WARPS)
}

impl Scoring {
    /// Refuses what the kernels cannot choose; returns the bias.
    fn check(&self, cx: &mut OpStream, num_experts: usize) -> Result<DevicePtr> {
        let is_sigmoid = matches!(self.scores, Scores::Sigmoid { .. });
        let least = if is_sigmoid && self.groups > 1 { 2 } else { 1 };
        let size = num_experts / self.groups.max(1);
        if !(1..=GROUPS_MAX).contains(&self.groups) || !num_experts.is_multiple_of(self.groups) || size < least {
            let expected = format!("1 to {GROUPS_MAX} groups of equal size, of at least {least} experts");
            return Err(CHECK.error(expected, format!("{} groups of {num_experts}", self.groups)));
        }
        if !(1..=self.groups).contains(&self.kept_groups) {
            return Err(CHECK.error(format!("1 to {} groups to choose from", self.groups), self.kept_groups));
        }
        let most = CHOSEN_MAX.min(self.kept_groups * size);
        if !(1..=most).contains(&self.chosen) {
            return Err(CHECK.error(format!("1 to {most} experts of a token"), self.chosen));
        }
        match &self.scores {
            Scores::Softmax => Ok(DevicePtr::NULL),
            Scores::Sigmoid { bias } => {
                CHECK.dense("bias", bias, &[num_experts], DType::F32)?;
                cx.addr(bias)
            }
        }
    }
}

/// One block: a warp for each row, as far as a block has them, and a thread for each expert of the plan.
fn fused_dims(tokens: usize, num_experts: usize, pairs: usize) -> Dims {
    let warps = tokens.max(num_experts.div_ceil(32)).clamp(1, WARPS_MAX) as u32;
    let shared_bytes = counts_bytes(32 * warps, num_experts) + pairs * size_of::<i32>();
    Dims { shared_bytes: shared_bytes as u32, ..Dims::linear(1, 32 * warps) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::Device;

    #[test]
    fn what_cannot_be_chosen_is_refused() -> Result<()> {
        let device = Device::host();
        let (logits, num_valid) = (device.zeros(&[2, 12], DType::F32)?, device.zeros(&[1], DType::I32)?);
        let softmax = Scoring {
            scores: Scores::Softmax,
            chosen: 2,
            groups: 3,
            kept_groups: 1,
            is_renormalised: true,
            scale: 1.0,
        };
        let says = |scoring: &Scoring| refusal(&device, |cx| moe_route(cx, &logits, scoring, &num_valid, 0..12));
        assert!(says(&Scoring { groups: 5, ..softmax.clone() }).contains("groups of equal size"));
        assert!(says(&Scoring { groups: 0, ..softmax.clone() }).contains("got 0 groups of 12"));
        assert!(says(&Scoring { kept_groups: 4, ..softmax.clone() }).contains("1 to 3 groups to choose from, got 4"));
        assert!(says(&Scoring { chosen: 5, ..softmax.clone() }).contains("1 to 4 experts of a token, got 5"));
        let sigmoid = Scoring { scores: Scores::Sigmoid { bias: device.zeros(&[11], DType::F32)? }, ..softmax };
        assert!(says(&sigmoid).contains("`bias` [12], got [11]"));
        assert!(says(&Scoring { groups: 12, ..sigmoid }).contains("of at least 2 experts"));
        Ok(())
    }

    #[test]
    fn a_fused_block_has_a_thread_for_each_expert() {
        for (tokens, num_experts) in [(0, 1), (1, 8), (1, 128), (16, 512), (300, 60)] {
            let dims = fused_dims(tokens, num_experts, 0);
            assert!(dims.block[0] as usize >= num_experts && dims.block[0] <= 1024 && dims.block[0].is_multiple_of(32));
        }
    }
}
