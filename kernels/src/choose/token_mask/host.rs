//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::TokenMaskArgs;
use crate::float::row;

pub(super) fn host(a: &TokenMaskArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    for (r, b) in memory.load::<i32>(a.rows, dims.grid[0] as usize)?.into_iter().enumerate() {
        let b = b.cast_unsigned(); // a negative one is large
        if b >= a.num_rows {
            continue;
        }
        let mask = row::<i32>(memory, a.mask, i64::from(a.words), r, a.words as usize)?;
        let logits = row::<f32>(memory, a.logits, a.stride, b as usize, a.columns as usize)?;
        for (logits, word) in logits.chunks(32).zip(mask) {
            for (bit, logit) in logits.iter().enumerate() {
                if word.get() >> bit & 1 == 0 {
                    logit.set(f32::NEG_INFINITY);
                }
            }
        }
    }
    Ok(())
}
