//! What the rules share: a live batch, a runner in poison mode, and the comparison with an eager run.

use std::cell::Cell;

use bcg_runtime::{
    BreakableCudaGraph, Context, Device, Eager, Error, LiveBatch, ReplayMode, Result, Rows, Runner, RunnerOptions,
    Tensor, eager_on_graph,
};

use super::kernels::{add_index, axpy};

/// A live batch with one host value and, if padded, its rows.
#[derive(Clone, Copy, Debug)]
pub struct Batch {
    /// Read by breaks.
    pub scale: f32,
    /// Valid and padded rows.
    pub rows: Option<Rows>,
}

impl LiveBatch for Batch {
    fn rows(&self) -> Option<Rows> {
        self.rows
    }
}

/// Returns a batch without padding.
pub fn batch(scale: f32) -> Batch {
    Batch { scale, rows: None }
}

/// Returns a batch of `valid` real rows in a capture of `padded`.
pub fn padded(scale: f32, valid: usize, padded: usize) -> Batch {
    Batch { scale, rows: Some(Rows { valid, padded }) }
}

thread_local! {
    static REPLAY: Cell<ReplayMode> = const { Cell::new(ReplayMode::Healed) };
}

/// Runs a rule whose runners replay in one of the two ways: every rule holds for both.
pub fn with_replay<R>(mode: ReplayMode, rule: impl FnOnce() -> R) -> R {
    REPLAY.set(mode);
    let result = rule();
    REPLAY.set(ReplayMode::default());
    result
}

/// Options of most rules' runners: a small arena, poison on, replays as [`with_replay`] says.
pub fn options() -> RunnerOptions {
    let mut options = RunnerOptions::default();
    options.arena_bytes = 1 << 20;
    options.poison = true;
    options.replay = REPLAY.get();
    options
}

/// Makes a runner with [`options`].
pub fn runner(device: &Device) -> Runner {
    Runner::new(device, options()).expect("a runner")
}

/// Makes a persistent vector `start, start + 1, …`.
pub fn iota(device: &Device, shape: &[usize], start: f32) -> Tensor {
    let len = shape.iter().product::<usize>();
    let data: Vec<f32> = (0..len).map(|i| start + i as f32).collect();
    device.tensor(shape, &data).expect("a tensor")
}

/// Reads a tensor as the bits of its f32 elements, so that NaN equals NaN and -0 differs from 0.
pub fn bits(runner: &mut Runner, tensor: &Tensor) -> Vec<u32> {
    runner.read::<f32>(tensor).expect("a readable tensor").into_iter().map(f32::to_bits).collect()
}

/// The break that most rules use: `scale * x + x`, with the scale of the live batch.
#[eager_on_graph]
pub fn scaled(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    let scale = cx.live().scale;
    axpy(cx, scale, x, x)
}

/// What [`scaled`] computes.
pub fn scaled_on_host(scale: f32, x: &[f32]) -> Vec<f32> {
    x.iter().map(|x| scale * x + x).collect()
}

/// A captured step: `x + index`.
pub fn step(cx: &mut Context<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    add_index(cx, x)
}

/// The captured graph of [`assert_like_eager`].
pub type Graph = BreakableCudaGraph<Batch, Tensor>;

/// Captures `forward` with the first batch and replays it with all of them: each output equals that of an eager run with
/// the same batch, bit for bit. The eager runs between the replays leave other data in the arena.
pub fn assert_like_eager(
    runner: &mut Runner,
    batches: &[Batch],
    forward: impl Fn(&mut Context<'_, Batch>) -> Result<Tensor> + Clone + Send + Sync + 'static,
) -> Graph {
    let mut graph = Graph::new("rule");
    let captured = graph.capture(runner, &batches[0], forward.clone()).expect("a capture");
    let captured = bits(runner, &captured);
    let eager = runner.eager(&batches[0], &forward).expect("an eager run");
    assert_eq!(captured, bits(runner, &eager), "a capture is also a run");
    replays_like_eager(runner, &mut graph, batches, forward);
    graph
}

/// Replays a graph with each batch and compares with eager runs.
pub fn replays_like_eager(
    runner: &mut Runner,
    graph: &mut Graph,
    batches: &[Batch],
    forward: impl Fn(&mut Context<'_, Batch>) -> Result<Tensor>,
) {
    for batch in batches {
        let replayed = graph.replay(runner, batch).expect("a replay");
        let replayed = bits(runner, &replayed);
        let eager = runner.eager(batch, &forward).expect("an eager run");
        assert_eq!(replayed, bits(runner, &eager), "replay and eager differ with {batch:?}");
    }
}

/// The batches of most rules: captured with the first, replayed with all.
pub fn batches() -> [Batch; 4] {
    [2.0, 5.0, -3.0, 2.0].map(batch)
}

/// Returns the number of segments and breaks.
pub fn census(graph: &Graph) -> (usize, usize) {
    let description = graph.describe();
    (description.segments.len(), description.breaks.len())
}

/// Returns the error of a run that must fail.
pub fn failure<T>(result: Result<T>) -> Error {
    match result {
        Ok(_) => panic!("this must fail"),
        Err(error) => error,
    }
}

/// Checks that a runner works: an eager run, a capture and a replay give right values.
pub fn assert_usable(runner: &mut Runner) {
    let x = iota(&runner.device().clone(), &[16], 1.0);
    let expected = |scale| {
        let x: Vec<f32> = (0..16).map(|i| 1.0 + 2.0 * i as f32).collect();
        scaled_on_host(scale, &x)
    };
    let forward = move |cx: &mut Context<'_, Batch>| {
        let y = step(cx, &x)?;
        scaled(cx, &y)
    };
    let eager = runner.eager(&batch(3.0), &forward).expect("an eager run");
    assert_eq!(runner.read::<f32>(&eager).expect("a read"), expected(3.0));
    let mut graph = Graph::new("usable");
    let captured = graph.capture(runner, &batch(4.0), forward).expect("a capture");
    assert_eq!(runner.read::<f32>(&captured).expect("a read"), expected(4.0));
    let replayed = graph.replay(runner, &batch(5.0)).expect("a replay");
    assert_eq!(runner.read::<f32>(&replayed).expect("a read"), expected(5.0));
}
