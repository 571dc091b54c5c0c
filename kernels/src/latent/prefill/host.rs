//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::{CHECK, MlaPrefillArgs};
use crate::attention::check_plan;
use crate::float::{Float, dot, extend_f32, row};
use crate::latent::latent_kv::{Parts, attend};

pub(super) fn host<T: Float>(a: &MlaPrefillArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let (rows, sequences, heads) = (a.rows as usize, a.sequences as usize, a.heads as usize);
    let (nope_dim, value_dim, rope_dim) = (a.nope_dim as usize, a.value_dim as usize, a.kv.rope_dim());
    let (latent_dim, head_dim) = (a.kv.latent_dim(), nope_dim + rope_dim);
    let starts = memory.load::<i32>(a.cu_seqlens_q, sequences + 1)?;
    let kv_lens = memory.load::<i32>(a.kv_lens, sequences)?;
    check_plan(CHECK, &memory.load::<i32>(a.plan, 1 + 2 * a.plan_items as usize)?, &starts)?;
    let mut weight = vec![];
    let width = heads * (nope_dim + value_dim) * latent_dim;
    extend_f32(&mut weight, memory.view::<T>(a.weight, width)?);
    for b in 0..sequences {
        let (first, end) = (starts[b].max(0) as usize, (starts[b + 1].max(0) as usize).min(rows));
        if first >= end {
            continue;
        }
        let kv = a.kv.gather::<T>(memory, b, kv_lens[b])?;
        for (h, weight) in weight.chunks((nope_dim + value_dim) * latent_dim).enumerate() {
            let (of_keys, of_values) = weight.split_at(nope_dim * latent_dim);
            let nope = decompress::<T>(&kv.latents, of_keys, latent_dim);
            let values = decompress::<T>(&kv.latents, of_values, latent_dim);
            for t in first..end {
                let keys = i64::from(kv_lens[b]) - (i64::from(starts[b + 1]) - 1 - t as i64);
                let seen = kv.before[usize::try_from(keys).unwrap_or(0).min(kv.before.len() - 1)];
                let (mut q, mut q_pe) = (vec![], vec![]);
                let of_head = h * head_dim..h * head_dim + nope_dim;
                extend_f32(&mut q, &row::<T>(memory, a.q, a.q_stride, t, heads * head_dim)?[of_head]);
                extend_f32(&mut q_pe, row::<T>(memory, a.q_pe, rope_dim as i64, t * heads + h, rope_dim)?);
                let keys = Parts { nope: &nope[..seen * nope_dim], rope: &kv.rope_keys[..seen * rope_dim] };
                let mean = attend(Parts { nope: &q, rope: &q_pe }, keys, &values, value_dim, a.scale);
                let out = row::<T>(memory, a.out, value_dim as i64, t * heads + h, value_dim)?;
                out.iter().zip(mean).for_each(|(out, value)| out.set(T::from_f32(value)));
            }
        }
    }
    Ok(())
}

/// Multiplies each latent with the rows of a weight.
pub(super) fn decompress<T: Float>(latents: &[f32], weight: &[f32], latent_dim: usize) -> Vec<f32> {
    let of_latent = |latent| weight.chunks(latent_dim).map(move |row| T::round(dot(latent, row)));
    latents.chunks(latent_dim).flat_map(of_latent).collect()
}
