//! Random contents for tensors whose values decide nothing but how much power the chip draws.

use anyhow::{Result, bail};
use bcg_models::ModelRunner;
use bcg_runtime::{DType, Device, Runner, RunnerOptions, Tensor};
use half::{bf16, f16};

/// Elements that are drawn; the rest of a tensor repeats them.
const DRAWN: usize = 1 << 20;

/// Fills a tensor with numbers between −1 and 1, the same for every tensor of a dtype and length.
///
/// # Errors
/// For a dtype that is no float; the device's.
pub(super) fn fill(device: &Device, runner: &mut Runner, tensor: &Tensor) -> Result<()> {
    let len = tensor.num_elements();
    let flat = tensor.reshape(&[len])?;
    let mut filled = len.min(DRAWN);
    draw(device, &flat.rows(0..filled)?)?;
    while filled < len {
        let more = filled.min(len - filled);
        runner.eager(&(), |cx| cx.copy(&flat.rows(filled..filled + more)?, &flat.rows(0..more)?))?;
        filled += more;
    }
    Ok(runner.synchronize()?)
}

fn draw(device: &Device, tensor: &Tensor) -> Result<()> {
    let mut state = 1_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let len = tensor.num_elements();
    match tensor.dtype() {
        DType::F32 => device.write(tensor, &(0..len).map(|_| next()).collect::<Vec<f32>>())?,
        DType::Bf16 => device.write(tensor, &(0..len).map(|_| bf16::from_f32(next())).collect::<Vec<bf16>>())?,
        DType::F16 => device.write(tensor, &(0..len).map(|_| f16::from_f32(next())).collect::<Vec<f16>>())?,
        other => bail!("{other} is no float"),
    }
    Ok(())
}

/// Fills the keys and values of a model.
///
/// # Errors
/// As [`fill`].
pub(super) fn fill_kv(model: &ModelRunner) -> Result<()> {
    let device = model.device();
    let mut runner = Runner::new(device, RunnerOptions { name: "random".to_owned(), ..RunnerOptions::default() })?;
    for layer in model.kv_cache().layers() {
        fill(device, &mut runner, &layer.k)?;
        fill(device, &mut runner, &layer.v)?;
    }
    Ok(())
}
