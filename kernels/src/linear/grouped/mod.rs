//! Products of rows with the matrix of the expert that each belongs to; CUDA source: `portable.cu`.
//!
//! For bf16, [`few_rows`] and [`hopper`] serve instead where they can.
//!
//! The grid follows the shapes alone; blocks find their work in the plan's `offsets`, on the device.

mod args;
mod few_rows;
mod hopper;
mod host;

use bcg_runtime::{DType, Dims, OpStream, Result, Source, Tensor};

use crate::check::Check;
use crate::float::{PerFloat, per_float};
use crate::moe::ExpertPlan;
use args::GroupedArgs;
use host::{host_gate_up, host_linear};

static PORTABLE_SOURCE: Source =
    source!("linear/grouped/portable.cu").takes::<GroupedArgs>().define("THREADS", THREADS as usize);
pub(super) const SOURCES: &[&Source] = &[&few_rows::SOURCE, &hopper::SOURCE, &PORTABLE_SOURCE];

// SAFETY: `grouped_gate_up` and `grouped_linear` have checked the shapes when `launch` runs, and the source indexes by
// these alone.
static GATE_UP: PerFloat<GroupedArgs> = per_float!("grouped_gate_up", PORTABLE_SOURCE, host_gate_up).programmatic();
// SAFETY: as above.
static LINEAR: PerFloat<GroupedArgs> = per_float!("grouped_linear", PORTABLE_SOURCE, host_linear).programmatic();

/// Threads of a block of the portable kernels.
const THREADS: u32 = 256;
/// Blocks of the portable kernels on each multiprocessor.
const BLOCKS_PER_MULTIPROCESSOR: u32 = 2;

/// Multiplies the row of each place with its expert's gate and up matrices, and applies the gated activation.
///
/// For each place p in use, of expert e: `out[p, i] = round(silu(g)) * u` with `g = round(x[t] . weight[e, i])`,
/// `u = round(x[t] . weight[e, I + i])` and `t = plan.rows[p] / K`; summed in f32, rounded as
/// [`silu_mul()`](crate::silu_mul()) of a product rounds. Rows after the last place in use stay as they are.
///
/// # Shapes
/// - `x`: `[T, C]`, bf16, f16 or f32; may be row-sliced.   - `weight`: `[E, 2 I, C]`, same dtype, contiguous.
/// - `plan`: of `[T, K]` choices, of E experts.   - `out`: `[T K, I]`.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes and addresses. Read again at each replay: all contents, the plan's too.
///
/// # Determinism
/// A row's bits depend on that row and on the expert's matrix alone; on CUDA in bf16, also on whether there are more than
/// 16 tokens. A weight with memory of its own may be read there before earlier work has run, so no kernel may write it.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_kernels::ExpertPlan;
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// // Token 0 goes to expert 1, token 1 to expert 0.
/// let plan = ExpertPlan {
///     offsets: device.tensor(&[3], &[0, 1, 2])?,
///     rows: device.tensor(&[2], &[1, 0])?,
///     places: device.tensor(&[2, 1], &[1, 0])?,
///     chosen_among: 2,
/// };
/// let x = device.tensor(&[2, 1], &[100.0f32, 200.0])?;
/// let weight = device.tensor(&[2, 2, 1], &[1.0f32, 3.0, 1.0, 5.0])?;
/// let out = runner.eager(&(), |cx| bcg_kernels::grouped_gate_up(cx, &x, &weight, &plan))?;
/// assert_eq!(runner.read::<f32>(&out)?, [200.0 * 600.0, 100.0 * 500.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn grouped_gate_up(cx: &mut OpStream, x: &Tensor, weight: &Tensor, plan: &ExpertPlan) -> Result<Tensor> {
    const CHECK: Check = Check::new("grouped_gate_up");
    CHECK.rank("x", x, &["T", "C"])?;
    CHECK.rank("weight", weight, &["E", "2 I", "C"])?;
    if !weight.dim(1).is_multiple_of(2) {
        return Err(CHECK.error("`weight` [E, 2 I, C]", format!("{:?}", weight.shape())));
    }
    plan.check(CHECK, weight.dim(0))?;
    CHECK.shape("x", x, &[plan.places.dim(0), weight.dim(2)])?;
    let out = cx.empty(&[plan.rows.dim(0), weight.dim(1) / 2], x.dtype())?;
    let args = grouped_args(cx, CHECK, x, weight, plan, &out)?;
    launch(cx, CHECK, x.dtype(), true, args, plan.chosen_among)?;
    Ok(out)
}

/// Multiplies each row with the matrix of the expert that the row's place belongs to.
///
/// For each place p in use, of expert e: `out[p, n] = x[p] . weight[e, n]`, summed in f32 and rounded once. Rows after
/// the last place in use are not read, and stay as they are.
///
/// # Shapes
/// - `x`: `[T K, I]`, bf16, f16 or f32; may be row-sliced.   - `weight`: `[E, N, I]`, same dtype, contiguous.
/// - `plan`: of `[T, K]` choices, of E experts.   - `out`: `[T K, N]`.
///
/// # Capture
/// As [`grouped_gate_up()`].
///
/// # Determinism
/// As [`grouped_gate_up()`].
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_kernels::ExpertPlan;
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let plan = ExpertPlan {
///     offsets: device.tensor(&[3], &[0, 1, 2])?, // a row for each of two experts
///     rows: device.tensor(&[2], &[1, 0])?,
///     places: device.tensor(&[2, 1], &[1, 0])?,
///     chosen_among: 2,
/// };
/// let x = device.tensor(&[2, 1], &[10.0f32, 20.0])?;
/// let weight = device.tensor(&[2, 1, 1], &[1.0f32, 3.0])?;
/// let out = runner.eager(&(), |cx| bcg_kernels::grouped_linear(cx, &x, &weight, &plan))?;
/// assert_eq!(runner.read::<f32>(&out)?, [10.0, 60.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn grouped_linear(cx: &mut OpStream, x: &Tensor, weight: &Tensor, plan: &ExpertPlan) -> Result<Tensor> {
    const CHECK: Check = Check::new("grouped_linear");
    CHECK.rank("x", x, &["T K", "I"])?;
    CHECK.rank("weight", weight, &["E", "N", "I"])?;
    plan.check(CHECK, weight.dim(0))?;
    CHECK.shape("x", x, &[plan.rows.dim(0), weight.dim(2)])?;
    let out = cx.empty(&[plan.rows.dim(0), weight.dim(1)], x.dtype())?;
    let args = grouped_args(cx, CHECK, x, weight, plan, &out)?;
    launch(cx, CHECK, x.dtype(), false, args, plan.chosen_among)?;
    Ok(out)
}

fn grouped_args(
    cx: &mut OpStream,
    check: Check,
    x: &Tensor,
    weight: &Tensor,
    plan: &ExpertPlan,
    out: &Tensor,
) -> Result<GroupedArgs> {
    check.dense("weight", weight, weight.shape(), x.dtype())?;
    Ok(GroupedArgs {
        x: cx.addr(x)?,
        weight: cx.addr(weight)?,
        out: cx.addr(out)?,
        offsets: cx.addr(&plan.offsets)?,
        rows: cx.addr(&plan.rows)?,
        x_stride: x.row_stride() as i64,
        experts: check.u32("E", weight.dim(0))?,
        outputs: check.u32("columns", out.dim(1))?,
        depth: check.u32("depth", x.dim(1))?,
        chosen: check.u32("K", plan.places.dim(1))?,
        places: check.u32("T K", plan.rows.dim(0))?,
        weight_is_input: (!weight.is_persistent()).into(),
    })
}

/// Enqueues the kernel that serves the product best. All have a persistent grid, the same for every plan.
fn launch(
    cx: &mut OpStream,
    check: Check,
    dtype: DType,
    is_gated: bool,
    args: GroupedArgs,
    chosen_among: usize,
) -> Result<()> {
    if dtype == DType::Bf16 && few_rows::applies(cx.device(), &args) {
        return few_rows::launch(cx, is_gated, args);
    }
    if dtype == DType::Bf16 && hopper::applies(cx.device(), is_gated, &args) {
        return hopper::launch(cx, is_gated, args, chosen_among);
    }
    let kernel = if is_gated { &GATE_UP } else { &LINEAR }.get(check, "x", dtype)?;
    let dims = Dims::linear(BLOCKS_PER_MULTIPROCESSOR * cx.device().num_multiprocessors(), THREADS);
    cx.launch(kernel, dims, args)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::Device;

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let zeros = |shape: &[usize], dtype| device.zeros(shape, dtype);
        let plan = ExpertPlan {
            offsets: zeros(&[5], DType::I32)?,
            rows: zeros(&[6], DType::I32)?,
            places: zeros(&[3, 2], DType::I32)?,
            chosen_among: 4,
        };
        let (x, weight) = (zeros(&[3, 8], DType::F32)?, zeros(&[4, 10, 8], DType::F32)?);
        let (odd, few) = (zeros(&[4, 9, 8], DType::F32)?, zeros(&[3, 10, 8], DType::F32)?);
        let (half, permuted) = (zeros(&[4, 10, 8], DType::F16)?, zeros(&[6, 8], DType::F32)?);
        let gate_up = |x: &Tensor, weight: &Tensor| refusal(&device, |cx| grouped_gate_up(cx, x, weight, &plan));
        let linear = |x: &Tensor, weight: &Tensor| refusal(&device, |cx| grouped_linear(cx, x, weight, &plan));
        assert!(gate_up(&x, &odd).contains("`weight` [E, 2 I, C], got [4, 9, 8]"));
        assert!(gate_up(&x, &few).contains("`offsets` [4], got [5]"));
        assert!(gate_up(&x, &half).contains("`weight` f32, got f16"));
        assert!(gate_up(&permuted, &weight).contains("`x` [3, 8], got [6, 8]"));
        assert!(linear(&x, &weight).contains("`x` [6, 8], got [3, 8]"));
        assert!(linear(&permuted, &x).contains("`weight` [E, N, I], got [3, 8]"));
        Ok(())
    }
}
