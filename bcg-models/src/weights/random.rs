//! Weights that the device makes up.

use bcg_kernels as ops;
use bcg_runtime::{Device, Runner, RunnerOptions, Tensor};

use crate::error::Result;

/// The standard deviation that new models are initialised with; activations of any depth stay finite with it.
const STD: f32 = 0.02;

/// Fills one tensor after the other.
#[derive(Debug)]
pub(super) struct RandomWeights {
    /// Without one nothing is filled.
    runner: Option<Runner>,
    /// The seed of the next tensor.
    seed: u64,
    bytes: usize,
}

impl RandomWeights {
    pub(super) fn new(device: &Device) -> Result<Self> {
        let mut options = RunnerOptions::default();
        options.name = "random weights".to_owned();
        options.arena_bytes = 0;
        Ok(Self { runner: Some(Runner::new(device, options)?), seed: 0, bytes: 0 })
    }

    /// Leaves all elements undefined.
    pub(super) fn unfilled() -> Self {
        Self { runner: None, seed: 0, bytes: 0 }
    }

    /// Enqueues the filling of the part `number` of a tensor. Vectors are the scales of norms: they lie around 1, all else
    /// around 0.
    pub(super) fn fill(&mut self, tensor: &Tensor, number: usize) -> Result<()> {
        let mean = if tensor.rank() == 1 { 1.0 } else { 0.0 };
        let seed = self.seed | (number as u64) << 32; // no model has that many tensors
        if let Some(runner) = &mut self.runner {
            runner.eager(&(), |cx| ops::fill_random(cx, tensor, seed, mean, STD))?;
        }
        self.seed += 1;
        self.bytes += tensor.size_bytes();
        Ok(())
    }

    /// Leaves out a tensor, so that those after it are the same as on a rank that takes it.
    pub(super) fn skip(&mut self) {
        self.seed += 1;
    }

    /// Waits until all tensors are filled; returns their bytes.
    pub(super) fn finish(self) -> Result<usize> {
        if let Some(runner) = self.runner {
            runner.synchronize()?;
        }
        Ok(self.bytes)
    }
}
