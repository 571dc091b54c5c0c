//! RMS norm; CUDA source: `rms_norm.cu`.

mod host;

use bcg_runtime::{DevicePtr, KernelArgs, OpStream, Result, Source, Tensor};

use crate::check::Check;
use crate::float::{PerFloat, per_float};
use crate::norm::rms::{PACKS, rms_dims};
use host::host;

static SOURCE: Source = source!("norm/rms_norm/rms_norm.cu").takes::<RmsNormArgs>().define("PACKS", PACKS);
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("rms_norm");

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct RmsNormArgs {
    x: DevicePtr,
    weight: DevicePtr,
    out: DevicePtr,
    x_stride: i64,
    columns: u32,
    eps: f32,
}

// SAFETY: `rms_norm` has checked the shapes when it launches, and the source indexes by these alone.
static RMS_NORM: PerFloat<RmsNormArgs> = per_float!("rms_norm", SOURCE, host).programmatic();

/// Normalises each row of `x` by its root mean square and scales it by `weight`.
///
/// `out[t, c] = round(x[t, c] / sqrt(mean_c(x[t]²) + eps)) * weight[c]`, summed in f32 and rounded to the dtype before
/// and after the product with `weight`, as transformers does.
///
/// # Shapes
/// - `x`, `out`: `[T, C]`, bf16, f16 or f32; `x` may be row-sliced.
/// - `weight`: `[C]`, same dtype.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes, addresses, `eps`. Read again at each replay: `x` and `weight`.
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
/// let x = device.tensor(&[1, 2], &[3.0f32, -3.0])?;
/// let weight = device.tensor(&[2], &[1.0f32, 0.5])?;
/// let out = runner.eager(&(), |cx| bcg_kernels::rms_norm(cx, &x, &weight, 0.0))?;
/// assert_eq!(runner.read::<f32>(&out)?, [1.0, -0.5]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn rms_norm(cx: &mut OpStream, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    CHECK.rank("x", x, &["T", "C"])?;
    CHECK.dense("weight", weight, &[x.dim(1)], x.dtype())?;
    let kernel = RMS_NORM.get(CHECK, "x", x.dtype())?;
    let dims = rms_dims(CHECK, x)?;
    let out = cx.empty(x.shape(), x.dtype())?;
    let args = RmsNormArgs {
        x: cx.addr(x)?,
        weight: cx.addr(weight)?,
        out: cx.addr(&out)?,
        x_stride: x.row_stride() as i64,
        columns: CHECK.u32("C", x.dim(1))?,
        eps,
    };
    cx.launch(kernel, dims, args)?;
    Ok(out)
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
        let short = device.zeros(&[7], DType::Bf16)?;
        let other = device.zeros(&[8], DType::F32)?;
        let ids = device.zeros(&[2, 8], DType::I32)?;
        let weight = device.zeros(&[8], DType::I32)?;
        assert!(refusal(&device, |cx| rms_norm(cx, &x, &short, 0.0)).contains("`weight` [8], got [7]"));
        assert!(refusal(&device, |cx| rms_norm(cx, &x, &other, 0.0)).contains("`weight` bf16, got f32"));
        assert!(refusal(&device, |cx| rms_norm(cx, &weight, &weight, 0.0)).contains("`x` [T, C], got [8]"));
        assert!(refusal(&device, |cx| rms_norm(cx, &ids, &weight, 0.0)).contains("`x` bf16, f16 or f32, got i32"));
        Ok(())
    }
}
