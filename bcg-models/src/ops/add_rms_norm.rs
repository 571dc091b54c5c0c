//! Residual add and RMS norm in one pass; CUDA source: `kernels/src/add_rms_norm.cu`.

use bcg_runtime::{DevicePtr, Dims, HostMemory, OpStream, Result, Tensor};
use bytemuck::{AnyBitPattern, NoUninit};

use super::check::Check;
use super::float::{Float, PerFloat, per_float, rms_dims, rms_scale, row};

const CHECK: Check = Check::new("add_rms_norm");

#[repr(C)]
#[derive(Clone, Copy, NoUninit, AnyBitPattern)]
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

static ADD_RMS_NORM: PerFloat<AddRmsNormArgs> =
    per_float!("add_rms_norm", bcg_kernels::ADD_RMS_NORM, host).programmatic();

/// Adds `x` to the residual and normalises the sum; returns the normed rows and the new residual.
///
/// `sum[t, c] = round(x[t, c] + residual[t, c])`; `normed` is [`rms_norm`](crate::ops::rms_norm()) of `sum`.
///
/// # Shapes
/// - `x`, `residual`, `normed`, `sum`: `[T, C]`, bf16, f16 or f32; the inputs may be row-sliced.
/// - `weight`: `[C]`, same dtype.
///
/// # Capture
/// Records one kernel. Frozen: shapes, addresses, `eps`. Read again at each replay: `x`, `residual` and `weight`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_models::ops;
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let x = device.tensor(&[1, 2], &[1.0f32, -1.0])?;
/// let residual = device.tensor(&[1, 2], &[2.0f32, -2.0])?;
/// let weight = device.tensor(&[2], &[1.0f32, 0.5])?;
/// let (normed, sum) = runner.eager(&(), |cx| ops::add_rms_norm(cx, &x, &residual, &weight, 0.0))?;
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

fn host<T: Float>(a: &AddRmsNormArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let columns = a.columns as usize;
    let weight = memory.view::<T>(a.weight, columns)?;
    for t in 0..dims.grid[0] as usize {
        let x = row::<T>(memory, a.x, a.x_stride, t, columns)?;
        let residual = row::<T>(memory, a.residual, a.residual_stride, t, columns)?;
        let normed = row::<T>(memory, a.normed, i64::from(a.columns), t, columns)?;
        let sum = row::<T>(memory, a.sum, i64::from(a.columns), t, columns)?;
        for ((sum, x), residual) in sum.iter().zip(x).zip(residual) {
            sum.set(T::from_f32(x.get().to_f32() + residual.get().to_f32()));
        }
        let scale = rms_scale(sum, a.eps);
        for ((normed, sum), weight) in normed.iter().zip(sum).zip(weight) {
            normed.set(T::from_f32(T::round(sum.get().to_f32() * scale) * weight.get().to_f32()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::testing::refusal;
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
