//! The weighted sum of a token's experts; CUDA source: `combine.cu`.

mod host;

use bcg_runtime::{DevicePtr, KernelArgs, OpStream, Result, Source, Tensor};

use super::route::Routing;
use crate::check::Check;
use crate::float::{PerFloat, pack_len, per_float};
pub(crate) use host::combined;
use host::host;

static SOURCE: Source = source!("moe/combine/combine.cu").takes::<MoeCombineArgs>();
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("moe_combine");

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct MoeCombineArgs {
    y: DevicePtr,
    #[points_to(const i32)]
    places: DevicePtr,
    #[points_to(const f32)]
    weights: DevicePtr,
    /// Which rows are padded, no place tells: the choices of a row may all be without one.
    #[points_to(const i32)]
    num_valid: DevicePtr,
    /// Null without a shared expert.
    shared: DevicePtr,
    out: DevicePtr,
    shared_stride: i64,
    columns: u32,
    chosen: u32,
}

// SAFETY: `moe_combine` has checked the shapes when it launches, and the source indexes by these alone.
static MOE_COMBINE: PerFloat<MoeCombineArgs> = per_float!("moe_combine", SOURCE, host).programmatic();

const THREADS: u32 = 128;

/// Adds up what the experts of each token made of it, and what the shared experts made.
///
/// `out[t] = sum_k weights[t, k] * y[places[t, k]] + shared[t]`, in f32 in the order of k over the choices that have a place,
/// rounded once. Padded rows are zeros. Where the plan is of some experts only, this is a partial sum, rounded by itself: the
/// sum of those of all ranks has other last bits than one rank's sum over all experts.
///
/// # Shapes
/// - `y`: `[T K, C]`, bf16, f16 or f32, contiguous, in the order of the plan.   - `routing`: of `[T, K]` choices.
/// - `shared`: `[T, C]`, same dtype; may be row-sliced.   - `out`: `[T, C]`.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes and addresses. Read again at each replay: all contents.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_kernels::{Scores, Scoring};
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let logits = device.tensor(&[1, 2], &[0.0f32, 3f32.ln()])?; // expert 1 is thrice as likely
/// let num_valid = device.tensor(&[1], &[1])?;
/// let scoring =
///     Scoring { scores: Scores::Softmax, chosen: 2, groups: 1, kept_groups: 1, is_renormalised: true, scale: 1.0 };
/// let y = device.tensor(&[2, 1], &[100.0f32, 200.0])?;
/// let out = runner.eager(&(), |cx| {
///     let routing = bcg_kernels::moe_route(cx, &logits, &scoring, &num_valid, 0..2)?;
///     bcg_kernels::moe_combine(cx, &y, &routing, None)
/// })?;
/// assert!((runner.read::<f32>(&out)?[0] - 175.0).abs() < 1e-4);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn moe_combine(cx: &mut OpStream, y: &Tensor, routing: &Routing, shared: Option<&Tensor>) -> Result<Tensor> {
    let places = &routing.plan.places;
    routing.check(CHECK, y)?;
    let shape = [places.dim(0), y.dim(1)];
    if let Some(shared) = shared {
        CHECK.shape("shared", shared, &shape)?;
        CHECK.dtype("shared", shared, y.dtype())?;
    }
    let kernel = MOE_COMBINE.get(CHECK, "y", y.dtype())?;
    let out = cx.empty(&shape, y.dtype())?;
    let mut dims = CHECK.block_per_row(&out, THREADS)?;
    // In y one pack for each thread; a grid that CUDA cannot take goes around again.
    let packs = out.dim(1).div_ceil(pack_len(out.dtype()));
    dims.grid[1] = packs.div_ceil(THREADS as usize).clamp(1, 65_535) as u32;
    let args = MoeCombineArgs {
        y: cx.addr(y)?,
        places: cx.addr(places)?,
        weights: cx.addr(&routing.choices.weights)?,
        num_valid: cx.addr(&routing.num_valid)?,
        shared: shared.map_or(Ok(DevicePtr::NULL), |shared| cx.addr(shared))?,
        out: cx.addr(&out)?,
        shared_stride: shared.map_or(0, |shared| shared.row_stride() as i64),
        columns: CHECK.u32("C", out.dim(1))?,
        chosen: CHECK.u32("K", places.dim(1))?,
    };
    cx.launch(kernel, dims, args)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use crate::moe::{Choices, ExpertPlan};
    use bcg_runtime::{DType, Device};

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let zeros = |shape: &[usize], dtype| device.zeros(shape, dtype);
        let (places, rows) = (zeros(&[3, 2], DType::I32)?, zeros(&[6], DType::I32)?);
        let plan = ExpertPlan { offsets: zeros(&[5], DType::I32)?, rows, places: places.clone(), chosen_among: 4 };
        let choices = Choices { experts: places, weights: zeros(&[3, 2], DType::F32)? };
        let routing = Routing { choices, plan, num_valid: zeros(&[1], DType::I32)? };
        let (y, shared) = (zeros(&[6, 8], DType::F16)?, zeros(&[2, 8], DType::F16)?);
        let says = |y: &Tensor, shared| refusal(&device, |cx| moe_combine(cx, y, &routing, shared));
        assert!(says(&y.rows(0..5)?, None).contains("`y` [6, 8], got [5, 8]"));
        assert!(says(&y, Some(&shared)).contains("`shared` [3, 8], got [2, 8]"));
        assert!(says(&zeros(&[6, 8], DType::I32)?, None).contains("bf16, f16 or f32, got i32"));
        Ok(())
    }
}
