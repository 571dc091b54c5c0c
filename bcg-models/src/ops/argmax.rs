//! Index of the largest logit; CUDA source: `kernels/src/argmax.cu`.

use std::cell::Cell;

use bcg_runtime::{DType, DevicePtr, Dims, HostMemory, Kernel, OpStream, Result, Tensor};
use bytemuck::{AnyBitPattern, NoUninit};

use super::check::Check;
use super::float::row;
use super::logits;

const CHECK: Check = Check::new("argmax");

#[repr(C)]
#[derive(Clone, Copy, NoUninit, AnyBitPattern)]
struct ArgmaxArgs {
    logits: DevicePtr,
    out: DevicePtr,
    stride: i64,
    columns: u32,
    _padding: u32,
}

static ARGMAX: Kernel<ArgmaxArgs> = Kernel::new("argmax", &bcg_kernels::ARGMAX, host).programmatic();

/// Finds the index of the largest value of each row.
///
/// Of equal values the lowest index wins. NaN never wins; a row of nothing but NaN gives 0.
///
/// # Shapes
/// - `logits`: `[B, V]` f32, may be row-sliced.   - `out`: `[B]` i32.
///
/// # Capture
/// Records one kernel. Frozen: shapes and addresses. Read again at each replay: `logits`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if the rank or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_models::ops;
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let logits = device.tensor(&[2, 3], &[f32::NAN, 1.0, 2.0, 5.0, 5.0, -1.0])?;
/// let best = runner.eager(&(), |cx| ops::argmax(cx, &logits))?;
/// assert_eq!(runner.read::<i32>(&best)?, [2, 0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn argmax(cx: &mut OpStream, logits: &Tensor) -> Result<Tensor> {
    CHECK.rank("logits", logits, &["B", "V"])?;
    let out = cx.empty(&[logits.dim(0)], DType::I32)?;
    argmax_to(cx, logits, &out)?;
    Ok(out)
}

/// As [`argmax`], into `out`.
///
/// # Errors
/// As [`argmax`].
pub fn argmax_to(cx: &mut OpStream, logits: &Tensor, out: &Tensor) -> Result<()> {
    CHECK.rank("logits", logits, &["B", "V"])?;
    CHECK.dtype("logits", logits, DType::F32)?;
    let dims = logits::dims(CHECK, logits)?;
    CHECK.dense("out", out, &[logits.dim(0)], DType::I32)?;
    let args = ArgmaxArgs {
        logits: cx.addr(logits)?,
        out: cx.addr(out)?,
        stride: logits.row_stride() as i64,
        columns: CHECK.u32("V", logits.dim(1))?,
        _padding: 0,
    };
    cx.launch(&ARGMAX, dims, args)
}

fn host(a: &ArgmaxArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    for b in 0..logits::rows(dims) {
        let logits = row::<f32>(memory, a.logits, a.stride, b, a.columns as usize)?;
        let best = largest(logits.iter().map(Cell::get).enumerate());
        row::<i32>(memory, a.out, 1, b, 1)?[0].set(best);
    }
    Ok(())
}

/// The index of the largest value; the first of equal ones, 0 if there is none but NaN.
pub(super) fn largest(values: impl Iterator<Item = (usize, f32)>) -> i32 {
    let mut best = None;
    for (index, value) in values {
        if !value.is_nan() && best.is_none_or(|(_, most)| value > most) {
            best = Some((index, value));
        }
    }
    best.map_or(0, |(index, _)| index as i32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::testing::refusal;
    use bcg_runtime::Device;

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let logits = device.zeros(&[2, 3], DType::Bf16)?;
        assert!(refusal(&device, |cx| argmax(cx, &logits)).contains("`logits` f32, got bf16"));
        Ok(())
    }

    #[test]
    fn the_first_of_equal_values_wins_and_nan_never() {
        let of = |values: &[f32]| largest(values.iter().copied().enumerate());
        assert_eq!(of(&[1.0, 3.0, 3.0]), 1);
        assert_eq!(of(&[f32::NAN, f32::NEG_INFINITY, f32::NEG_INFINITY]), 1);
        assert_eq!(of(&[f32::NAN, f32::NAN]), 0);
        assert_eq!(of(&[0.0, -0.0, f32::INFINITY]), 2);
        assert_eq!(of(&[-0.0, 0.0]), 0);
    }
}
