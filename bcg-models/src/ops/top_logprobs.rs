//! Log probabilities of the chosen and the likeliest tokens; CUDA source: `kernels/src/top_logprobs.cu`.

use std::cell::Cell;
use std::cmp::Ordering;

use bcg_runtime::{DType, DevicePtr, Dims, HostMemory, Kernel, OpStream, Result, Tensor};
use bytemuck::{AnyBitPattern, NoUninit};

use super::check::Check;
use super::float::row;
use super::logits;

const CHECK: Check = Check::new("top_logprobs");

#[repr(C)]
#[derive(Clone, Copy, NoUninit, AnyBitPattern)]
struct TopLogprobsArgs {
    logits: DevicePtr,
    rows: DevicePtr,
    chosen: DevicePtr,
    ids: DevicePtr,
    logprobs: DevicePtr,
    stride: i64,
    num_rows: u32,
    columns: u32,
    num_top: u32,
    _padding: u32,
}

static TOP_LOGPROBS: Kernel<TopLogprobsArgs> =
    Kernel::new("top_logprobs", &bcg_kernels::TOP_LOGPROBS, host).programmatic();

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
/// Records one kernel. Frozen: shapes, addresses and `n`. Read again at each replay: the contents of all tensors.
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
/// let logits = device.tensor(&[2, 4], &[0.5f32, 0.125, 0.125, 0.25, 1.0, 1.0, 1.0, 1.0].map(f32::ln))?;
/// let (rows, chosen) = (device.tensor(&[1], &[0])?, device.tensor(&[2], &[2, 0])?);
/// let (ids, logprobs) = runner.eager(&(), |cx| ops::top_logprobs(cx, &logits, &rows, &chosen, 2))?;
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

fn host(a: &TopLogprobsArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let chosen = memory.load::<i32>(a.chosen, a.num_rows as usize)?;
    let width = 1 + a.num_top as usize;
    for (r, b) in memory.load::<i32>(a.rows, logits::rows(dims))?.into_iter().enumerate() {
        let (mut logits, mut first) = (Vec::new(), -1);
        if let Some(chosen) = usize::try_from(b).ok().and_then(|b| chosen.get(b)) {
            let row = row::<f32>(memory, a.logits, a.stride, b as usize, a.columns as usize)?;
            logits = row.iter().map(Cell::get).collect();
            first = *chosen;
        }
        let top = likeliest(&logits, width - 1);
        let log_softmax = LogSoftmax::new(&logits);
        let ids = row::<i32>(memory, a.ids, width as i64, r, width)?;
        let logprobs = row::<f32>(memory, a.logprobs, width as i64, r, width)?;
        let listed = top.into_iter().map(|index| index as i32).chain(std::iter::repeat(-1));
        for ((id, logprob), token) in ids.iter().zip(logprobs).zip(std::iter::once(first).chain(listed)) {
            let logit = usize::try_from(token).ok().and_then(|token| logits.get(token));
            id.set(token);
            logprob.set(logit.map_or(f32::NEG_INFINITY, |logit| log_softmax.of(*logit)));
        }
    }
    Ok(())
}

/// What turns logits into log probabilities. Two terms, because their sum would round small differences away.
struct LogSoftmax {
    most: f32,
    log_sum: f32,
}

impl LogSoftmax {
    fn new(logits: &[f32]) -> Self {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max); // of a number and NaN, the number
        let weights = logits.iter().filter(|logit| !logit.is_nan()).map(|logit| f64::from(below(*logit, most)).exp());
        Self { most, log_sum: weights.sum::<f64>().ln() as f32 }
    }

    fn of(&self, logit: f32) -> f32 {
        if logit.is_nan() { f32::NEG_INFINITY } else { below(logit, self.most) - self.log_sum }
    }
}

/// The difference to the largest logit, 0 for infinities that are equal to it.
fn below(logit: f32, most: f32) -> f32 {
    if logit == most { 0.0 } else { logit - most }
}

/// The indices of the `count` largest logits, best first; of equals the lowest index; NaN is none of them.
fn likeliest(logits: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..logits.len()).filter(|index| !logits[*index].is_nan()).collect();
    let better = |a: &usize, b: &usize| {
        let by_value = logits[*b].partial_cmp(&logits[*a]).unwrap_or(Ordering::Equal);
        by_value.then(a.cmp(b))
    };
    if count > 0 && count < order.len() {
        order.select_nth_unstable_by(count - 1, better);
    }
    order.truncate(count);
    order.sort_unstable_by(better);
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::testing::refusal;
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
