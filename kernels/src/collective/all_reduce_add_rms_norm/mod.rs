//! Sum over all ranks, residual add and RMS norm in one pass; CUDA source: `all_reduce_add_rms_norm.cu`.

mod host;

use bcg_runtime::{
    COLLECTIVE_BLOCKS_MAX, CommunicatorArgs, DevicePtr, Dims, KernelArgs, OpStream, Result, Source, Tensor,
};

use super::all_reduce::is_two_shot;
use super::message::slot_packs;
use crate::check::Check;
use crate::float::{PerFloat, pack_len};
use crate::norm::rms::{PACKS, rms_dims};
use crate::{add_rms_norm, all_reduce};
use host::{give, take};

static SOURCE: Source = source!("collective/all_reduce_add_rms_norm/all_reduce_add_rms_norm.cu")
    .takes::<NormArgs>()
    .define("PACKS", PACKS)
    .define("BLOCKS_MAX", COLLECTIVE_BLOCKS_MAX);
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("all_reduce_add_rms_norm");

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct NormArgs {
    communicator: CommunicatorArgs,
    x: DevicePtr,
    residual: DevicePtr,
    weight: DevicePtr,
    normed: DevicePtr,
    sum: DevicePtr,
    x_stride: i64,
    residual_stride: i64,
    rows: u32,
    columns: u32,
    /// The packs of a row.
    row_packs: u32,
    eps: f32,
}

// SAFETY: `all_reduce_add_rms_norm` has checked the shapes when it launches, and the source indexes by these alone, within
// rows of which a slot of the plane holds as many as a launch sends.
static ALL_REDUCE_ADD_RMS_NORM: PerFloat<NormArgs> =
    per_float_collective!("all_reduce_add_rms_norm", SOURCE, give, take).programmatic();

/// Sums `x` over all ranks, adds that to the residual and normalises the sum; returns the normed rows and the new residual.
///
/// The same bits as [`add_rms_norm`](crate::add_rms_norm()) of [`all_reduce`](crate::all_reduce()), which it is for messages
/// that are summed in two steps; `residual` and `weight` are the same on all ranks. Outside of a world it is
/// [`add_rms_norm`](crate::add_rms_norm()).
///
/// # Shapes
/// - `x`, `residual`, `normed`, `sum`: `[T, C]`, bf16, f16 or f32; the inputs may be row-sliced.
/// - `weight`: `[C]`, same dtype.
///
/// # Capture
/// Enqueues one kernel, or several for a large message. Frozen: shapes, addresses, `eps`. Read again at each replay: `x`,
/// `residual` and `weight`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let x = device.tensor(&[1, 2], &[1.0f32, -1.0])?;
/// let residual = device.tensor(&[1, 2], &[2.0f32, -2.0])?;
/// let weight = device.tensor(&[2], &[1.0f32, 0.5])?;
/// let run = |cx: &mut _| bcg_kernels::all_reduce_add_rms_norm(cx, &x, &residual, &weight, 0.0);
/// let (normed, sum) = runner.eager(&(), |cx| run(cx))?;
/// assert_eq!(runner.read::<f32>(&normed)?, [1.0, -0.5], "one rank alone");
/// assert_eq!(runner.read::<f32>(&sum)?, [3.0, -3.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn all_reduce_add_rms_norm(
    cx: &mut OpStream,
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    CHECK.rank("x", x, &["T", "C"])?;
    CHECK.shape("residual", residual, x.shape())?;
    CHECK.dtype("residual", residual, x.dtype())?;
    CHECK.dense("weight", weight, &[x.dim(1)], x.dtype())?;
    let kernel = ALL_REDUCE_ADD_RMS_NORM.get(CHECK, "x", x.dtype())?;
    let row_packs = x.dim(1).div_ceil(pack_len(x.dtype()));
    let rows_max = slot_packs(cx) as usize / row_packs.max(1);
    let is_two_shot = is_two_shot(cx.world_size(), x.size_bytes());
    if cx.world_size() == 1 || cx.sums_gathered() || is_two_shot || rows_max == 0 || row_packs == 0 {
        let reduced = all_reduce(cx, x)?;
        return add_rms_norm(cx, &reduced, residual, weight, eps);
    }
    let (normed, sum) = (cx.empty(x.shape(), x.dtype())?, cx.empty(x.shape(), x.dtype())?);
    let block = rms_dims(CHECK, x)?.block[0]; // as in `add_rms_norm`, since the order of a sum depends on it
    let columns = CHECK.u32("C", x.dim(1))?;
    for first in (0..x.dim(0)).step_by(rows_max) {
        let rows = first..first.saturating_add(rows_max).min(x.dim(0));
        let num_rows = CHECK.u32("rows", rows.len())?;
        let addr = |cx: &mut OpStream, tensor: &Tensor| cx.addr(&tensor.rows(rows.clone())?);
        let (x_rows, residual_rows) = (addr(cx, x)?, addr(cx, residual)?);
        let (normed_rows, sum_rows) = (addr(cx, &normed)?, addr(cx, &sum)?);
        let weight = cx.addr(weight)?;
        let dims = Dims::linear(num_rows.min(cx.collective_blocks_max() as u32), block);
        cx.launch_collective(kernel, dims, |communicator| NormArgs {
            communicator,
            x: x_rows,
            residual: residual_rows,
            weight,
            normed: normed_rows,
            sum: sum_rows,
            x_stride: x.row_stride() as i64,
            residual_stride: residual.row_stride() as i64,
            rows: num_rows,
            columns,
            row_packs: row_packs as u32,
            eps,
        })?;
    }
    Ok((normed, sum))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::{DType, Device};

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let x = device.zeros(&[2, 8], DType::Bf16)?;
        let weight = device.zeros(&[8], DType::Bf16)?;
        let fewer = device.zeros(&[1, 8], DType::Bf16)?;
        let wider = device.zeros(&[2, 8], DType::F32)?;
        let op = all_reduce_add_rms_norm;
        assert!(refusal(&device, |cx| op(cx, &x, &fewer, &weight, 0.0)).contains("`residual` [2, 8]"));
        assert!(refusal(&device, |cx| op(cx, &x, &wider, &weight, 0.0)).contains("`residual` bf16"));
        assert!(refusal(&device, |cx| op(cx, &x, &x, &x, 0.0)).contains("`weight` [8], got [2, 8]"));
        Ok(())
    }
}
