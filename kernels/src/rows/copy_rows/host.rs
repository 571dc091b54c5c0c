//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::CopyRowsArgs;
use crate::float::{byte_row, copy_cells};

pub(super) fn host(a: &CopyRowsArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    for t in 0..dims.grid[0] as usize {
        let dst = byte_row(memory, a.dst, a.dst_stride_bytes, t, a.row_bytes)?;
        copy_cells(dst, byte_row(memory, a.src, a.src_stride_bytes, t, a.row_bytes)?);
    }
    Ok(())
}
