//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::UnpackInputsArgs;
use crate::float::row;

pub(super) fn host(a: &UnpackInputsArgs, _dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let tokens = memory.view::<i32>(a.tokens, a.rows as usize)?;
    let chosen = memory.load::<i32>(a.chosen, a.num_chosen as usize)?;
    for token in tokens.iter().filter(|token| token.get() < 0) {
        token.set(chosen.get((-1 - token.get()) as usize).copied().unwrap_or(0));
    }
    let width = a.width as usize;
    let packed = memory.load::<i32>(a.packed, a.sequences as usize * width)?;
    for (s, pages) in packed.chunks(width.max(1)).enumerate() {
        let out = row::<i32>(memory, a.page_table, a.table_stride, s, width)?;
        out.iter().zip(pages).for_each(|(out, &page)| out.set(page));
    }
    Ok(())
}
