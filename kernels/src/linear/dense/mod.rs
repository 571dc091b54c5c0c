//! Matrix product with a transposed weight: the device's own product, `OpStream::matmul`.

mod few_rows;
mod host;

use bcg_runtime::{DType, OpStream, Result, Source, Tensor};

use crate::check::Check;
use few_rows::linear_few_rows;

pub(super) const SOURCES: &[&Source] = &[&few_rows::SOURCE];

const CHECK: Check = Check::new("linear");

/// Multiplies each row of `x` with every row of `weight`, in the dtype of `x`.
///
/// `out[t, n] = sum_k x[t, k] * weight[n, k]`, summed in f32 and rounded once; the weight is stored as checkpoints
/// store it.
///
/// # Shapes
/// - `x`: `[T, K]`, bf16, f16 or f32; may be row-sliced.   - `weight`: `[N, K]`, same dtype; may be row-sliced.
/// - `out`: `[T, N]`.
///
/// # Capture
/// Enqueues one matrix product. Frozen: shapes, addresses, the algorithm. Read again at each replay: `x` and `weight`.
///
/// # Determinism
/// The same shapes give the same bits, and what padded rows hold never reaches valid ones. On CUDA another T may be summed in
/// another order; see [`OpStream::matmul`]. Not so up to 16 rows of bf16 on Hopper and Blackwell, if rows are aligned
/// to 16 bytes: then a row has the same bits for any T. A weight with memory of its own may be read there before earlier
/// work has run, so no kernel may write it.
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
/// let x = device.tensor(&[1, 2], &[1.0f32, 2.0])?;
/// let weight = device.tensor(&[3, 2], &[1.0f32, 0.0, 0.0, 1.0, 1.0, 1.0])?;
/// let out = runner.eager(&(), |cx| bcg_kernels::linear(cx, &x, &weight))?;
/// assert_eq!(runner.read::<f32>(&out)?, [1.0, 2.0, 3.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn linear(cx: &mut OpStream, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    linear_to(cx, x, weight, x.dtype())
}

/// Multiplies as [`linear()`] does, with an output of `dtype`: that of `x`, or f32 (logits).
///
/// # Shapes
/// As [`linear()`].
///
/// # Capture
/// As [`linear()`].
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_runtime::{DType, Device, Runner, RunnerOptions};
/// use half::bf16;
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let x = device.tensor(&[1, 2], &[bf16::from_f32(1.0), bf16::from_f32(256.0)])?;
/// let logits = runner.eager(&(), |cx| bcg_kernels::linear_to(cx, &x, &x, DType::F32))?;
/// assert_eq!(runner.read::<f32>(&logits)?, [65537.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn linear_to(cx: &mut OpStream, x: &Tensor, weight: &Tensor, dtype: DType) -> Result<Tensor> {
    CHECK.rank("x", x, &["T", "K"])?;
    CHECK.rank("weight", weight, &["N", "K"])?;
    CHECK.shape("weight", weight, &[weight.dim(0), x.dim(1)])?;
    CHECK.dtype("weight", weight, x.dtype())?;
    if dtype != x.dtype() && dtype != DType::F32 {
        return Err(CHECK.error("the dtype of `x` or f32", format!("{} to {dtype}", x.dtype())));
    }
    let out = cx.empty(&[x.dim(0), weight.dim(0)], dtype)?;
    if few_rows::applies(cx, x, weight, dtype)? {
        linear_few_rows(cx, x, weight, &out)?;
    } else {
        cx.matmul(&out, x, weight)?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::Device;

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let x = device.zeros(&[2, 8], DType::Bf16)?;
        let narrow = device.zeros(&[4, 7], DType::Bf16)?;
        let other = device.zeros(&[4, 8], DType::F32)?;
        assert!(refusal(&device, |cx| linear(cx, &x, &narrow)).contains("`weight` [4, 8], got [4, 7]"));
        assert!(refusal(&device, |cx| linear(cx, &x, &other)).contains("`weight` bf16, got f32"));
        assert!(refusal(&device, |cx| linear_to(cx, &x, &x, DType::F16)).contains("got bf16 to f16"));
        Ok(())
    }
}
