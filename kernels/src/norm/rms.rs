//! What the RMS norms share: their geometry, and the factor of a row.

use std::cell::Cell;

use bcg_runtime::{Dims, Result, Tensor};

use crate::check::Check;
use crate::float::{Float, dot, extend_f32, pack_len};

/// Words of a row and of the weight that a thread keeps.
pub(crate) const PACKS: usize = 2;

/// The geometry of the RMS norms: one block per row, of as many threads as let each keep two words of a row of up to
/// 1024 words.
pub(crate) fn rms_dims(check: Check, x: &Tensor) -> Result<Dims> {
    let threads = x.dim(1).div_ceil(PACKS * pack_len(x.dtype())).next_multiple_of(32);
    check.block_per_row(x, threads.clamp(32, 512) as u32)
}

/// The factor by which an RMS norm scales a row.
pub(crate) fn rms_scale<T: Float>(row: &[Cell<T>], eps: f32) -> f32 {
    let mut values = Vec::with_capacity(row.len());
    extend_f32(&mut values, row);
    1.0 / (dot(&values, &values) / row.len() as f32 + eps).sqrt()
}
