//! Index of the largest logit; CUDA source: `argmax.cu`.

mod host;

use bcg_runtime::{DType, DevicePtr, Kernel, KernelArgs, OpStream, Result, Source, Tensor};

use crate::check::Check;
use host::host;

use super::logits;
pub(super) use host::largest;

static SOURCE: Source = source!("choose/argmax/argmax.cu")
    .takes::<ArgmaxArgs>()
    .define("CLUSTER", logits::CLUSTER)
    .define("LOGITS_THREADS", logits::THREADS);
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("argmax");

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct ArgmaxArgs {
    #[points_to(const f32)]
    logits: DevicePtr,
    #[points_to(i32)]
    out: DevicePtr,
    stride: i64,
    columns: u32,
    _padding: u32,
}

// SAFETY: `argmax_to` has checked the shapes when it launches, and the source indexes by these alone.
static ARGMAX: Kernel<ArgmaxArgs> = unsafe { Kernel::new("argmax", &SOURCE, host) }.programmatic();

/// Finds the index of the largest value of each row.
///
/// Of equal values the lowest index wins. NaN never wins; a row of nothing but NaN gives 0.
///
/// # Shapes
/// - `logits`: `[B, V]` f32, may be row-sliced.   - `out`: `[B]` i32.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes and addresses. Read again at each replay: `logits`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if the rank or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let logits = device.tensor(&[2, 3], &[f32::NAN, 1.0, 2.0, 5.0, 5.0, -1.0])?;
/// let best = runner.eager(&(), |cx| bcg_kernels::argmax(cx, &logits))?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
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
