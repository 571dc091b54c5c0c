//! Assignments of tokens to experts, in the order of the experts; CUDA source: `permute.cu`.

mod host;

use std::ops::Range;

use bcg_runtime::{DType, DevicePtr, Dims, HostMemory, Kernel, KernelArgs, OpStream, Result, Source, Tensor};

use crate::check::Check;
use host::host;

static SOURCE: Source = source!("moe/permute/permute.cu").takes::<MoePermuteArgs>().define("THREADS", THREADS as usize);
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("moe_permute");

/// The most `(token, k)` pairs of a plan: on their way through shared memory they are half-words.
const PAIRS_MAX: usize = 1 << 16;
/// The most experts.
pub(super) const EXPERTS_MAX: usize = 512;
/// Threads of the block.
const THREADS: u32 = 1024;
/// Shared memory of the block where rows are gathered ahead of writing them: a block of sm_80, sm_90 and sm_100 can have it.
const STAGED_BYTES_MAX: usize = 160 << 10;

/// Where the rows of each expert lie once the chosen `(token, k)` pairs are ordered by expert.
///
/// A place is an index in that order; pairs of one expert keep the order of `t K + k`. Padded rows have no place, and where
/// the plan is of some experts only, the pairs of the others have none.
#[derive(Clone, Debug)]
pub struct ExpertPlan {
    /// `[E + 1]` i32 of E experts of the plan: number e of them has the places `offsets[e]..offsets[e + 1]`; the last one is
    /// the number of places in use.
    pub offsets: Tensor,
    /// `[T K]` i32: place to `t K + k`; -1 after the last place in use.
    pub rows: Tensor,
    /// `[T, K]` i32: the place of each pair; -1 where it has none.
    pub places: Tensor,
    /// How many experts the tokens chose among: those of the plan, and any others. An expert has `T K / chosen_among` rows
    /// on average, which products choose their kernel by.
    pub chosen_among: usize,
}

impl ExpertPlan {
    /// A plan of `[T, K]` choices that is yet to be written.
    pub(super) fn empty(
        cx: &mut OpStream,
        check: Check,
        shape: &[usize],
        num_experts: usize,
        own: &Range<usize>,
    ) -> Result<Self> {
        let pairs = shape[0] * shape[1];
        if pairs > PAIRS_MAX {
            return Err(check.error(format!("at most {PAIRS_MAX} pairs of a token and an expert"), pairs));
        }
        if !(1..=EXPERTS_MAX).contains(&num_experts) {
            return Err(check.error(format!("1 to {EXPERTS_MAX} experts"), num_experts));
        }
        if own.is_empty() || own.end > num_experts {
            return Err(check.error(format!("a range of the {num_experts} experts"), format!("{own:?}")));
        }
        Ok(Self {
            offsets: cx.empty(&[own.len() + 1], DType::I32)?,
            rows: cx.empty(&[pairs], DType::I32)?,
            places: cx.empty(shape, DType::I32)?,
            chosen_among: num_experts,
        })
    }

    /// Refuses a plan whose tensors do not fit together, or that is not of `num_experts`.
    pub(crate) fn check(&self, check: Check, num_experts: usize) -> Result<()> {
        check.rank("places", &self.places, &["T", "K"])?;
        check.dense("places", &self.places, self.places.shape(), DType::I32)?;
        check.dense("rows", &self.rows, &[self.places.num_elements()], DType::I32)?;
        check.dense("offsets", &self.offsets, &[num_experts + 1], DType::I32)
    }
}

/// A plan that a kernel writes.
#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
pub(super) struct PlanOut {
    /// `[num_experts + 1]`.
    #[points_to(i32)]
    offsets: DevicePtr,
    /// `[pairs]`.
    #[points_to(i32)]
    rows: DevicePtr,
    /// `[pairs]`.
    #[points_to(i32)]
    places: DevicePtr,
    /// The first expert of the plan, and how many there are: pairs of others have no place.
    first_expert: u32,
    num_experts: u32,
}

impl PlanOut {
    pub(super) const NULL: Self = Self {
        offsets: DevicePtr::NULL,
        rows: DevicePtr::NULL,
        places: DevicePtr::NULL,
        first_expert: 0,
        num_experts: 0,
    };

    pub(super) fn new(cx: &mut OpStream, plan: &ExpertPlan, own: &Range<usize>) -> Result<Self> {
        Ok(Self {
            offsets: cx.addr(&plan.offsets)?,
            rows: cx.addr(&plan.rows)?,
            places: cx.addr(&plan.places)?,
            first_expert: own.start as u32,
            num_experts: own.len() as u32,
        })
    }

    /// Writes the plan of `experts`, which the host reference of each kernel does.
    pub(super) fn write(&self, memory: &HostMemory<'_>, experts: &[i32]) -> Result<()> {
        let mut rows = Vec::with_capacity(experts.len());
        let mut places = vec![-1; experts.len()];
        let mut offsets = vec![0];
        for expert in self.first_expert as i32..(self.first_expert + self.num_experts) as i32 {
            for (pair, _) in experts.iter().enumerate().filter(|(_, chosen)| **chosen == expert) {
                places[pair] = rows.len() as i32;
                rows.push(pair as i32);
            }
            offsets.push(rows.len() as i32);
        }
        rows.resize(experts.len(), -1);
        memory.store(self.offsets, &offsets)?;
        memory.store(self.rows, &rows)?;
        memory.store(self.places, &places)
    }
}

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct MoePermuteArgs {
    #[points_to(const i32)]
    experts: DevicePtr,
    plan: PlanOut,
    pairs: u32,
    is_staged: u32,
}

// SAFETY: `moe_permute` has checked the shapes when it launches, and the source indexes by these alone.
static MOE_PERMUTE: Kernel<MoePermuteArgs> = unsafe { Kernel::new("moe_permute", &SOURCE, host) }.programmatic();

/// Orders the chosen `(token, k)` pairs by expert.
///
/// The order is stable: pairs of one expert keep the order of `t K + k`. The plan is of the experts `own` of `num_experts`:
/// a pair of another one, or of none as in padded rows, has no place.
///
/// # Shapes
/// - `experts`: `[T, K]` i32, contiguous, at most 65,536 elements.   - The plan as [`ExpertPlan`] says.
///
/// # Capture
/// Enqueues one kernel of one block. Frozen: shapes and addresses. Read again at each replay: `experts`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs, for more pairs, or more than 512 experts; those of
/// enqueuing.
///
/// # Example
/// ```
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let experts = device.tensor(&[3, 2], &[2, 0, 0, 1, -1, -1])?; // the last row is padded
/// let plan = runner.eager(&(), |cx| bcg_kernels::moe_permute(cx, &experts, 3, 0..3))?;
/// assert_eq!(runner.read::<i32>(&plan.offsets)?, [0, 2, 3, 4]);
/// assert_eq!(runner.read::<i32>(&plan.rows)?, [1, 2, 3, 0, -1, -1]);
/// assert_eq!(runner.read::<i32>(&plan.places)?, [3, 0, 1, 2, -1, -1]);
/// let plan = runner.eager(&(), |cx| bcg_kernels::moe_permute(cx, &experts, 3, 1..3))?; // without expert 0
/// assert_eq!(runner.read::<i32>(&plan.offsets)?, [0, 1, 2]);
/// assert_eq!(runner.read::<i32>(&plan.rows)?, [3, 0, -1, -1, -1, -1]);
/// assert_eq!(runner.read::<i32>(&plan.places)?, [1, -1, -1, 0, -1, -1]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn moe_permute(cx: &mut OpStream, experts: &Tensor, num_experts: usize, own: Range<usize>) -> Result<ExpertPlan> {
    CHECK.rank("experts", experts, &["T", "K"])?;
    CHECK.dense("experts", experts, experts.shape(), DType::I32)?;
    let plan = ExpertPlan::empty(cx, CHECK, experts.shape(), num_experts, &own)?;
    let counts_bytes = counts_bytes(THREADS, own.len());
    let staged_bytes = counts_bytes + experts.num_elements() * size_of::<u16>();
    let is_staged = staged_bytes <= STAGED_BYTES_MAX;
    let args = MoePermuteArgs {
        experts: cx.addr(experts)?,
        plan: PlanOut::new(cx, &plan, &own)?,
        pairs: experts.num_elements() as u32,
        is_staged: is_staged.into(),
    };
    let shared_bytes = CHECK.u32("shared memory", if is_staged { staged_bytes } else { counts_bytes })?;
    cx.launch(&MOE_PERMUTE, Dims { shared_bytes, ..Dims::linear(1, THREADS) }, args)?;
    Ok(plan)
}

/// Shared memory in which each warp of a block counts its pairs of each expert.
pub(super) const fn counts_bytes(threads: u32, num_experts: usize) -> usize {
    threads as usize / 32 * num_experts * size_of::<u32>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::Device;

    #[test]
    fn what_a_block_cannot_order_is_refused() -> Result<()> {
        let device = Device::host();
        let (many, few) = (device.zeros(&[8193, 8], DType::I32)?, device.zeros(&[2, 2], DType::I32)?);
        let floats = device.zeros(&[2, 2], DType::F32)?;
        let says = |experts: &Tensor, num, own| refusal(&device, |cx| moe_permute(cx, experts, num, own));
        assert!(says(&many, 8, 0..8).contains("at most 65536 pairs"));
        assert!(says(&few, 513, 0..1).contains("1 to 512 experts, got 513"));
        assert!(says(&few, 0, 0..0).contains("1 to 512 experts, got 0"));
        assert!(says(&few, 8, 4..9).contains("a range of the 8 experts, got 4..9"));
        assert!(says(&few, 8, 4..4).contains("a range of the 8 experts, got 4..4"));
        assert!(says(&floats, 8, 0..8).contains("`experts` i32, got f32"));
        Ok(())
    }
}
