//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::{AttentionDecodeArgs, CHECK};
use crate::attention::decode_plan::DecodePlan;
use crate::float::{Float, extend_f32, row};

/// Checks the plan, then attends as [`host`] does.
pub(super) fn host_tiled<T: Float>(a: &AttentionDecodeArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let kv_lens = memory.load::<i32>(a.kv_lens, a.sequences as usize)?;
    let decode_plan = DecodePlan::of_grid(dims.grid[0] as usize, a.q_heads as usize, a.kv.kv_heads());
    decode_plan.check(CHECK, memory, a.plan, &kv_lens)?;
    host::<T>(a, dims, memory)
}

pub(super) fn host<T: Float>(a: &AttentionDecodeArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let (sequences, q_heads) = (a.sequences as usize, a.q_heads as usize);
    let (head_dim, kv_heads) = (a.kv.head_dim(), a.kv.kv_heads());
    let kv_lens = memory.load::<i32>(a.kv_lens, sequences)?;
    let mut query = Vec::with_capacity(head_dim);
    for (b, kv_len) in kv_lens.into_iter().enumerate() {
        let q = row::<T>(memory, a.q, a.q_stride, b, q_heads * head_dim)?;
        let out = row::<T>(memory, a.out, (q_heads * head_dim) as i64, b, q_heads * head_dim)?;
        let group = q_heads / kv_heads * head_dim;
        for (kv_head, (out, q)) in out.chunks(group).zip(q.chunks(group)).enumerate() {
            let kv = a.kv.gather::<T>(memory, b, kv_head, kv_len)?;
            for (out, q) in out.chunks(head_dim).zip(q.chunks(head_dim)) {
                query.clear();
                extend_f32(&mut query, q);
                let mean = kv.attend(&query, kv_len.into(), a.scale);
                out.iter().zip(mean).for_each(|(out, value)| out.set(T::from_f32(value)));
            }
        }
    }
    Ok(())
}
