//! What collectives are made of where a kernel cannot reach all ranks: a library carries the rows of every rank to every
//! other one, and kernels of this project do the rest, each rank for itself. So sums have the same order, and the same bits,
//! as those of ranks that reach each other (law L15).

use bcg_runtime::{OpStream, Result, Tensor};

use crate::check::Check;
use crate::{copy_rows, sum_parts};

/// Returns what all ranks have, one below the other, `[W T, C]` without gaps.
pub(super) fn gather(cx: &mut OpStream, check: Check, x: &Tensor) -> Result<Tensor> {
    if !cx.has_transport() {
        return super::all_gather::gather_rows(cx, check, x);
    }
    let dense = if x.is_contiguous() { x.clone() } else { cx.empty(x.shape(), x.dtype())? };
    if !x.is_contiguous() {
        copy_rows(cx, &dense, x)?;
    }
    let out = cx.empty(&[x.dim(0) * cx.world_size(), x.dim(1)], x.dtype())?;
    cx.gather_from_all(&out, &dense)?;
    Ok(out)
}

/// The sum over all ranks.
pub(super) fn all_reduce(cx: &mut OpStream, check: Check, x: &Tensor) -> Result<Tensor> {
    let parts = gather(cx, check, x)?;
    sum_parts(cx, &parts, cx.world_size(), 0..x.dim(0))
}

/// This rank's rows of the sum over all ranks.
pub(super) fn reduce_scatter_rows(cx: &mut OpStream, check: Check, x: &Tensor) -> Result<Tensor> {
    let parts = gather(cx, check, x)?;
    let share = x.dim(0) / cx.world_size();
    sum_parts(cx, &parts, cx.world_size(), cx.rank() * share..(cx.rank() + 1) * share)
}

/// What all ranks have, side by side.
pub(super) fn all_gather_columns(cx: &mut OpStream, check: Check, x: &Tensor) -> Result<Tensor> {
    let (parts, rows, columns) = (gather(cx, check, x)?, x.dim(0), x.dim(1));
    let out = cx.empty(&[rows, columns * cx.world_size()], x.dtype())?;
    for rank in 0..cx.world_size() {
        let place = out.columns(rank * columns..(rank + 1) * columns)?;
        cx.copy(&place, &parts.rows(rank * rows..(rank + 1) * rows)?)?;
    }
    Ok(out)
}

/// What one rank has.
pub(super) fn rows_of(cx: &mut OpStream, check: Check, x: &Tensor, rank: usize) -> Result<Tensor> {
    gather(cx, check, x)?.rows(rank * x.dim(0)..(rank + 1) * x.dim(0))
}

/// Part r of what each rank has, on rank r, one below the other.
pub(super) fn all_to_all(cx: &mut OpStream, check: Check, x: &Tensor) -> Result<Tensor> {
    let (parts, rows) = (gather(cx, check, x)?, x.dim(0) / cx.world_size());
    let out = cx.empty(x.shape(), x.dtype())?;
    for rank in 0..cx.world_size() {
        let first = rank * x.dim(0) + cx.rank() * rows;
        cx.copy(&out.rows(rank * rows..(rank + 1) * rows)?, &parts.rows(first..first + rows)?)?;
    }
    Ok(out)
}
