//! Residual add and RMS norm in one pass; CUDA source: `add_rms_norm.cu`.

mod host;

use bcg_runtime::{DevicePtr, KernelArgs, OpStream, Result, Source, Tensor};

use crate::check::Check;
use crate::float::{PerFloat, per_float};
use crate::norm::rms::{PACKS, rms_dims};
use host::host;

static SOURCE: Source = source!("norm/add_rms_norm/add_rms_norm.cu").takes::<AddRmsNormArgs>().define("PACKS", PACKS);
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("add_rms_norm");

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct AddRmsNormArgs {
    x: DevicePtr,
    residual: DevicePtr,
    weight: DevicePtr,
    normed: DevicePtr,
    sum: DevicePtr,
    x_stride: i64,
    residual_stride: i64,
    columns: u32,
    eps: f32,
}

// SAFETY: `add_rms_norm` has checked the shapes when it launches, and the source indexes by these alone.
static ADD_RMS_NORM: PerFloat<AddRmsNormArgs> = per_float!("add_rms_norm", SOURCE, host).programmatic();

/// Adds `x` to the residual and normalises the sum; returns the normed rows and the new residual.
///
/// `sum[t, c] = round(x[t, c] + residual[t, c])`; `normed` is [`rms_norm`](crate::rms_norm()) of `sum`.
///
/// # Shapes
/// - `x`, `residual`, `normed`, `sum`: `[T, C]`, bf16, f16 or f32; the inputs may be row-sliced.
/// - `weight`: `[C]`, same dtype.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes, addresses, `eps`. Read again at each replay: `x`, `residual` and `weight`.
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
/// let (normed, sum) = runner.eager(&(), |cx| bcg_kernels::add_rms_norm(cx, &x, &residual, &weight, 0.0))?;
/// assert_eq!(runner.read::<f32>(&normed)?, [1.0, -0.5]);
/// assert_eq!(runner.read::<f32>(&sum)?, [3.0, -3.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn add_rms_norm(
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
    let kernel = ADD_RMS_NORM.get(CHECK, "x", x.dtype())?;
    let dims = rms_dims(CHECK, x)?;
    let (normed, sum) = (cx.empty(x.shape(), x.dtype())?, cx.empty(x.shape(), x.dtype())?);
    let args = AddRmsNormArgs {
        x: cx.addr(x)?,
        residual: cx.addr(residual)?,
        weight: cx.addr(weight)?,
        normed: cx.addr(&normed)?,
        sum: cx.addr(&sum)?,
        x_stride: x.row_stride() as i64,
        residual_stride: residual.row_stride() as i64,
        columns: CHECK.u32("C", x.dim(1))?,
        eps,
    };
    cx.launch(kernel, dims, args)?;
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
        assert!(refusal(&device, |cx| add_rms_norm(cx, &x, &fewer, &weight, 0.0)).contains("`residual` [2, 8]"));
        assert!(refusal(&device, |cx| add_rms_norm(cx, &x, &wider, &weight, 0.0)).contains("`residual` bf16"));
        assert!(refusal(&device, |cx| add_rms_norm(cx, &x, &x, &x, 0.0)).contains("`weight` [8], got [2, 8]"));
        Ok(())
    }
}
