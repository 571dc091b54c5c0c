//! Rows handed on as they are: what [`all_gather_columns`](super::all_gather_columns), [`all_gather_rows`](super::all_gather_rows),
//! [`all_to_all`](super::all_to_all()), [`broadcast`](super::broadcast()) and [`send_receive`](super::send_receive()) share.

use bcg_runtime::{CommunicatorArgs, DevicePtr, Dims, Given, HostMemory, Kernel, KernelArgs, OpStream, Result, Tensor};

use super::message::{Message, give_row, given, grid, slot_packs};
use crate::check::Check;
use crate::float::Float;

/// What `include/collective_gather.cuh` takes.
#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
pub(super) struct GatherArgs {
    pub(super) communicator: CommunicatorArgs,
    /// What goes to rank 0; to the others `x_step` elements apart, or the same to all if that is 0.
    pub(super) x: DevicePtr,
    /// What comes of rank 0; of the others `out_step` elements apart.
    pub(super) out: DevicePtr,
    pub(super) x_stride: i64,
    pub(super) x_step: i64,
    pub(super) out_stride: i64,
    pub(super) out_step: i64,
    pub(super) rows: u32,
    pub(super) columns: u32,
    /// The packs that this launch sends.
    pub(super) first_pack: u32,
    pub(super) packs: u32,
    /// A bit for each rank that `x` is sent to.
    pub(super) to_ranks: u32,
    /// A bit for each rank whose rows are taken; this rank's own are copied.
    pub(super) from_ranks: u32,
}

/// Rows that some ranks hand to others.
pub(super) struct Gathering<'a> {
    pub(super) check: Check,
    /// What goes to every rank, or to rank 0.
    pub(super) x: &'a Tensor,
    /// Elements between what goes to one rank and to the next.
    pub(super) x_step: usize,
    pub(super) out: &'a Tensor,
    /// Elements between what comes of one rank and of the next.
    pub(super) out_step: usize,
    pub(super) to_ranks: u32,
    pub(super) from_ranks: u32,
}

/// The bits of all ranks.
pub(super) fn all_ranks(cx: &OpStream) -> u32 {
    (1 << cx.world_size()) - 1
}

impl Gathering<'_> {
    /// Enqueues a launch for each part.
    pub(super) fn launch(&self, cx: &mut OpStream, kernel: &'static Kernel<GatherArgs>) -> Result<()> {
        let (rows, columns) = (self.x.dim(0), self.x.dim(1));
        let is_dense = self.x.is_contiguous() && self.out.row_stride() == columns;
        let message = Message::new(self.check, rows, columns, self.x.dtype(), is_dense)?;
        let (x, out) = (cx.addr(self.x)?, cx.addr(self.out)?);
        let others = cx.world_size() as u32 - 1;
        for part in message.parts(slot_packs(cx)) {
            let dims = grid(part.packs.saturating_mul(others), cx.collective_blocks_max());
            cx.launch_collective(kernel, dims, |communicator| GatherArgs {
                communicator,
                x,
                out,
                x_stride: self.x.row_stride() as i64,
                x_step: self.x_step as i64,
                out_stride: self.out.row_stride() as i64,
                out_step: self.out_step as i64,
                rows: message.rows,
                columns: message.columns,
                first_pack: part.first,
                packs: part.packs,
                to_ranks: self.to_ranks,
                from_ranks: self.from_ranks,
            })?;
        }
        Ok(())
    }
}

/// Gives the rows, if any rank takes them, of all pieces where each rank takes another one.
pub(super) fn give<T: Float>(a: &GatherArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let num_pieces = match (a.to_ranks, a.x_step) {
        (0, _) => 0,
        (_, 0) => 1,
        _ => a.communicator.num_ranks as usize,
    };
    for piece in 0..num_pieces {
        for t in 0..a.rows as usize {
            let first = piece * a.x_step as usize + t * a.x_stride as usize;
            give_row(&mut bytes, memory.view_at::<T>(a.x, first, a.columns as usize)?);
        }
    }
    Ok(bytes)
}

/// Takes the rows of the ranks that are named.
pub(super) fn take<T: Float>(a: &GatherArgs, _: &Dims, gave: &Given, memory: &HostMemory<'_>) -> Result<()> {
    let (rows, columns) = (a.rows as usize, a.columns as usize);
    let piece = if a.x_step == 0 { 0 } else { a.communicator.rank as usize };
    for (rank, bytes) in gave.iter().enumerate().filter(|(rank, _)| a.from_ranks >> rank & 1 == 1) {
        for t in 0..rows {
            let first = rank * a.out_step as usize + t * a.out_stride as usize;
            for (c, out) in memory.view_at::<T>(a.out, first, columns)?.iter().enumerate() {
                out.set(given(bytes, (piece * rows + t) * columns + c));
            }
        }
    }
    Ok(())
}
