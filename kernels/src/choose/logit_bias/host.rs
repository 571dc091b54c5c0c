//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::LogitBiasArgs;
use crate::float::row;

pub(super) fn host(a: &LogitBiasArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let num = a.num_entries as usize;
    let (rows, tokens) = (memory.load::<i32>(a.rows, num)?, memory.load::<i32>(a.tokens, num)?);
    let values = memory.load::<f32>(a.values, num)?;
    for ((b, token), value) in rows.into_iter().zip(tokens).zip(values) {
        let (b, token) = (b.cast_unsigned(), token.cast_unsigned()); // a negative one is large
        if b < a.num_rows && token < a.columns {
            let logit = &row::<f32>(memory, a.logits, a.stride, b as usize, a.columns as usize)?[token as usize];
            logit.set(logit.get() + value);
        }
    }
    Ok(())
}
