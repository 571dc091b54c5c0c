//! The end of a step: from logits to tokens, and what was asked for about them.

use bcg_kernels::{self as ops, SampleInputs};
use bcg_runtime::{DType, Eager, Element, Readback, Result, Runner, Tensor};

use super::SampledToken;
use crate::batch::{ForwardBatch, SamplingBuffers, SequenceInput};

/// The most alternatives of a token whose log probabilities a step returns.
pub const TOP_LOGPROBS_MAX: usize = 20;

/// Applies what sequences ask of their logits: a bias, then a mask.
pub(super) fn adjust(cx: &mut Eager<'_, ForwardBatch>, logits: &Tensor, batch: &[SequenceInput<'_>]) -> Result<()> {
    let biases = batch.iter().enumerate().flat_map(|(row, sequence)| {
        sequence.logit_bias.iter().map(move |&(token, value)| (row as i32, token.cast_signed(), value))
    });
    let (mut rows, mut tokens, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for (row, token, value) in biases {
        rows.push(row);
        tokens.push(token);
        values.push(value);
    }
    if !rows.is_empty() {
        let (rows, tokens) = (uploaded(cx, &[rows.len()], &rows)?, uploaded(cx, &[rows.len()], &tokens)?);
        let values = uploaded(cx, &[values.len()], &values)?;
        ops::logit_bias(cx, logits, &rows, &tokens, &values)?;
    }
    let masks = batch.iter().zip(0..).filter_map(|(sequence, row)| Some((row, sequence.token_mask?)));
    let (rows, masks): (Vec<i32>, Vec<&[u32]>) = masks.unzip();
    if !rows.is_empty() {
        let words = logits.dim(1).div_ceil(32);
        let mask: Vec<i32> = masks.concat().into_iter().map(u32::cast_signed).collect();
        let (mask, rows) = (uploaded(cx, &[rows.len(), words], &mask)?, uploaded(cx, &[rows.len()], &rows)?);
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
    batch: &[SequenceInput<'_>],
) -> Result<Option<(Tensor, Tensor)>> {
    let asking = batch.iter().zip(0..).filter_map(|(sequence, row)| Some((row, sequence.top_logprobs?)));
    let (rows, counts): (Vec<i32>, Vec<usize>) = asking.unzip();
    let Some(&most) = counts.iter().max() else { return Ok(None) };
    let rows = uploaded(cx, &[rows.len()], &rows)?;
    ops::top_logprobs(cx, logits, &rows, chosen, most).map(Some)
}

/// Bytes that come back from a step of `sequences` at most.
pub(super) fn readback_bytes(sequences: usize) -> usize {
    let pairs = sequences * (1 + TOP_LOGPROBS_MAX);
    // Each of the three tensors is rounded up.
    sequences * DType::I32.size_bytes() + pairs * (DType::I32.size_bytes() + DType::F32.size_bytes()) + 64
}

/// A step that was launched and whose tokens the host has not read.
#[derive(Debug)]
pub struct PendingStep {
    readback: Readback,
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
    pub(super) fn new(readback: Readback, logits: Tensor, batch: &[SequenceInput<'_>]) -> Self {
        let asked =
            |sequence: &SequenceInput<'_>| Asked { top_logprobs: sequence.top_logprobs, logits: sequence.logits };
        let rows: Vec<Asked> = batch.iter().map(asked).collect();
        let logits = rows.iter().any(|row| row.logits).then_some(logits);
        Self { readback, logits, rows }
    }

    /// Waits for the tokens and reads them, and what else was asked for.
    pub(super) fn read(&self, runner: &mut Runner) -> Result<Vec<SampledToken>> {
        let ids = self.readback.read::<i32>(0)?;
        let asking = self.rows.iter().filter(|row| row.top_logprobs.is_some()).count();
        let (top_ids, top_values) = match asking {
            0 => (Vec::new(), Vec::new()),
            _ => (self.readback.read::<i32>(1)?, self.readback.read::<f32>(2)?),
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

    pub(super) fn into_readback(self) -> Readback {
        self.readback
    }
}
