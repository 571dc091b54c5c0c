//! The end of a step: from logits to tokens, and what was asked for about them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bcg_kernels::{self as ops, SampleInputs};
use bcg_runtime::{DType, Device, Eager, Element, Readback, Result, Runner, Tensor};

use super::SampledToken;
use super::rank::Launched;
use super::staged::StagedChoice;
use crate::batch::{ForwardBatch, SamplingBuffers, SequenceInput};

/// The most alternatives of a token whose log probabilities a step returns.
pub const TOP_LOGPROBS_MAX: usize = 20;

/// Applies what sequences ask of their logits: a bias, then a mask.
pub(super) fn adjust(cx: &mut Eager<'_, ForwardBatch>, logits: &Tensor, asked: &StagedChoice) -> Result<()> {
    let biases = asked.bias_rows.len();
    if biases > 0 {
        let (rows, tokens) = (uploaded(cx, &[biases], &asked.bias_rows)?, uploaded(cx, &[biases], &asked.bias_tokens)?);
        let values = uploaded(cx, &[biases], &asked.bias_values)?;
        ops::logit_bias(cx, logits, &rows, &tokens, &values)?;
    }
    let masks = asked.mask_rows.len();
    if masks > 0 {
        let words = logits.dim(1).div_ceil(32);
        let mask = uploaded(cx, &[masks, words], &asked.mask_words)?;
        let rows = uploaded(cx, &[masks], &asked.mask_rows)?;
        ops::token_mask(cx, logits, &rows, &mask)?;
    }
    Ok(())
}

fn uploaded<T: Element>(cx: &mut Eager<'_, ForwardBatch>, shape: &[usize], values: &[T]) -> Result<Tensor> {
    let tensor = cx.empty(shape, T::DTYPE)?;
    cx.upload(&tensor, values)?;
    Ok(tensor)
}

/// Chooses the token of each row, the most likely one without parameters, and leaves them in `chosen`.
pub(super) fn choose(
    cx: &mut Eager<'_, ForwardBatch>,
    logits: &Tensor,
    sampling: Option<&SamplingBuffers>,
    chosen: &Tensor,
) -> Result<()> {
    let Some(sampling) = sampling else { return ops::argmax_to(cx, logits, chosen) };
    let inputs = SampleInputs {
        temperature: &sampling.temperature,
        top_k: &sampling.top_k,
        top_p: &sampling.top_p,
        min_p: &sampling.min_p,
        seed: &sampling.seed,
        step: &sampling.step,
    };
    ops::sample_to(cx, logits, &inputs, chosen)
}

/// Log probabilities of the sequences that ask for them: ids and values, `[R, 1 + n]`, the chosen token first.
pub(super) fn logprobs(
    cx: &mut Eager<'_, ForwardBatch>,
    logits: &Tensor,
    chosen: &Tensor,
    asked: &StagedChoice,
) -> Result<Option<(Tensor, Tensor)>> {
    if asked.logprob_rows.is_empty() {
        return Ok(None);
    }
    let rows = uploaded(cx, &[asked.logprob_rows.len()], &asked.logprob_rows)?;
    ops::top_logprobs(cx, logits, &rows, chosen, asked.most_logprobs).map(Some)
}

/// Bytes that come back from a step of `sequences` at most.
fn readback_bytes(sequences: usize) -> usize {
    let pairs = sequences * (1 + TOP_LOGPROBS_MAX);
    // Each of the three tensors is rounded up.
    sequences * DType::I32.size_bytes() + pairs * (DType::I32.size_bytes() + DType::F32.size_bytes()) + 64
}

/// Steps whose tokens the host has not read, at most, of a world of several ranks or of a pipeline of so many stages: one in
/// each stage, and one ahead. No page-locked memory is allocated once the ranks work together, since that waits for devices
/// that wait for each other (law L14).
pub(super) fn pending_max(num_stages: usize) -> usize {
    num_stages + 1
}

/// Host memory for chosen tokens that no step uses now. All clones share it.
#[derive(Debug, Clone)]
pub(super) struct Readbacks {
    free: Arc<Mutex<Vec<Readback>>>,
    bytes: usize,
    /// If these are all there will be, how many.
    bound: Option<usize>,
}

impl Readbacks {
    /// Makes those of so many stages of so many ranks each: all there will be, unless there is one rank in all.
    pub(super) fn new(device: &Device, sequences: usize, [num_stages, num_ranks]: [usize; 2]) -> Result<Self> {
        let bytes = readback_bytes(sequences);
        let bound = (num_stages * num_ranks > 1).then(|| pending_max(num_stages));
        let free = (0..bound.unwrap_or(0)).map(|_| Readback::new(device, bytes));
        Ok(Self { free: Arc::new(Mutex::new(free.collect::<Result<_>>()?)), bytes, bound })
    }

    /// Refuses another step while all of a bounded number are on their way.
    pub(super) fn check_room(&self) -> crate::Result<()> {
        match self.bound.filter(|_| self.lock().is_empty()) {
            Some(bound) => {
                Err(crate::Error::batch("launched steps", format!("at most {bound} not collected"), bound + 1))
            }
            None => Ok(()),
        }
    }

    /// Takes one for a step.
    pub(super) fn take(&self, device: &Device) -> Result<Readback> {
        let free = self.lock().pop();
        free.map_or_else(|| Readback::new(device, self.bytes), Ok)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Readback>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A step that was launched and whose tokens the host has not read.
#[derive(Debug)]
pub struct PendingStep {
    /// `None` once it is given back.
    readback: Option<Readback>,
    readbacks: Readbacks,
    /// `[B, V]`, if any sequence asks for them. They lie in the arena of the forward, so the next launch overwrites
    /// them.
    logits: Option<Tensor>,
    rows: Vec<Asked>,
}

/// What was asked for of a row, beside its token.
#[derive(Debug, Clone, Copy)]
struct Asked {
    top_logprobs: Option<usize>,
    logits: bool,
}

impl PendingStep {
    pub(super) fn new(launched: Launched, readbacks: Readbacks, batch: &[SequenceInput<'_>]) -> Self {
        let asked =
            |sequence: &SequenceInput<'_>| Asked { top_logprobs: sequence.top_logprobs, logits: sequence.logits };
        let rows: Vec<Asked> = batch.iter().map(asked).collect();
        let logits = rows.iter().any(|row| row.logits).then_some(launched.logits);
        Self { readback: launched.readback, readbacks, logits, rows }
    }

    /// Waits for the tokens and reads them, and what else was asked for.
    pub(super) fn read(&self, runner: &mut Runner) -> Result<Vec<SampledToken>> {
        let Some(readback) = &self.readback else { return Ok(Vec::new()) };
        let ids = readback.read::<i32>(0)?;
        let asking = self.rows.iter().filter(|row| row.top_logprobs.is_some()).count();
        let (top_ids, top_values) = match asking {
            0 => (Vec::new(), Vec::new()),
            _ => (readback.read::<i32>(1)?, readback.read::<f32>(2)?),
        };
        let width = top_ids.len() / asking.max(1);
        let mut tops = top_ids.chunks(width.max(1)).zip(top_values.chunks(width.max(1)));
        let mut tokens = Vec::with_capacity(ids.len());
        for (row, (id, asked)) in ids.into_iter().zip(&self.rows).enumerate() {
            let mut token = SampledToken { id: id.cast_unsigned(), logprob: None, top: Vec::new(), logits: None };
            if let Some(count) = asked.top_logprobs
                && let Some((ids, values)) = tops.next()
            {
                token.logprob = values.first().copied();
                let pairs = ids.iter().zip(values).skip(1).take(count);
                // A vocabulary, or what a mask leaves of it, may be smaller than the count.
                let pairs = pairs.filter(|&(&id, &value)| id >= 0 && value > f32::NEG_INFINITY);
                token.top = pairs.map(|(&id, &value)| (id.cast_unsigned(), value)).collect();
            }
            if asked.logits
                && let Some(logits) = &self.logits
            {
                token.logits = Some(runner.read::<f32>(&logits.rows(row..row + 1)?)?);
            }
            tokens.push(token);
        }
        Ok(tokens)
    }
}

impl Drop for PendingStep {
    /// Gives the host memory back, also of a step that nobody collects: the next copy into it comes after its own.
    fn drop(&mut self) {
        self.readbacks.lock().extend(self.readback.take());
    }
}
