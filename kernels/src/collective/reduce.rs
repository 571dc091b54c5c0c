//! Sums over the ranks: what [`all_reduce`](super::all_reduce()) and [`reduce_scatter_rows`](super::reduce_scatter_rows()) share.

use bcg_runtime::{CommunicatorArgs, DevicePtr, Dims, Given, HostMemory, Kernel, KernelArgs, OpStream, Result, Tensor};

use super::message::{Message, Part, give_row, given};
use crate::check::Check;
use crate::float::{Float, row};

/// What `include/collective_reduce.cuh` takes.
#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
pub(super) struct ReduceArgs {
    pub(super) communicator: CommunicatorArgs,
    /// The piece of rank 0; the others `x_step` elements apart, or all the same if that is 0.
    pub(super) x: DevicePtr,
    /// The sum of this rank's piece, without gaps.
    pub(super) out: DevicePtr,
    pub(super) x_stride: i64,
    pub(super) x_step: i64,
    pub(super) rows: u32,
    pub(super) columns: u32,
    /// The packs that this launch sends.
    pub(super) first_pack: u32,
    pub(super) packs: u32,
}

/// A sum over the ranks of pieces of `x`, which has the shape of `out` or one such piece for each rank.
pub(super) struct Reduction<'a> {
    pub(super) check: Check,
    pub(super) x: &'a Tensor,
    pub(super) out: &'a Tensor,
    /// Elements between the pieces.
    pub(super) x_step: usize,
}

impl Reduction<'_> {
    /// Enqueues a launch for each part of at most `packs_max`.
    pub(super) fn launch(
        &self,
        cx: &mut OpStream,
        kernel: &'static Kernel<ReduceArgs>,
        packs_max: u32,
        grid: impl Fn(Part) -> Dims,
    ) -> Result<()> {
        let (rows, columns) = (self.out.dim(0), self.out.dim(1));
        let message = Message::new(self.check, rows, columns, self.x.dtype(), self.x.is_contiguous())?;
        let (x, out) = (cx.addr(self.x)?, cx.addr(self.out)?);
        for part in message.parts(packs_max) {
            cx.launch_collective(kernel, grid(part), |communicator| ReduceArgs {
                communicator,
                x,
                out,
                x_stride: self.x.row_stride() as i64,
                x_step: self.x_step as i64,
                rows: message.rows,
                columns: message.columns,
                first_pack: part.first,
                packs: part.packs,
            })?;
        }
        Ok(())
    }
}

/// Gives all pieces.
pub(super) fn give<T: Float>(a: &ReduceArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<Vec<u8>> {
    let num_pieces = if a.x_step == 0 { 1 } else { a.communicator.num_ranks };
    let mut bytes = Vec::new();
    for piece in 0..num_pieces {
        for t in 0..a.rows as usize {
            let first = piece as usize * a.x_step as usize + t * a.x_stride as usize;
            give_row(&mut bytes, memory.view_at::<T>(a.x, first, a.columns as usize)?);
        }
    }
    Ok(bytes)
}

/// Sums this rank's piece.
pub(super) fn take<T: Float>(a: &ReduceArgs, _: &Dims, gave: &Given, memory: &HostMemory<'_>) -> Result<()> {
    let (rows, columns) = (a.rows as usize, a.columns as usize);
    let piece = if a.x_step == 0 { 0 } else { a.communicator.rank as usize };
    for t in 0..rows {
        let first = (piece * rows + t) * columns;
        for (c, out) in row::<T>(memory, a.out, i64::from(a.columns), t, columns)?.iter().enumerate() {
            out.set(T::from_f32(sum::<T>(gave, first + c)));
        }
    }
    Ok(())
}

/// The sum over the ranks of an element, in their order.
pub(super) fn sum<T: Float>(gave: &Given, index: usize) -> f32 {
    let mut values = gave.iter().map(|bytes| given::<T>(bytes, index).to_f32());
    let first = values.next().unwrap_or_default();
    values.fold(first, |sum, value| sum + value)
}
