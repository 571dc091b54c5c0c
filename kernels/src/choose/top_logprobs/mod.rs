//! Log probabilities of the chosen and the likeliest tokens; CUDA source: `top_logprobs.cu`.

mod host;

use bcg_runtime::{DType, DevicePtr, Kernel, KernelArgs, OpStream, Result, Source, Tensor};

use super::logits;
use crate::check::Check;
use host::host;

static SOURCE: Source = source!("choose/top_logprobs/top_logprobs.cu")
    .takes::<TopLogprobsArgs>()
    .define("CLUSTER", logits::CLUSTER)
    .define("LOGITS_THREADS", logits::THREADS);
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("top_logprobs");

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct TopLogprobsArgs {
    #[points_to(const f32)]
    logits: DevicePtr,
    #[points_to(const i32)]
    rows: DevicePtr,
    #[points_to(const i32)]
    chosen: DevicePtr,
    #[points_to(i32)]
    ids: DevicePtr,
    #[points_to(f32)]
    logprobs: DevicePtr,
    stride: i64,
    num_rows: u32,
    columns: u32,
    num_top: u32,
    _padding: u32,
}

// SAFETY: `top_logprobs` has checked the shapes when it launches, and the source indexes by these alone.
static TOP_LOGPROBS: Kernel<TopLogprobsArgs> = unsafe { Kernel::new("top_logprobs", &SOURCE, host) }.programmatic();

/// Finds the natural log probabilities of the chosen token and of the `n` likeliest tokens of some rows.
///
/// Column 0 of the outputs is `chosen[rows[r]]`, the columns after it are the likeliest tokens, best first; of equal
/// values the lowest index comes first. The probabilities are those of the row as it is, without temperature or filters.
/// NaN has no probability: it counts as -infinity, and is not listed. Where tokens are fewer than `n`, and in a row
/// outside `logits`, the rest is token -1 at -infinity. Values that equal the largest one share its probability even
/// where they are infinite.
///
/// # Shapes
/// - `logits`: `[B, V]` f32, may be row-sliced.   - `rows`: `[R]` i32.   - `chosen`: `[B]` i32.
/// - out: ids `[R, 1 + n]` i32 and log probabilities `[R, 1 + n]` f32.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes, addresses and `n`. Read again at each replay: the contents of all tensors.
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
/// let logits = device.tensor(&[2, 4], &[0.5f32, 0.125, 0.125, 0.25, 1.0, 1.0, 1.0, 1.0].map(f32::ln))?;
/// let (rows, chosen) = (device.tensor(&[1], &[0])?, device.tensor(&[2], &[2, 0])?);
/// let (ids, logprobs) = runner.eager(&(), |cx| bcg_kernels::top_logprobs(cx, &logits, &rows, &chosen, 2))?;
/// assert_eq!(runner.read::<i32>(&ids)?, [2, 0, 3]);
/// let probabilities = runner.read::<f32>(&logprobs)?.into_iter().map(f32::exp);
/// assert!(probabilities.zip([0.125, 0.5, 0.25]).all(|(got, expected)| (got - expected).abs() < 1e-6));
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn top_logprobs(
    cx: &mut OpStream,
    logits: &Tensor,
    rows: &Tensor,
    chosen: &Tensor,
    n: usize,
) -> Result<(Tensor, Tensor)> {
    CHECK.rank("logits", logits, &["B", "V"])?;
    CHECK.dtype("logits", logits, DType::F32)?;
    CHECK.rank("rows", rows, &["R"])?;
    CHECK.dense("rows", rows, rows.shape(), DType::I32)?;
    CHECK.dense("chosen", chosen, &[logits.dim(0)], DType::I32)?;
    let num_top = CHECK.u32("n", n)?;
    let dims = logits::dims(CHECK, rows)?;
    let shape = [rows.dim(0), 1 + n];
    let (ids, logprobs) = (cx.empty(&shape, DType::I32)?, cx.empty(&shape, DType::F32)?);
    let args = TopLogprobsArgs {
        logits: cx.addr(logits)?,
        rows: cx.addr(rows)?,
        chosen: cx.addr(chosen)?,
        ids: cx.addr(&ids)?,
        logprobs: cx.addr(&logprobs)?,
        stride: logits.row_stride() as i64,
        num_rows: CHECK.u32("B", logits.dim(0))?,
        columns: CHECK.u32("V", logits.dim(1))?,
        num_top,
        _padding: 0,
    };
    cx.launch(&TOP_LOGPROBS, dims, args)?;
    Ok((ids, logprobs))
}

#[cfg(test)]
mod tests {
    use super::host::{LogSoftmax, likeliest};
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::Device;

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let (logits, rows) = (device.zeros(&[2, 3], DType::F32)?, device.zeros(&[1], DType::I32)?);
        let (chosen, floats) = (device.zeros(&[2], DType::I32)?, device.zeros(&[1], DType::F32)?);
        let says = |rows, chosen| refusal(&device, |cx| top_logprobs(cx, &logits, rows, chosen, 1));
        assert!(says(&rows, &rows).contains("`chosen` [2], got [1]"));
        assert!(says(&floats, &chosen).contains("`rows` i32, got f32"));
        Ok(())
    }

    #[test]
    fn the_likeliest_come_best_first_and_nan_never() {
        let logits = [0.0, 3.0, f32::NAN, 3.0, -1.0, -0.0];
        assert_eq!(likeliest(&logits, 3), [1, 3, 0]);
        assert_eq!(likeliest(&logits, 0), [0; 0]);
        assert_eq!(likeliest(&logits, 9), [1, 3, 0, 5, 4]);
    }

    #[test]
    fn log_probabilities_of_any_row_are_numbers() {
        let of = |logits: &[f32], logit| LogSoftmax::new(logits).of(logit);
        let large = [1000.0, 999.0, 0.0];
        let sum: f32 = large.iter().map(|logit| of(&large, *logit).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
        let (most, least) = (f32::INFINITY, f32::NEG_INFINITY);
        assert_eq!(of(&[most, 1.0, most], most), -2.0f32.ln());
        assert_eq!(of(&[most, 1.0], 1.0), least);
        assert_eq!(of(&[least, least], least), -2.0f32.ln());
        assert_eq!(of(&[f32::NAN, 1.0], f32::NAN), least);
        assert_eq!(of(&[f32::NAN, 1.0], 1.0), 0.0);
    }
}
