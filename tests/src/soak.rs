//! Many mixed steps on one device: what is right once stays right, and nothing grows.

use std::fs;

use bcg_runtime::{
    CacheOptions, Context, Decision, Device, DeviceKind, Eager, GraphCache, Ladder, LiveObjects, ReplayMode, Result,
    Runner, Tensor, eager_on_graph,
};

use crate::Rule;
use crate::conformance::fixture::{Batch, bits, iota, options, padded, scaled, step};
use crate::conformance::kernels::{axpy, column_sum};
use crate::random::rng::Rng;

/// The rules that take long.
pub const RULES: &[Rule] = crate::rules!(mixed_steps_are_right_and_grow_nothing);

/// Rows of the largest step.
const ROWS_MAX: usize = 48;
const COLUMNS: usize = 32;
/// Graphs that a cache holds: fewer than there are sizes, so that some go.
const GRAPHS_MAX: usize = 6;
/// How much the process may grow after the first tenth of the steps, in bytes: pages that the allocator did not give back.
const HOST_TOLERANCE: usize = 8 << 20;

/// As much for the device's memory: a driver takes it for graphs in pieces, and keeps them.
const DRIVER_TOLERANCE: usize = 4 << 20;
const NUM_STEPS: usize = 10_000;

/// A break whose work depends on the batch: one to three launches.
#[eager_on_graph]
fn some_launches(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    let num = 1 + cx.live().scale.abs() as usize % 3;
    (0..num).try_fold(x.clone(), |y, _| axpy(cx, 0.5, &y, x))
}

/// A break that cannot be healed: it reads back.
#[eager_on_graph]
fn scaled_by_first(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    let first = cx.read::<f32>(x)?[0];
    axpy(cx, first.signum(), x, x)
}

fn forward_of(
    x: Tensor,
    reads_back: bool,
) -> impl Fn(&mut Context<'_, Batch>) -> Result<Tensor> + Send + Sync + 'static {
    move |cx| {
        let y = step(cx, &x)?;
        let z = scaled(cx, &y)?;
        let z = axpy(cx, 2.0, &z, &y)?;
        let z = if reads_back { scaled_by_first(cx, &z)? } else { z };
        let w = some_launches(cx, &z)?;
        let sum = column_sum(cx, &w)?;
        cx.copy(&w.rows(0..1)?.reshape(&[COLUMNS])?, &sum)?;
        step(cx, &w)
    }
}

/// One way to replay: a runner and its graphs.
struct Lane {
    runner: Runner,
    cache: GraphCache<Batch, Tensor>,
    reads_back: bool,
}

impl Lane {
    fn new(device: &Device, replay: ReplayMode, ladder: Ladder, bytes_max: usize, reads_back: bool) -> Self {
        let mut options = options();
        options.replay = replay;
        let runner = Runner::new(device, options).expect("a runner");
        let mut cache = CacheOptions::default();
        cache.ladder = Some(ladder);
        cache.lazy = true;
        cache.graphs_max = GRAPHS_MAX;
        cache.bytes_max = bytes_max;
        cache.verify_every = Some(97);
        Self { runner, cache: GraphCache::new("soak", cache), reads_back }
    }

    fn forward(
        &self,
        x: &Tensor,
        size: usize,
    ) -> impl Fn(&mut Context<'_, Batch>) -> Result<Tensor> + Send + Sync + use<> {
        forward_of(x.rows(0..size).expect("rows"), self.reads_back)
    }

    /// Runs a step by what its cache decides; returns its output and what it was run with.
    fn run(&mut self, x: &Tensor, rows: usize, scale: f32) -> (Tensor, Batch, usize) {
        let decision = self.cache.decide(rows);
        let size = match decision {
            Decision::Replay { size } | Decision::Capture { size } => size,
            Decision::Eager(_) => rows,
        };
        let (live, forward) = (padded(scale, rows, size), self.forward(x, size));
        let output = match decision {
            Decision::Replay { .. } => self.cache.replay(size, &mut self.runner, &live),
            Decision::Capture { .. } => self.cache.capture(size, &mut self.runner, &live, forward),
            Decision::Eager(_) => self.runner.eager(&live, forward),
        };
        (output.expect("a run"), live, size)
    }

    /// Runs steps without waiting in between, and compares the last one with an eager run.
    fn steps(&mut self, x: &Tensor, rows: &[usize], scale: f32) {
        let (mut output, mut live, mut size) = self.run(x, rows[0], scale);
        for &rows in &rows[1..] {
            (output, live, size) = self.run(x, rows, scale);
        }
        let output = bits(&mut self.runner, &output);
        let eager = self.runner.eager(&live, self.forward(x, size)).expect("an eager run");
        assert_eq!(output, bits(&mut self.runner, &eager), "{live:?}");
    }
}

/// What must not grow.
#[derive(Debug)]
struct Held {
    objects: LiveObjects,
    device_bytes: usize,
    host_bytes: usize,
}

impl Held {
    /// Measures with all graphs gone, so that what is left is what leaked.
    fn measure(device: &Device, lanes: &mut [Lane]) -> Self {
        for lane in lanes {
            lane.cache.clear();
            lane.runner.synchronize().expect("no failure");
        }
        let memory = device.memory_info().expect("memory");
        let objects = device.live_objects();
        Self { objects, device_bytes: memory.total_bytes - memory.free_bytes, host_bytes: resident_bytes() }
    }
}

/// Most steps have one of a few sizes, so that most are replays.
fn random_rows(rng: &mut Rng) -> usize {
    if rng.chance(8) { 1 + rng.below(ROWS_MAX) } else { [1, 7, 16, 33][rng.below(4)] }
}

/// Returns the memory of this process that is in use.
fn resident_bytes() -> usize {
    let status = fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
    1024 * line.trim().trim_end_matches("kB").trim().parse::<usize>().expect("a number")
}

/// Ten thousand steps of random sizes, replayed as healed graphs and as chains, captured lazily,
/// evicted while they run, with memory released and restored in between: each output equals
/// an eager run, and neither device nor host memory grows after the first tenth.
pub fn mixed_steps_are_right_and_grow_nothing(device: &Device) {
    let mut rng = Rng::new(4);
    let exact = || Ladder::exact(ROWS_MAX).expect("a ladder");
    let ladder = || Ladder::relative(ROWS_MAX, 1).expect("a ladder");
    let (bytes_max, device_tolerance) = match device.kind() {
        DeviceKind::Host => (128 << 10, 0),
        DeviceKind::Cuda => (4 << 20, DRIVER_TOLERANCE),
    };
    let mut lanes = [
        Lane::new(device, ReplayMode::Healed, exact(), usize::MAX, false),
        Lane::new(device, ReplayMode::Healed, ladder(), usize::MAX, true),
        Lane::new(device, ReplayMode::Healed, ladder(), bytes_max, false),
        Lane::new(device, ReplayMode::Chain, exact(), usize::MAX, true),
    ];
    let x = iota(device, &[ROWS_MAX, COLUMNS], 1.0);
    let mut at_tenth = None;
    for index in 0..NUM_STEPS {
        if index == NUM_STEPS / 10 {
            at_tenth = Some(Held::measure(device, &mut lanes));
        }
        let lane = &mut lanes[rng.below(4)];
        let rows: Vec<usize> = (0..if rng.chance(5) { 3 } else { 1 }).map(|_| random_rows(&mut rng)).collect();
        lane.steps(&x, &rows, rng.below(5) as f32 - 1.0);
        if rng.chance(50) {
            lane.runner.release_memory().expect("a release");
            lane.runner.restore_memory().expect("a restoration");
        }
        if rng.chance(100) {
            let data: Vec<f32> = (0..ROWS_MAX * COLUMNS).map(|at| (at as f32 + rng.below(9) as f32).sin()).collect();
            device.write(&x, &data).expect("other inputs");
        }
    }
    let (begin, end) = (at_tenth.expect("a tenth"), Held::measure(device, &mut lanes));
    let stats = lanes[1..].iter().fold(lanes[0].cache.stats().clone(), |sum, lane| sum.merged(lane.cache.stats()));
    assert!(stats.num_replays > NUM_STEPS as u64 / 2 && stats.num_verified > 0, "{stats:?}");
    println!("after {NUM_STEPS} steps: {end:?}; after the first tenth: {begin:?}");
    for lane in &lanes {
        let stats = lane.cache.stats();
        assert!(stats.num_evictions > 0 && stats.num_capture_failures == 0, "{stats:?}");
    }
    assert_eq!(end.objects, begin.objects, "objects of the device");
    assert!(end.device_bytes <= begin.device_bytes + device_tolerance, "device memory grew: {begin:?}, {end:?}");
    assert!(end.host_bytes <= begin.host_bytes + HOST_TOLERANCE, "host memory grew: {begin:?}, {end:?}");
}
