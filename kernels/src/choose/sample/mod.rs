//! Random choice of a token; CUDA source: `sample.cu`.

mod host;

use bcg_runtime::{DType, DevicePtr, Kernel, KernelArgs, OpStream, Result, Source, Tensor};

use super::logits;
use crate::check::Check;
use crate::random::GOLDEN;
use host::host;

static SOURCE: Source = source!("choose/sample/sample.cu", "logit_search.cuh")
    .takes::<SampleArgs>()
    .define("CLUSTER", logits::CLUSTER)
    .define("LOGITS_THREADS", logits::THREADS)
    .define("GOLDEN", GOLDEN as usize);
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("sample");

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct SampleArgs {
    #[points_to(const f32)]
    logits: DevicePtr,
    #[points_to(const f32)]
    temperature: DevicePtr,
    #[points_to(const i32)]
    top_k: DevicePtr,
    #[points_to(const f32)]
    top_p: DevicePtr,
    #[points_to(const f32)]
    min_p: DevicePtr,
    #[points_to(const i64)]
    seed: DevicePtr,
    #[points_to(const i64)]
    step: DevicePtr,
    #[points_to(i32)]
    out: DevicePtr,
    stride: i64,
    columns: u32,
    /// Quads of a thread in dynamic shared memory: its whole share of the row, or none.
    num_kept: u32,
}

// SAFETY: `sample_to` has checked the shapes when it launches, and the source indexes by these alone.
static SAMPLE: Kernel<SampleArgs> = unsafe { Kernel::new("sample", &SOURCE, host) }.programmatic();

/// The most shared memory in which a block keeps its share of a row for the passes after the first, for V up to 163,840;
/// two such blocks fit on a multiprocessor of Hopper.
const KEPT_BYTES_MAX: usize = 80 * 1024;

/// The parameters of [`sample()`], one per row.
#[derive(Clone, Copy, Debug)]
pub struct SampleInputs<'a> {
    /// `[B]` f32: divides the logits; 0 or less takes the largest logit.
    pub temperature: &'a Tensor,
    /// `[B]` i32: keeps this many of the likeliest tokens; 0 or less keeps all.
    pub top_k: &'a Tensor,
    /// `[B]` f32: keeps the likeliest tokens whose probabilities first reach this sum; 1 keeps all.
    pub top_p: &'a Tensor,
    /// `[B]` f32: keeps tokens at least this fraction as likely as the likeliest; 0 keeps all.
    pub min_p: &'a Tensor,
    /// `[B]` i64: the seed of the row's sequence.
    pub seed: &'a Tensor,
    /// `[B]` i64: how many tokens the sequence has drawn before, so that each draw is another one.
    pub step: &'a Tensor,
}

/// Draws one token for each row.
///
/// The filters apply in this order: temperature, top-k, top-p (over the mass that top-k kept), min-p. Tokens that tie
/// with the last kept one are kept; the likeliest always is; NaN never is. Of the kept tokens the one with the largest
/// `logit / temperature + gumbel(seed, step, token)` is drawn: a choice by probability that depends on nothing but the
/// row and its counters, the same on the host and on CUDA.
///
/// # Shapes
/// - `logits`: `[B, V]` f32, may be row-sliced.   - `out`: `[B]` i32.   - The rest as [`SampleInputs`] says.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes and addresses. Read again at each replay: the contents of all tensors.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_kernels::SampleInputs;
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let logits = device.tensor(&[2, 3], &[1.0f32, 2.0, 3.0, 1.0, 2.0, 3.0])?;
/// let inputs = SampleInputs {
///     temperature: &device.tensor(&[2], &[0.0f32, 0.8])?, // the first row is greedy
///     top_k: &device.tensor(&[2], &[0, 2])?,
///     top_p: &device.tensor(&[2], &[1.0f32, 1.0])?,
///     min_p: &device.tensor(&[2], &[0.0f32, 0.0])?,
///     seed: &device.tensor(&[2], &[7i64, 7])?,
///     step: &device.tensor(&[2], &[0i64, 0])?,
/// };
/// let tokens = runner.eager(&(), |cx| bcg_kernels::sample(cx, &logits, &inputs))?;
/// let tokens = runner.read::<i32>(&tokens)?;
/// assert_eq!(tokens[0], 2);
/// assert!([1, 2].contains(&tokens[1]));
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn sample(cx: &mut OpStream, logits: &Tensor, inputs: &SampleInputs<'_>) -> Result<Tensor> {
    CHECK.rank("logits", logits, &["B", "V"])?;
    let out = cx.empty(&[logits.dim(0)], DType::I32)?;
    sample_to(cx, logits, inputs, &out)?;
    Ok(out)
}

/// As [`sample()`], into `out`.
///
/// # Errors
/// As [`sample()`].
pub fn sample_to(cx: &mut OpStream, logits: &Tensor, inputs: &SampleInputs<'_>, out: &Tensor) -> Result<()> {
    CHECK.rank("logits", logits, &["B", "V"])?;
    CHECK.dtype("logits", logits, DType::F32)?;
    let rows = [logits.dim(0)];
    CHECK.dense("temperature", inputs.temperature, &rows, DType::F32)?;
    CHECK.dense("top_k", inputs.top_k, &rows, DType::I32)?;
    CHECK.dense("top_p", inputs.top_p, &rows, DType::F32)?;
    CHECK.dense("min_p", inputs.min_p, &rows, DType::F32)?;
    CHECK.dense("seed", inputs.seed, &rows, DType::I64)?;
    CHECK.dense("step", inputs.step, &rows, DType::I64)?;
    let mut dims = logits::dims(CHECK, logits)?;
    let packs = logits::packs_per_thread(logits.dim(1));
    let num_kept = if logits::packs_bytes(packs) <= KEPT_BYTES_MAX { packs } else { 0 };
    dims.shared_bytes = logits::packs_bytes(num_kept) as u32;
    CHECK.dense("out", out, &rows, DType::I32)?;
    let args = SampleArgs {
        logits: cx.addr(logits)?,
        temperature: cx.addr(inputs.temperature)?,
        top_k: cx.addr(inputs.top_k)?,
        top_p: cx.addr(inputs.top_p)?,
        min_p: cx.addr(inputs.min_p)?,
        seed: cx.addr(inputs.seed)?,
        step: cx.addr(inputs.step)?,
        out: cx.addr(out)?,
        stride: logits.row_stride() as i64,
        columns: CHECK.u32("V", logits.dim(1))?,
        num_kept: num_kept as u32,
    };
    cx.launch(&SAMPLE, dims, args)
}

#[cfg(test)]
mod tests {
    use super::host::{kept, uniform};
    use super::*;
    use crate::check::testing::refusal;
    use crate::random::mix;
    use bcg_runtime::Device;

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let logits = device.zeros(&[2, 3], DType::F32)?;
        let (float, int, long) =
            (device.zeros(&[2], DType::F32)?, device.zeros(&[2], DType::I32)?, device.zeros(&[2], DType::I64)?);
        let inputs =
            SampleInputs { temperature: &float, top_k: &int, top_p: &float, min_p: &float, seed: &long, step: &int };
        assert!(refusal(&device, |cx| sample(cx, &logits, &inputs)).contains("`step` i64, got i32"));
        Ok(())
    }

    #[test]
    fn filters_keep_what_they_promise() {
        let scaled = [0.1f32, 0.4, 0.3, 0.2].map(f32::ln);
        assert_eq!(kept(&scaled, 0, 1.0, 0.0), [0, 1, 2, 3]);
        assert_eq!(kept(&scaled, 2, 1.0, 0.0), [1, 2]);
        assert_eq!(kept(&scaled, 9, 1.0, 0.0), [0, 1, 2, 3]);
        assert_eq!(kept(&scaled, 0, 0.35, 0.0), [1]);
        assert_eq!(kept(&scaled, 0, 0.65, 0.0), [1, 2]);
        assert_eq!(kept(&scaled, 0, 0.0, 0.0), [1]);
        assert_eq!(kept(&scaled, 0, 1.0, 0.6), [1, 2]);
        assert_eq!(kept(&scaled, 2, 0.5, 0.0), [1], "top-p counts the mass that top-k kept");
        assert_eq!(kept(&[1.0, 1.0, f32::NAN, 0.0], 1, 1.0, 0.0), [0, 1], "ties are kept, NaN is not");
        assert_eq!(kept(&scaled, 0, 1.0, 2.0), [1], "the likeliest always stays");
    }

    #[test]
    fn uniform_numbers_stay_between_0_and_1_and_differ_by_every_counter() {
        let numbers: Vec<f32> = (0..1000).map(|token| uniform(mix(3), token)).collect();
        assert!(numbers.iter().all(|u| *u > 0.0 && *u < 1.0));
        let mean = numbers.iter().sum::<f32>() / 1000.0;
        assert!((mean - 0.5).abs() < 0.05, "{mean}");
        assert!((0..1000).filter(|token| uniform(mix(4), *token) == numbers[*token]).count() < 3);
        let largest = u32::from(u16::MAX) << 7 | 127; // 23 ones
        assert!((largest as f32 + 0.5) * (1.0 / 8_388_608.0) < 1.0);
    }
}
