//! What a rank sends to another: rows of 16-byte packs, in parts that fit into the plane.

use std::cell::Cell;

use bcg_runtime::{DType, Dims, OpStream, Result};

use crate::check::Check;
use crate::float::{Float, pack_len};

/// The bytes of a pack, which one store sends.
const PACK_BYTES: usize = 16;

/// Rows that one rank sends to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) rows: u32,
    pub(super) columns: u32,
    /// The packs of all rows: a row begins with a pack of its own.
    pub(super) packs: u32,
}

/// Some packs of a message, sent by one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) first: u32,
    pub(super) packs: u32,
}

impl Message {
    /// Describes rows. Where they lie in memory without gaps, on this rank, they are taken as one long row: the packs are
    /// the same.
    ///
    /// # Errors
    /// A shape error for more elements than kernels count.
    pub(super) fn new(check: Check, rows: usize, columns: usize, dtype: DType, is_dense: bool) -> Result<Self> {
        let elements = check.u32("elements of a message", rows * columns)?;
        let len = pack_len(dtype);
        let packs = check.u32("16-byte packs of a message", rows * columns.div_ceil(len))?;
        if is_dense && columns.is_multiple_of(len) {
            return Ok(Self { rows: 1, columns: elements, packs });
        }
        Ok(Self { rows: check.u32("rows", rows)?, columns: check.u32("columns", columns)?, packs })
    }

    /// Cuts the message into parts of at most `packs_max`.
    pub(super) fn parts(self, packs_max: u32) -> impl Iterator<Item = Part> {
        let starts = (0..self.packs).step_by(packs_max as usize);
        starts.map(move |first| Part { first, packs: packs_max.min(self.packs - first) })
    }
}

/// The packs that one rank can send to another in one launch.
pub(super) fn slot_packs(cx: &OpStream) -> u32 {
    let packs = cx.slot_bytes() / PACK_BYTES;
    u32::try_from(packs).unwrap_or(u32::MAX)
}

/// The grid of a launch whose threads each begin with one of so many packs, of at most `blocks_max` blocks
/// ([`OpStream::collective_blocks_max`]); of these two alone, so the same on all ranks.
pub(super) fn grid(packs: u32, blocks_max: usize) -> Dims {
    const FEW: u32 = 128;
    const MANY: u32 = 512;
    /// More packs than these, 256 KiB, are sent by blocks of many threads.
    const FEW_PACKS_MAX: u32 = 1 << 14;
    /// More blocks are no faster: measured on two H200s, for 8 and 16 MiB.
    const BLOCKS_USEFUL: usize = 128;
    let threads = if packs <= FEW_PACKS_MAX { FEW } else { MANY };
    Dims::linear(packs.div_ceil(threads).min(blocks_max.min(BLOCKS_USEFUL) as u32), threads)
}

/// Appends the bytes of a row on the host device, as they are given to the other ranks.
pub(super) fn give_row<T: Float>(bytes: &mut Vec<u8>, row: &[Cell<T>]) {
    for value in row {
        bytes.extend_from_slice(bytemuck::bytes_of(&value.get()));
    }
}

/// Reads an element of what a rank gave.
pub(super) fn given<T: Float>(bytes: &[u8], index: usize) -> T {
    bytemuck::pod_read_unaligned(&bytes[index * size_of::<T>()..][..size_of::<T>()])
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHECK: Check = Check::new("message");

    #[test]
    fn parts_cover_a_message_once() -> Result<()> {
        let message = Message::new(CHECK, 3, 20, DType::Bf16, true)?;
        assert_eq!(message, Message { rows: 3, columns: 20, packs: 9 }, "rows of no whole packs stay apart");
        let parts: Vec<(u32, u32)> = message.parts(4).map(|part| (part.first, part.packs)).collect();
        assert_eq!(parts, [(0, 4), (4, 4), (8, 1)]);
        assert_eq!(Message::new(CHECK, 0, 20, DType::Bf16, true)?.parts(4).count(), 0);
        Ok(())
    }

    #[test]
    fn packs_do_not_depend_on_gaps_between_rows() -> Result<()> {
        for columns in [8, 12, 16] {
            let dense = Message::new(CHECK, 5, columns, DType::F16, true)?;
            let sliced = Message::new(CHECK, 5, columns, DType::F16, false)?;
            assert_eq!(dense.packs, sliced.packs);
        }
        Ok(())
    }

    #[test]
    fn a_grid_has_threads_for_all_packs_and_no_more_blocks_than_fit() {
        for packs in [1, 127, 128, 129, 16_384, 16_385, 40_000, 1 << 20, u32::MAX] {
            for blocks_max in [8, 132, 256] {
                let dims = grid(packs, blocks_max);
                assert!((1..=blocks_max as u32).contains(&dims.grid[0]) && dims.block[0] <= 512);
                assert!(dims.grid[0] as usize == blocks_max.min(128) || dims.grid[0] * dims.block[0] >= packs);
            }
        }
    }
}
