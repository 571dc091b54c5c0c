//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::GatherRowsArgs;
use crate::float::{byte_row, copy_cells};

pub(super) fn host(a: &GatherRowsArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let index = memory.view::<i32>(a.index, dims.grid[0] as usize)?;
    for (b, row) in index.iter().enumerate() {
        let out = byte_row(memory, a.out, a.row_bytes, b, a.row_bytes)?;
        match usize::try_from(i64::from(row.get()) - a.first_row) {
            Ok(row) if (row as i64) < a.x_rows => {
                copy_cells(out, byte_row(memory, a.x, a.x_stride_bytes, row, a.row_bytes)?);
            }
            _ => out.iter().for_each(|byte| byte.set(0)),
        }
    }
    Ok(())
}
