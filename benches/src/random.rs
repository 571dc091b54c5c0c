//! Random contents for tensors whose values decide nothing but how much power the chip draws.

use anyhow::Result;
use bcg_kernels as ops;
use bcg_models::ModelRunner;
use bcg_runtime::{Runner, RunnerOptions, Tensor};

/// Fills a tensor with nearly normal numbers.
///
/// # Errors
/// For a dtype that is no float; the device's.
pub(super) fn fill(runner: &mut Runner, tensor: &Tensor) -> Result<()> {
    Ok(runner.eager(&(), |cx| ops::fill_random(cx, tensor, 1, 0.0, 1.0))?)
}

/// Fills the keys, values and states of a model.
///
/// # Errors
/// As [`fill`].
pub(super) fn fill_kv(model: &ModelRunner) -> Result<()> {
    let mut runner = Runner::new(model.device(), RunnerOptions::default())?;
    for layer in model.kv_cache().layers() {
        fill(&mut runner, &layer.k)?;
        fill(&mut runner, &layer.v)?;
    }
    for layer in model.states().layers() {
        fill(&mut runner, &layer.conv)?;
        fill(&mut runner, &layer.ssm)?;
    }
    Ok(runner.synchronize()?)
}
