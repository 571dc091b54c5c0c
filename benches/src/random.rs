//! Random contents for tensors whose values decide nothing but how much power the chip draws.

use anyhow::Result;
use bcg_kernels as ops;
use bcg_runtime::{Runner, Tensor};

/// Fills a tensor with nearly normal numbers.
///
/// # Errors
/// For a dtype that is no float; the device's.
pub(super) fn fill(runner: &mut Runner, tensor: &Tensor) -> Result<()> {
    Ok(runner.eager(&(), |cx| ops::fill_random(cx, tensor, 1, 0.0, 1.0))?)
}
