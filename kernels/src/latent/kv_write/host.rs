//! The host reference, which says what the kernel computes.

use std::cell::Cell;

use bcg_runtime::{Dims, HostMemory, Result};

use super::MlaKvWriteArgs;
use crate::float::{Float, row};
use crate::norm::rms::rms_scale;

pub(super) fn host<T: Float>(a: &MlaKvWriteArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let (tokens, heads, head_dim) = (dims.grid[0] as usize, a.heads as usize, a.head_dim as usize);
    let (latent_dim, rope_dim, page_size) = (a.latent_dim as usize, a.rope_dim as usize, a.page_size as usize);
    let weight = memory.view::<T>(a.weight, latent_dim)?;
    let inv_freq = memory.view::<f32>(a.inv_freq, rope_dim / 2)?;
    let positions = memory.view::<i32>(a.positions, tokens)?;
    let slots = memory.view::<i32>(a.slots, tokens)?;
    for t in 0..tokens {
        let turn = |freq: &Cell<f32>| {
            let (sine, cosine) = (positions[t].get() as f32 * freq.get()).sin_cos();
            (sine * a.rope_scale, cosine * a.rope_scale)
        };
        let turns: Vec<(f32, f32)> = inv_freq.iter().map(turn).collect();
        let q = row::<T>(memory, a.q, a.q_stride, t, heads * head_dim)?;
        let q_pe = row::<T>(memory, a.q_pe, (heads * rope_dim) as i64, t, heads * rope_dim)?;
        for (out, head) in q_pe.chunks(rope_dim).zip(q.chunks(head_dim)) {
            rotate(out, &head[head_dim - rope_dim..], &turns, a.is_interleaved != 0);
        }
        let Ok(slot) = usize::try_from(slots[t].get()) else { continue };
        if slot >= a.num_pages as usize * page_size {
            continue;
        }
        let place = |stride: i64, dim: usize| slot / page_size * stride as usize + slot % page_size * dim;
        let (latent, rope_key) =
            row::<T>(memory, a.kv_a, a.kv_a_stride, t, latent_dim + rope_dim)?.split_at(latent_dim);
        let scale = rms_scale(latent, a.eps);
        let out = memory.view_at::<T>(a.latents, place(a.latent_page_stride, latent_dim), latent_dim)?;
        for ((out, x), weight) in out.iter().zip(latent).zip(weight) {
            out.set(T::from_f32(T::round(x.get().to_f32() * scale) * weight.get().to_f32()));
        }
        let out = memory.view_at::<T>(a.rope_keys, place(a.rope_page_stride, rope_dim), rope_dim)?;
        rotate(out, rope_key, &turns, a.is_interleaved != 0);
    }
    Ok(())
}

/// Turns each pair of a rope part by its (sine, cosine).
pub(super) fn rotate<T: Float>(out: &[Cell<T>], part: &[Cell<T>], turns: &[(f32, f32)], is_interleaved: bool) {
    for (i, (sine, cosine)) in turns.iter().enumerate() {
        let (first, second) = if is_interleaved { (2 * i, 2 * i + 1) } else { (i, i + turns.len()) };
        let (x, y) = (part[first].get().to_f32(), part[second].get().to_f32());
        out[first].set(T::from_f32(x * cosine - y * sine));
        out[second].set(T::from_f32(y * cosine + x * sine));
    }
}
