//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::FillArgs;
use crate::float::byte_row;

pub(super) fn host(a: &FillArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    for t in 0..dims.grid[0] as usize {
        let row = byte_row(memory, a.x, a.stride_bytes, t, a.row_bytes)?;
        row.iter().zip(a.pattern.to_ne_bytes().iter().cycle()).for_each(|(byte, value)| byte.set(*value));
    }
    Ok(())
}
