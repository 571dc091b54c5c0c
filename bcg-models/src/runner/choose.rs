//! The end of a step: from logits to tokens, and what was asked for about them.

use bcg_runtime::{Eager, Readback, Runner, Tensor};

use super::SampledToken;
use crate::batch::{ForwardBatch, SamplingBuffers, SequenceInput};
use crate::ops::{self, SampleInputs};

/// Chooses the token of each row, the most likely one without parameters.
pub(super) fn choose(
    cx: &mut Eager<'_, ForwardBatch>,
    logits: &Tensor,
    sampling: Option<&SamplingBuffers>,
) -> bcg_runtime::Result<Tensor> {
    match sampling {
        None => ops::argmax(cx, logits),
        Some(sampling) => sample(cx, logits, sampling),
    }
}

/// Bytes that come back from a step of `sequences`.
pub(super) fn readback_bytes(sequences: usize) -> usize {
    sequences * size_of::<i32>()
}

/// A step that was launched and whose tokens the host has not read.
#[derive(Debug)]
pub struct PendingStep {
    readback: Readback,
    /// `[B, V]`; of the forward's arena, so they go with the next launch.
    logits: Tensor,
    rows: Vec<Wanted>,
}

/// What was asked for of a row, beside its token.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    top_logprobs: Option<usize>,
    logits: bool,
}

impl PendingStep {
    pub(super) fn new(readback: Readback, logits: Tensor, batch: &[SequenceInput<'_>]) -> Self {
        let wanted =
            |sequence: &SequenceInput<'_>| Wanted { top_logprobs: sequence.top_logprobs, logits: sequence.logits };
        Self { readback, logits, rows: batch.iter().map(wanted).collect() }
    }

    /// Waits for the tokens and reads them, and what else was asked for.
    pub(super) fn read(&self, runner: &mut Runner) -> bcg_runtime::Result<Vec<SampledToken>> {
        let ids = self.readback.read::<i32>(0)?;
        let mut tokens = Vec::with_capacity(ids.len());
        for (row, (id, wanted)) in ids.into_iter().zip(&self.rows).enumerate() {
            let mut token = SampledToken { id: id.cast_unsigned(), logprob: None, top: Vec::new(), logits: None };
            if wanted.logits || wanted.top_logprobs.is_some() {
                let logits = runner.read::<f32>(&self.logits.rows(row..row + 1)?)?;
                if let Some(count) = wanted.top_logprobs {
                    let log_softmax = LogSoftmax::new(&logits);
                    let with_logprob = |id: u32| (id, log_softmax.of(logits[id as usize]));
                    token.logprob = Some(with_logprob(token.id).1);
                    token.top = most_likely(&logits, count).into_iter().map(with_logprob).collect();
                }
                token.logits = wanted.logits.then_some(logits);
            }
            tokens.push(token);
        }
        Ok(tokens)
    }

    pub(super) fn into_readback(self) -> Readback {
        self.readback
    }
}

pub(super) fn sample(
    cx: &mut Eager<'_, ForwardBatch>,
    logits: &Tensor,
    sampling: &SamplingBuffers,
) -> bcg_runtime::Result<Tensor> {
    let inputs = SampleInputs {
        temperature: &sampling.temperature,
        top_k: &sampling.top_k,
        top_p: &sampling.top_p,
        min_p: &sampling.min_p,
        seed: &sampling.seed,
        step: &sampling.step,
    };
    ops::sample(cx, logits, &inputs)
}

/// What turns logits into log probabilities. Two terms, because their sum would round small differences away.
struct LogSoftmax {
    max: f32,
    log_sum: f32,
}

impl LogSoftmax {
    fn new(logits: &[f32]) -> Self {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let log_sum = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum::<f64>().ln() as f32;
        Self { max, log_sum }
    }

    fn of(&self, logit: f32) -> f32 {
        logit - self.max - self.log_sum
    }
}

/// The `count` largest logits' indices, best first; of equals the lowest index.
fn most_likely(logits: &[f32], count: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let count = count.min(order.len());
    let by_logit = |&a: &u32, &b: &u32| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b));
    if count > 0 && count < order.len() {
        order.select_nth_unstable_by(count - 1, by_logit);
    }
    order.truncate(count);
    order.sort_unstable_by(by_logit);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_likely_come_best_first() {
        let logits = [0.0, 3.0, 1.0, 3.0, -1.0];
        assert_eq!(most_likely(&logits, 3), [1, 3, 2]);
        assert_eq!(most_likely(&logits, 0), [0_u32; 0]);
        assert_eq!(most_likely(&logits, 9), [1, 3, 2, 0, 4]);
    }

    #[test]
    fn log_probabilities_sum_to_one() {
        let logits = [1000.0, 999.0, 0.0];
        let log_softmax = LogSoftmax::new(&logits);
        let sum: f32 = logits.iter().map(|&logit| log_softmax.of(logit).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
    }
}
