//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::SampleArgs;
use crate::choose::argmax::largest;
use crate::choose::logits;
use crate::float::row;
use crate::random::{GOLDEN, mix};

pub(super) fn host(a: &SampleArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let rows = logits::rows(dims);
    let temperature = memory.load::<f32>(a.temperature, rows)?;
    let (top_k, top_p) = (memory.load::<i32>(a.top_k, rows)?, memory.load::<f32>(a.top_p, rows)?);
    let min_p = memory.load::<f32>(a.min_p, rows)?;
    let (seed, step) = (memory.load::<i64>(a.seed, rows)?, memory.load::<i64>(a.step, rows)?);
    let out = memory.view::<i32>(a.out, rows)?;
    for b in 0..rows {
        let logits = row::<f32>(memory, a.logits, a.stride, b, a.columns as usize)?;
        let scaled: Vec<f32> = if temperature[b] > 0.0 {
            logits.iter().map(|v| v.get() / temperature[b]).collect()
        } else {
            out[b].set(largest(logits.iter().map(std::cell::Cell::get).enumerate()));
            continue;
        };
        let kept = kept(&scaled, top_k[b], top_p[b], min_p[b]);
        let stream = mix((seed[b] as u64).wrapping_add(GOLDEN.wrapping_mul((step[b] as u64).wrapping_add(1))));
        out[b].set(largest(kept.into_iter().map(|token| {
            let gumbel = -(-uniform(stream, token).ln()).ln();
            (token, scaled[token] + gumbel)
        })));
    }
    Ok(())
}

/// The tokens that the filters keep, ascending.
pub(super) fn kept(scaled: &[f32], top_k: i32, top_p: f32, min_p: f32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scaled.len()).filter(|token| !scaled[*token].is_nan()).collect();
    order.sort_by(|a, b| scaled[*b].total_cmp(&scaled[*a]));
    let Some(&first) = order.first() else { return order };
    let max = scaled[first];
    let weight = |token: usize| if scaled[token] == max { 1.0 } else { (scaled[token] - max).exp() };
    if let Some(last) = usize::try_from(top_k).ok().and_then(|k| k.checked_sub(1)).and_then(|last| order.get(last)) {
        let least = scaled[*last];
        order.retain(|token| scaled[*token] >= least);
    }
    if top_p < 1.0 {
        let wanted = f64::from(top_p) * order.iter().map(|token| fixed(weight(*token))).sum::<u64>() as f64;
        let mut mass = 0;
        let reached = order.iter().position(|token| {
            mass += fixed(weight(*token));
            mass as f64 >= wanted
        });
        let least = reached.map_or(f32::NEG_INFINITY, |place| scaled[order[place]]);
        order.retain(|token| scaled[*token] >= least);
    }
    order.retain(|token| weight(*token) >= min_p || scaled[*token] == max);
    order.sort_unstable();
    order
}

/// A weight in 0..=1 as a whole number, so that sums of weights have no order.
pub(super) fn fixed(weight: f32) -> u64 {
    (f64::from(weight) * (1u64 << 44) as f64).round_ties_even() as u64
}

/// A number in (0, 1) for each stream and token, with 23 random bits.
pub(super) fn uniform(stream: u64, token: usize) -> f32 {
    let bits = mix(stream.wrapping_add(GOLDEN.wrapping_mul(token as u64 + 1))) >> 41;
    (bits as f32 + 0.5) * (1.0 / 8_388_608.0)
}
