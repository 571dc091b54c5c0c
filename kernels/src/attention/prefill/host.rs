//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::{AttentionPrefillArgs, CHECK, PLAN_ROWS};
use crate::check::Check;
use crate::float::{Float, extend_f32, row};

pub(super) fn host<T: Float>(a: &AttentionPrefillArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let (rows, sequences, q_heads) = (a.rows as usize, a.sequences as usize, a.q_heads as usize);
    let (head_dim, kv_heads) = (a.kv.head_dim(), a.kv.kv_heads());
    let starts = memory.load::<i32>(a.cu_seqlens_q, sequences + 1)?;
    let kv_lens = memory.load::<i32>(a.kv_lens, sequences)?;
    check_plan(CHECK, &memory.load::<i32>(a.plan, 1 + 2 * a.plan_items as usize)?, &starts)?;
    let mut query = Vec::with_capacity(head_dim);
    for b in 0..sequences {
        let (first, end) = (starts[b].max(0) as usize, (starts[b + 1].max(0) as usize).min(rows));
        for kv_head in 0..if first < end { kv_heads } else { 0 } {
            let kv = a.kv.gather::<T>(memory, b, kv_head, kv_lens[b])?;
            for t in first..end {
                let q = row::<T>(memory, a.q, a.q_stride, t, q_heads * head_dim)?;
                let out = row::<T>(memory, a.out, (q_heads * head_dim) as i64, t, q_heads * head_dim)?;
                let keys = i64::from(kv_lens[b]) - (i64::from(starts[b + 1]) - 1 - t as i64);
                let group = q_heads / kv_heads * head_dim;
                let range = kv_head * group..(kv_head + 1) * group;
                for (out, q) in out[range.clone()].chunks(head_dim).zip(q[range].chunks(head_dim)) {
                    query.clear();
                    extend_f32(&mut query, q);
                    let mean = kv.attend(&query, keys, a.scale);
                    out.iter().zip(mean).for_each(|(out, value)| out.set(T::from_f32(value)));
                }
            }
        }
    }
    Ok(())
}

/// Refuses a plan whose items are not each row of each sequence once: the CUDA kernels would skip rows or write twice.
pub(crate) fn check_plan(check: Check, plan: &[i32], starts: &[i32]) -> Result<()> {
    let count = plan[0].max(0) as usize;
    let (items, _) = plan[1..].as_chunks::<2>();
    let mut found: Vec<_> = items[..count.min(items.len())].to_vec();
    found.sort_unstable();
    let of_sequence = |(b, starts): (usize, &[i32])| {
        (starts[0]..starts[1]).step_by(PLAN_ROWS).map(move |row| [b as i32, row]).collect::<Vec<_>>()
    };
    let expected: Vec<_> = starts.windows(2).enumerate().flat_map(of_sequence).collect();
    if found == expected {
        return Ok(());
    }
    Err(check.error("`plan` of this batch, by attention_prefill_plan", format!("{count} items {found:?}")))
}
