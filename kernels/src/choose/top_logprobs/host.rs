//! The host reference, which says what the kernel computes.

use std::cell::Cell;
use std::cmp::Ordering;

use bcg_runtime::{Dims, HostMemory, Result};

use super::TopLogprobsArgs;
use crate::choose::logits;
use crate::float::row;

pub(super) fn host(a: &TopLogprobsArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
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
pub(super) struct LogSoftmax {
    most: f32,
    log_sum: f32,
}

impl LogSoftmax {
    pub(super) fn new(logits: &[f32]) -> Self {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max); // of a number and NaN, the number
        let weights = logits.iter().filter(|logit| !logit.is_nan()).map(|logit| f64::from(below(*logit, most)).exp());
        Self { most, log_sum: weights.sum::<f64>().ln() as f32 }
    }

    pub(super) fn of(&self, logit: f32) -> f32 {
        if logit.is_nan() { f32::NEG_INFINITY } else { below(logit, self.most) - self.log_sum }
    }
}

/// The difference to the largest logit, 0 for infinities that are equal to it.
pub(super) fn below(logit: f32, most: f32) -> f32 {
    if logit == most { 0.0 } else { logit - most }
}

/// The indices of the `count` largest logits, best first; of equals the lowest index; NaN is none of them.
pub(super) fn likeliest(logits: &[f32], count: usize) -> Vec<usize> {
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
