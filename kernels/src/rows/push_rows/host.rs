//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::PushRowsArgs;
use crate::float::copy_cells;

pub(super) fn host(a: &PushRowsArgs, _dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let count = memory.load::<i32>(a.count, 1)?[0].clamp(0, a.runs_max) as usize;
    for run in memory.load::<i32>(a.runs, 4 * count)?.chunks_exact(4) {
        let [source, target, rows] = [run[0], run[1], run[2]].map(i64::from);
        let is_outside = source < 0
            || target < 0
            || !(0..=a.rows_max).contains(&rows)
            || source + rows > a.source_rows
            || target + rows > a.target_rows;
        if is_outside {
            continue;
        }
        for (from, to, row_bytes) in
            [(a.first_source, a.first_target, a.first_bytes), (a.second_source, a.second_target, a.second_bytes)]
        {
            let view =
                |ptr, row: i64| memory.view_at::<u8>(ptr, (row * row_bytes) as usize, (rows * row_bytes) as usize);
            copy_cells(view(to, target)?, view(from, source)?);
        }
    }
    Ok(())
}
