//! A free function, its arguments by reference and by value, its docs, visibility and attributes kept.
#![deny(warnings, missing_docs)]

use bcg_runtime::{Context, Device, Eager, Result, Runner, RunnerOptions, Tensor, eager_on_graph};

/// A module of breaks.
pub mod breaks {
    use super::*;

    /// Its documentation is kept.
    #[must_use]
    #[inline]
    #[allow(clippy::too_many_arguments)]
    #[eager_on_graph]
    pub fn scale(
        cx: &mut Eager<'_, ()>,
        x: &Tensor,
        by: f32,
        mut rows: Vec<usize>,
        extra: &Option<Tensor>,
        name: &'static str,
    ) -> Result<Tensor> {
        #![allow(unused_variables)]
        rows.push(1);
        let unused = name;
        if extra.is_some() {
            return Ok(x.clone());
        }
        let values: Vec<f32> = cx.read::<f32>(x)?.iter().map(|value| value * by * rows[0] as f32).collect();
        let out = cx.empty(x.shape(), x.dtype())?;
        cx.upload(&out, &values)?;
        Ok(out)
    }
}

/// Runs it.
fn main() -> Result<()> {
    let device = Device::host();
    let mut runner = Runner::new(&device, RunnerOptions::default())?;
    let x = device.tensor(&[2], &[1.0f32, 2.0])?;
    let out = runner.eager(&(), |cx: &mut Context<'_, ()>| breaks::scale(cx, &x, 2.0, vec![3], &None, "scale"))?;
    assert_eq!(runner.read::<f32>(&out)?, [6.0, 12.0]);
    Ok(())
}
