//! Times ops on the device: launches on buffers that take turns, in one graph, replayed back to back.

use std::time::Instant;

use anyhow::Result;
use bcg_runtime::{
    BreakableCudaGraph, Context, DType, Device, DeviceKind, Element, OpStream, Runner, RunnerOptions, Tensor,
};

use super::cases::Case;
use crate::random;
use crate::timing::{Rounds, Samples};

/// Bytes that the launches of a graph touch together where that is possible: several times any L2 cache.
const TOUCHED_BYTES: usize = 256 << 20;

/// Launches in a graph at most.
const LAUNCHES_MAX: usize = 64;

/// Microseconds of device work in one sample at least, so that starting and waiting do not count.
const SAMPLE_US: f64 = 2000.0;

/// Repeats in one sample at most.
const REPEATS_MAX: usize = 256;

/// Enqueues one launch of an op on its own buffers and returns its outputs, which are kept until the graph ends.
pub(super) type Launch = Box<dyn Fn(&mut OpStream) -> bcg_runtime::Result<Vec<Tensor>> + Send + Sync>;

/// The device and the runner that cases are timed on.
pub(super) struct Lab {
    device: Device,
    runner: Runner,
}

impl Lab {
    pub(super) fn new(device: Device) -> Result<Self> {
        let mut options = RunnerOptions::default();
        options.name = "bench".to_owned();
        let runner = Runner::new(&device, options)?;
        Ok(Self { device, runner })
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// Makes a tensor of random numbers.
    pub(super) fn random(&mut self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let tensor = self.device.empty(shape, dtype)?;
        random::fill(&mut self.runner, &tensor)?;
        Ok(tensor)
    }

    /// Makes a tensor of the given numbers.
    pub(super) fn tensor<T: Element>(&self, data: &[T]) -> Result<Tensor> {
        Ok(self.device.tensor(&[data.len()], data)?)
    }

    /// Returns the microseconds of one launch.
    pub(super) fn time(&mut self, case: &Case, rounds: Rounds) -> Result<Samples> {
        let launches = (case.prepare)(self, self.num_launches(case))?;
        let count = launches.len();
        let forward = move |cx: &mut Context<'_, ()>| {
            // Outputs stay alive until the end, so that no two launches write to the same memory.
            let outputs = launches.iter().map(|launch| launch(cx)).collect::<bcg_runtime::Result<Vec<_>>>()?;
            drop(outputs);
            Ok(())
        };
        self.runner.eager(&(), &forward)?; // compiles the kernels and lets the arena grow
        if let Some(rows) = case.tuned_rows {
            self.device.tune_matmuls(&[rows], &mut |_, _| ())?;
        }
        if !case.in_graph {
            return self.samples(count, rounds, |runner| runner.eager(&(), &forward));
        }
        let mut graph = BreakableCudaGraph::<(), ()>::new(case.op);
        graph.capture(&mut self.runner, &(), forward)?;
        self.samples(count, rounds, |runner| graph.replay(runner, &()))
    }

    /// Times `run`, which makes `count` launches, and returns the microseconds of one launch.
    fn samples(
        &mut self,
        count: usize,
        rounds: Rounds,
        mut run: impl FnMut(&mut Runner) -> bcg_runtime::Result<()>,
    ) -> Result<Samples> {
        let mut time = |repeats: usize| -> Result<f64> {
            self.runner.synchronize()?;
            let begun = Instant::now();
            for _ in 0..repeats {
                run(&mut self.runner)?;
            }
            self.runner.synchronize()?;
            Ok(begun.elapsed().as_secs_f64() * 1e6)
        };
        let once = time(1)?.min(time(1)?);
        let repeats = ((SAMPLE_US / once).ceil() as usize).clamp(1, REPEATS_MAX);
        Ok(Samples::new(rounds.run(|| Ok(time(repeats)? / (repeats * count) as f64))?))
    }

    /// The host device has no cache to outgrow.
    fn num_launches(&self, case: &Case) -> usize {
        match self.device.kind() {
            DeviceKind::Host => 2,
            DeviceKind::Cuda => TOUCHED_BYTES.div_ceil(case.bytes.max(1)).clamp(2, LAUNCHES_MAX),
        }
    }
}
