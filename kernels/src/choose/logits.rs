//! The geometry of kernels over rows of logits; CUDA twin: `kernels/include/logits.cuh`.

use bcg_runtime::{Dims, Result, Tensor};

use crate::check::Check;

/// Blocks of a row.
pub(super) const CLUSTER: usize = 8;
/// Threads of a block.
pub(super) const THREADS: usize = 512;
/// Logits of a pack, which a thread reads at once.
const PACK_LEN: usize = 4;

/// A cluster of blocks for each row of `tensor`.
pub(super) fn dims(check: Check, tensor: &Tensor) -> Result<Dims> {
    Ok(Dims::linear(check.u32("blocks", tensor.dim(0) * CLUSTER)?, THREADS as u32))
}

/// The number of rows that a launch is for.
pub(super) fn rows(dims: &Dims) -> usize {
    dims.grid[0] as usize / CLUSTER
}

/// The most packs that a thread has of a row.
pub(super) fn packs_per_thread(columns: usize) -> usize {
    columns.div_ceil(PACK_LEN * CLUSTER * THREADS)
}

/// The bytes of a block whose threads have `packs` packs each.
pub(super) fn packs_bytes(packs: usize) -> usize {
    packs * THREADS * PACK_LEN * size_of::<f32>()
}
