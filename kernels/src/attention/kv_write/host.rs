//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::KvWriteArgs;
use crate::float::{byte_row, copy_cells};

pub(super) fn host(a: &KvWriteArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let (tokens, page_size) = (dims.grid[0] as usize, a.page_size as usize);
    for (t, slot) in memory.load::<i32>(a.slots, tokens)?.into_iter().enumerate() {
        let Ok(slot) = usize::try_from(slot) else { continue };
        let (page, offset) = (slot / page_size, slot % page_size);
        if page >= a.num_pages as usize {
            continue;
        }
        for (from, stride, cache, page_bytes, bytes) in [
            (a.k, a.k_stride_bytes, a.k_cache, a.k_page_bytes, a.k_bytes),
            (a.v, a.v_stride_bytes, a.v_cache, a.v_page_bytes, a.v_bytes),
        ] {
            let place = page * page_bytes as usize + offset * bytes as usize;
            let to = memory.view_at::<u8>(cache, place, bytes as usize)?;
            copy_cells(to, byte_row(memory, from, stride, t, bytes)?);
        }
    }
    Ok(())
}
