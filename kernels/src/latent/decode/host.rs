//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};
use half::bf16;

use super::{CHECK, MlaDecodeArgs};
use crate::attention::decode_plan::DecodePlan;
use crate::float::{Float, extend_f32, row};
use crate::latent::latent_kv::{Parts, attend};

/// Checks the plan, then attends as [`host`] does.
pub(super) fn host_tiled(a: &MlaDecodeArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let kv_lens = memory.load::<i32>(a.kv_lens, a.sequences as usize)?;
    let decode_plan = DecodePlan::of_grid(dims.grid[0] as usize, a.heads as usize, 1);
    decode_plan.check(CHECK, memory, a.plan, &kv_lens)?;
    host::<bf16>(a, dims, memory)
}

pub(super) fn host<T: Float>(a: &MlaDecodeArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let (sequences, heads) = (a.sequences as usize, a.heads as usize);
    let (latent_dim, rope_dim) = (a.kv.latent_dim(), a.kv.rope_dim());
    let kv_lens = memory.load::<i32>(a.kv_lens, sequences)?;
    let (mut q_latent, mut q_pe) = (vec![], vec![]);
    for (b, kv_len) in kv_lens.into_iter().enumerate() {
        let kv = a.kv.gather::<T>(memory, b, kv_len)?;
        for row_idx in b * heads..(b + 1) * heads {
            q_latent.clear();
            extend_f32(&mut q_latent, row::<T>(memory, a.q_latent, latent_dim as i64, row_idx, latent_dim)?);
            q_pe.clear();
            extend_f32(&mut q_pe, row::<T>(memory, a.q_pe, rope_dim as i64, row_idx, rope_dim)?);
            let query = Parts { nope: &q_latent, rope: &q_pe };
            let keys = Parts { nope: &kv.latents, rope: &kv.rope_keys };
            let mean = attend(query, keys, &kv.latents, latent_dim, a.scale);
            let out = row::<T>(memory, a.out, latent_dim as i64, row_idx, latent_dim)?;
            out.iter().zip(mean).for_each(|(out, value)| out.set(T::from_f32(value)));
        }
    }
    Ok(())
}
