//! A `bcg-server` whose device a request can break, to see what the process then does: `gpu serve FLAGS`.
//!
//! A prompt that begins with `TRAP` launches a kernel that traps, one that begins with `SPIN` a kernel that runs for
//! `SPIN_SECONDS`. On the host device the first fails as a trap does, and the second sleeps.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use bcg_cli::args::ServerArgs;
use bcg_cli::serve;
use bcg_engine::model::{GraphCounters, StepError, StepModel};
use bcg_engine::replicas;
use bcg_models::{ModelRunner, PendingStep, SampledToken, SequenceInput};
use bcg_runtime::{Dims, Error, HostMemory, Kernel, KernelArgs, LiveBatch, Result, Runner, RunnerOptions, Source};
use clap::Parser;

/// A prompt that begins with these tokens makes the device trap.
const TRAP: [u32; 4] = [7, 7, 7, 7];
/// A prompt that begins with these tokens keeps the device busy.
const SPIN: [u32; 4] = [8, 8, 8, 8];
/// How long: far beyond the watchdog's timeout in a test, and no longer, so that a device is never blocked for good.
const SPIN_SECONDS: u32 = 30;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct BreakArgs {
    /// 0 traps.
    seconds: u32,
}

static SOURCE: Source = Source::new(
    "break_device.cu",
    r#"#include "args.cuh"
__device__ __forceinline__ unsigned long long now_ns() {
    unsigned long long now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}
extern "C" __global__ void break_device(BreakArgs a) {
    if (a.seconds == 0) __trap();
    unsigned long long begun = now_ns();
    while (now_ns() - begun < a.seconds * 1000000000ull) {}
}"#,
)
.takes::<BreakArgs>();

fn break_host(a: &BreakArgs, _: &Dims, _: &HostMemory<'_>) -> Result<()> {
    if a.seconds == 0 {
        return Err(Error::Driver { call: "cuEventSynchronize", code: 719, name: "CUDA_ERROR_LAUNCH_FAILED".into() });
    }
    std::thread::sleep(Duration::from_secs(u64::from(a.seconds)));
    Ok(())
}

// SAFETY: `break_device` reads and writes no memory.
static BREAK: Kernel<BreakArgs> = unsafe { Kernel::new("break_device", &SOURCE, break_host) };

struct Nothing;

impl LiveBatch for Nothing {}

/// A model's runner beside one that breaks its device.
struct Breaking {
    model: ModelRunner,
    breaker: Runner,
}

impl Breaking {
    fn new(model: ModelRunner) -> anyhow::Result<Self> {
        let breaker = Runner::new(model.device(), RunnerOptions::default()).context("a second runner")?;
        Ok(Self { model, breaker })
    }

    fn break_device(&mut self, seconds: u32) -> Result<()> {
        let begun = Instant::now();
        let launched =
            self.breaker.eager(&Nothing, |cx| cx.launch(&BREAK, Dims::per_item(1, 1), BreakArgs { seconds }));
        let ended = launched.and_then(|()| self.breaker.synchronize());
        tracing::warn!(seconds, took = ?begun.elapsed(), outcome = ?ended, "the device was broken on purpose");
        ended
    }
}

impl StepModel for Breaking {
    type Pending = PendingStep;

    fn launch(&mut self, batch: &[SequenceInput<'_>]) -> std::result::Result<PendingStep, StepError> {
        let begins = |with: [u32; 4]| batch.iter().any(|one| one.past_len == 0 && one.tokens.starts_with(&with));
        if begins(TRAP) || begins(SPIN) {
            let seconds = if begins(TRAP) { 0 } else { SPIN_SECONDS };
            self.break_device(seconds).map_err(|error| StepError::from(bcg_models::Error::from(error)))?;
        }
        StepModel::launch(&mut self.model, batch)
    }

    fn collect(&mut self, step: PendingStep) -> std::result::Result<Vec<SampledToken>, StepError> {
        StepModel::collect(&mut self.model, step)
    }

    fn overlaps(&self) -> bool {
        StepModel::overlaps(&self.model)
    }

    fn stats(&self) -> GraphCounters {
        StepModel::stats(&self.model)
    }
}

/// Serves until it is told to stop, or its device is broken.
///
/// # Errors
/// As [`serve::run`].
pub fn run(args: impl Iterator<Item = String>, began: Instant) -> anyhow::Result<()> {
    let args = ServerArgs::parse_from(args);
    bcg_cli::logging::init(args.log_format);
    serve::run_with(&args, began, |options, progress| {
        replicas::start_with(options, progress, |_, runner| Breaking::new(runner))
    })
}
