//! The host reference, which says what the kernel computes.

use std::cell::Cell;

use bcg_runtime::{Dims, HostMemory, Result};

use super::QkNormRopeKvWriteArgs;
use crate::float::{Float, copy_cells, row};
use crate::norm::rms::rms_scale;

pub(super) fn host<T: Float>(a: &QkNormRopeKvWriteArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let (tokens, q_heads, kv_heads) = (dims.grid[0] as usize, a.q_heads as usize, a.kv_heads as usize);
    let (head_dim, page_size) = (a.head_dim as usize, a.page_size as usize);
    let q_weight = memory.view::<T>(a.q_weight, head_dim)?;
    let k_weight = memory.view::<T>(a.k_weight, head_dim)?;
    let inv_freq = memory.view::<f32>(a.inv_freq, head_dim / 2)?;
    let positions = memory.view::<i32>(a.positions, tokens)?;
    let slots = memory.view::<i32>(a.slots, tokens)?;
    for t in 0..tokens {
        let turns: Vec<(f32, f32)> = inv_freq.iter().map(|f| (positions[t].get() as f32 * f.get()).sin_cos()).collect();
        let qkv = row::<T>(memory, a.qkv, a.qkv_stride, t, (q_heads + 2 * kv_heads) * head_dim)?;
        let (q, kv) = qkv.split_at(q_heads * head_dim);
        let (k, v) = kv.split_at(kv_heads * head_dim);
        let q_out = row::<T>(memory, a.q_out, (q_heads * head_dim) as i64, t, q_heads * head_dim)?;
        for (out, head) in q_out.chunks(head_dim).zip(q.chunks(head_dim)) {
            norm_rope(out, head, q_weight, &turns, a.eps);
        }
        let Ok(slot) = usize::try_from(slots[t].get()) else { continue };
        if slot >= a.num_pages as usize * page_size {
            continue;
        }
        let width = kv_heads * head_dim;
        let place = slot / page_size * a.page_stride as usize + slot % page_size * width;
        let k_out = memory.view_at::<T>(a.k_cache, place, width)?;
        for (out, head) in k_out.chunks(head_dim).zip(k.chunks(head_dim)) {
            norm_rope(out, head, k_weight, &turns, a.eps);
        }
        copy_cells(memory.view_at::<T>(a.v_cache, place, width)?, v);
    }
    Ok(())
}

/// Normalises one head and turns each pair by its (sine, cosine).
pub(super) fn norm_rope<T: Float>(
    out: &[Cell<T>],
    head: &[Cell<T>],
    weight: &[Cell<T>],
    turns: &[(f32, f32)],
    eps: f32,
) {
    let half = head.len() / 2;
    let scale = rms_scale(head, eps);
    let normed = |i: usize| T::round(T::round(head[i].get().to_f32() * scale) * weight[i].get().to_f32());
    for (i, (sine, cosine)) in turns.iter().enumerate() {
        let (low, high) = (normed(i), normed(i + half));
        out[i].set(T::from_f32(low * cosine - high * sine));
        out[i + half].set(T::from_f32(high * cosine + low * sine));
    }
}
