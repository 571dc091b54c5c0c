//! The first error wins, says where, and leaves the runner usable (law L5).

use std::sync::Arc;

use bcg_runtime::{
    BreakableCudaGraph, Context, DType, Device, Eager, Error, Generation, GraphOptions, LiveBatch, Result, Runner,
    Tensor, eager_on_graph,
};

use super::fixture::{Batch, Graph, assert_usable, batch, bits, failure, iota, padded, runner, scaled, step};
use super::kernels::{axpy, count, read_beyond};

/// How a run goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    No,
    Error,
    Panic,
    Kernel,
}

impl LiveBatch for Trouble {}

fn trouble(trouble: Trouble) -> Result<()> {
    match trouble {
        Trouble::No | Trouble::Kernel => Ok(()),
        Trouble::Error => Err(Error::other("the cause")),
        Trouble::Panic => panic!("the {}", "cause"),
    }
}

const TROUBLED_LINE: u32 = line!() + 3;

#[eager_on_graph]
fn troubled(cx: &mut Eager<'_, Trouble>, x: &Tensor) -> Result<Tensor> {
    let y = axpy(cx, 2.0, x, x)?;
    trouble(*cx.live())?;
    axpy(cx, 1.0, &y, x)
}

fn troubled_forward(
    x: &Tensor,
) -> impl Fn(&mut Context<'_, Trouble>) -> Result<Tensor> + Clone + Send + Sync + 'static {
    let x = x.clone();
    move |cx| {
        let y = axpy(cx, 1.0, &x, &x)?;
        cx.break_graph()?;
        let y = axpy(cx, 1.0, &y, &x)?;
        troubled(cx, &y)
    }
}

fn check_located(error: &Error, cause: &str) {
    let file = file!();
    let message = format!("break `troubled` after segment 1 ({file}:{TROUBLED_LINE}): {cause}");
    assert_eq!(error.to_string(), message);
    let Error::Break { name, segment, file: at, line, .. } = error else { panic!("{error}") };
    assert_eq!((*name, *segment, *at, *line), ("troubled", 1, file, TROUBLED_LINE));
}

fn fails_in_a_break_at_capture(device: &Device, kind: Trouble, cause: &str) {
    let mut runner = runner(device);
    let x = iota(device, &[16], 1.0);
    let objects = device.live_objects();
    let mut graph = BreakableCudaGraph::new("troubled");
    let error = failure(graph.capture(&mut runner, &kind, troubled_forward(&x)));
    check_located(&error, cause);
    assert!(!graph.is_captured());
    assert_eq!(device.live_objects(), objects, "what was captured is discarded");
    let error = failure(graph.replay(&mut runner, &Trouble::No)).to_string();
    assert_eq!(error, "graph `troubled` holds no capture: its last capture failed");
    assert_usable(&mut runner);
    graph.capture(&mut runner, &Trouble::No, troubled_forward(&x)).expect("a capture");
    let replayed = graph.replay(&mut runner, &Trouble::No).expect("a replay");
    assert_eq!(runner.read::<f32>(&replayed).expect("a read")[1], 2.0 * 12.0);
}

fn fails_in_a_break_at_replay(device: &Device, kind: Trouble, cause: &str) {
    let mut runner = runner(device);
    let x = iota(device, &[16], 1.0);
    let mut graph = BreakableCudaGraph::new("troubled");
    let captured = graph.capture(&mut runner, &Trouble::No, troubled_forward(&x)).expect("a capture");
    let captured = bits(&mut runner, &captured);
    for _ in 0..2 {
        let error = failure(graph.replay(&mut runner, &kind));
        check_located(&error, cause);
        let replayed = graph.replay(&mut runner, &Trouble::No).expect("a replay after a failed one");
        assert_eq!(bits(&mut runner, &replayed), captured);
    }
    assert_usable(&mut runner);
}

/// An error in a break ends the capture, is located, and leaves the runner usable.
pub fn an_error_in_a_break_at_capture_is_located(device: &Device) {
    fails_in_a_break_at_capture(device, Trouble::Error, "the cause");
}

/// So does a panic.
pub fn a_panic_in_a_break_at_capture_is_located(device: &Device) {
    fails_in_a_break_at_capture(device, Trouble::Panic, "panicked: the cause");
}

/// An error in a break at replay is located, gives no output, and leaves graph and runner usable.
pub fn an_error_in_a_break_at_replay_is_located(device: &Device) {
    fails_in_a_break_at_replay(device, Trouble::Error, "the cause");
}

/// So does a panic.
pub fn a_panic_in_a_break_at_replay_is_located(device: &Device) {
    fails_in_a_break_at_replay(device, Trouble::Panic, "panicked: the cause");
}

/// An error or a panic in captured code names the segment.
pub fn an_error_in_captured_code_names_its_segment(device: &Device) {
    for (kind, cause) in [(Trouble::Error, "the cause"), (Trouble::Panic, "panicked: the cause")] {
        for breaks in 0..3 {
            let mut runner = runner(device);
            let x = iota(device, &[16], 1.0);
            let mut graph = Graph::new("captured code");
            let error = failure(graph.capture(&mut runner, &batch(1.0), move |cx| {
                let mut y = step(cx, &x)?;
                for _ in 0..breaks {
                    y = scaled(cx, &y)?;
                    y = step(cx, &y)?;
                }
                trouble(kind)?;
                Ok(y)
            }));
            assert_eq!(error.to_string(), format!("segment {breaks}: {cause}"));
            assert_usable(&mut runner);
        }
    }
}

/// An error that captured code swallows still ends the capture: a graph that misses work never replays.
pub fn a_swallowed_error_does_not_make_a_graph(device: &Device) {
    let mut runner = runner(device);
    let x = iota(device, &[16], 1.0);
    let mut graph = BreakableCudaGraph::<Trouble, Tensor>::new("swallowed");
    let error = failure(graph.capture(&mut runner, &Trouble::Error, move |cx| {
        let failed = troubled(cx, &x);
        assert!(failed.is_err());
        axpy(cx, 1.0, &x, &x)
    }));
    assert!(matches!(error.root(), Error::CaptureState { .. }), "{error}");
    assert_usable(&mut runner);
}

/// A failing forward, eager or in a tail, returns its error and leaves the runner usable.
pub fn an_error_in_an_eager_run_is_returned_as_it_is(device: &Device) {
    let mut runner = runner(device);
    let x = iota(device, &[16], 1.0);
    for (kind, cause) in [(Trouble::Error, "the cause"), (Trouble::Panic, "panicked: the cause")] {
        let error = failure(runner.eager(&kind, |cx| troubled(cx, &x)));
        assert_eq!(error.to_string(), cause);
        let error = failure(runner.tail(&kind, |cx| trouble(*cx.live())));
        assert_eq!(error.to_string(), cause);
        assert_usable(&mut runner);
    }
}

/// A replay without a capture is refused, and says why there is none.
pub fn a_replay_without_a_capture_is_refused(device: &Device) {
    let mut runner = runner(device);
    let mut graph = Graph::new("mine");
    let refused = |graph: &mut Graph, runner: &mut Runner| failure(graph.replay(runner, &batch(1.0))).to_string();
    assert_eq!(refused(&mut graph, &mut runner), "graph `mine` holds no capture: it was never captured");
    let x = iota(device, &[16], 1.0);
    graph.capture(&mut runner, &batch(1.0), move |cx| scaled(cx, &x)).expect("a capture");
    graph.replay(&mut runner, &batch(1.0)).expect("a replay");
    failure(graph.capture(&mut runner, &batch(1.0), |_| Err(Error::other("no"))));
    assert_eq!(refused(&mut graph, &mut runner), "graph `mine` holds no capture: its last capture failed");
    graph.reset();
    assert_eq!(refused(&mut graph, &mut runner), "graph `mine` holds no capture: it was reset");
    assert_usable(&mut runner);
}

/// A break runs after the segment before it, whose failure it must not hide: nothing is replayed past an error.
pub fn nothing_runs_after_the_first_error_of_a_replay(device: &Device) {
    let mut runner = runner(device);
    let cell = device.zeros(&[1], DType::I32).expect("a cell");
    let x = iota(device, &[16], 1.0);
    let counted = cell.clone();
    let mut graph = BreakableCudaGraph::<Trouble, Tensor>::new("stops");
    graph
        .capture(&mut runner, &Trouble::No, move |cx| {
            let y = troubled(cx, &x)?;
            count(cx, &counted)?;
            troubled(cx, &y)
        })
        .expect("a capture");
    failure(graph.replay(&mut runner, &Trouble::Error));
    assert_eq!(runner.read::<i32>(&cell).expect("a read"), [1], "the segment after the failed break did not run");
}

/// The number of breaks is checked against the expected one, and an error lists the captured ones.
pub fn the_census_of_breaks_is_checked(device: &Device) {
    let mut runner = runner(device);
    let mut options = GraphOptions::default();
    options.expected_breaks = Some(3);
    let mut graph = Graph::with_options("census", options);
    let x = iota(device, &[16], 1.0);
    let error = failure(graph.capture(&mut runner, &batch(1.0), move |cx| {
        let y = scaled(cx, &x)?;
        scaled(cx, &y)
    }));
    let message = "break census: expected 3 breaks, captured 2 (scaled, scaled); annotate the missing function, or \
                   correct the expected number";
    assert_eq!(error.to_string(), message);
    assert_usable(&mut runner);
}

#[eager_on_graph]
fn impure(cx: &mut Eager<'_, Batch>, x: &Tensor, cell: &Tensor) -> Result<Tensor> {
    count(cx, cell)?;
    let runs = cx.read::<i32>(cell)?[0];
    axpy(cx, runs as f32, x, x)
}

/// A verified replay returns the output if it equals an eager run, and else names the first place that differs.
pub fn a_verified_replay_names_the_first_difference(device: &Device) {
    let mut runner = runner(device);
    let (x, cell) = (iota(device, &[16], 1.0), device.zeros(&[1], DType::I32).expect("a cell"));
    let mut graph = Graph::new("verified");
    let pure = x.clone();
    graph.capture(&mut runner, &batch(1.0), move |cx| scaled(cx, &pure)).expect("a capture");
    let verified = graph.replay_verified(&mut runner, &batch(3.0)).expect("a replay like eager");
    assert_eq!(runner.read::<f32>(&verified).expect("a read")[0], 4.0);
    graph
        .capture(&mut runner, &batch(1.0), move |cx| {
            let y = impure(cx, &x, &cell)?;
            let y = step(cx, &y)?;
            scaled(cx, &y)
        })
        .expect("a capture");
    let error = failure(graph.replay_verified(&mut runner, &batch(1.0))).to_string();
    // The counter itself is persistent, so it is not compared; what was computed from it is.
    let start = "graph `verified`: replay differs from eager first in segment 1, before break `scaled` (";
    assert!(error.starts_with(start) && error.ends_with(" of 64 bytes differ"), "{error}");
    assert_usable(&mut runner);
}

/// The messages of the errors that need no driver, word for word.
pub fn the_message_of_each_error_is_pinned(device: &Device) {
    let mut runner = runner(device);
    let x = iota(device, &[4, 3], 1.0);
    let pinned = |error: Error, message: &str| assert_eq!(error.to_string(), message);
    let other = runner.eager(&(), |cx| cx.empty(&[2], DType::F32)).expect("a tensor");
    runner.eager(&(), |_| Ok(())).expect("the next forward");
    let forward = 2;
    pinned(
        failure(runner.read::<f32>(&other)),
        &format!(
            "stale tensor: it belongs to forward {} of its arena, which now runs forward {forward}; keep a copy in a \
             persistent tensor (Device::empty) to use it later",
            forward - 1
        ),
    );
    pinned(
        failure(device.read::<f32>(&other)),
        &format!(
            "foreign tensor: it lives on a runner's arena, but the work goes to {} outside that runner (use Runner::read)",
            device.name()
        ),
    );
    pinned(failure(device.read::<i32>(&x)), "Device::read: expected i32, got f32");
    pinned(failure(device.write(&x, &[1.0f32])), "Device::write: expected 48 bytes for [4, 3] f32, got 4 bytes");
    pinned(failure(x.rows(2..5)), "Tensor::rows: expected a range within 0..4, got 2..5");
    let columns = "Tensor::columns: expected a matrix and a range within its columns, got [4, 3] and 1..4";
    pinned(failure(x.columns(1..4)), columns);
    let reshape = failure(x.columns(0..2).expect("columns").reshape(&[8]));
    pinned(reshape, "Tensor::reshape: expected [8], got row-sliced [4, 2]");
    pinned(
        failure(device.empty(&[1; 5], DType::F32)),
        "Device::empty: expected 1 to 4 dimensions, got [1, 1, 1, 1, 1]",
    );
    let copy = runner.eager(&(), |cx| cx.copy(&x, &x.rows(0..2)?));
    pinned(failure(copy), "OpStream::copy: expected f32 [4, 3], got f32 [2, 3]");
    pinned(
        failure(runner.eager(&padded(1.0, 7, 6), |_| Ok(()))),
        "LiveBatch::rows: 7 valid rows do not fit into 6 padded rows",
    );
    pinned(
        failure(runner.eager(&(), |cx| cx.side_stream("mine"))),
        "OpStream::side_stream: side stream `mine` needs a scope, which joins it: use OpStream::scope",
    );
    let generation = Generation::new("weights");
    let w = iota(device, &[2], 0.0).stamped(&generation).expect("a stamp");
    pinned(
        failure(w.clone().stamped(&generation)),
        "Tensor::stamped: the tensor has a generation already; stamp each tensor once, when it is made",
    );
    generation.advance();
    pinned(
        failure(runner.eager(&(), |cx| cx.addr(&w))),
        "weights changed after the capture (generation 0 captured, 1 now); capture the graph again",
    );
    let mapped = runner.arena_stats().mapped_bytes;
    let mut graph = BreakableCudaGraph::<(), ()>::new("full");
    pinned(
        failure(graph.capture(&mut runner, &(), move |cx| cx.empty(&[mapped + 256], DType::U8).map(drop))),
        &format!(
            "segment 0: arena: {} bytes do not fit: 0 of {mapped} bytes in use; the arena cannot grow inside a segment: \
             run the forward eagerly once before its capture, or raise RunnerOptions::arena_bytes",
            mapped + 256
        ),
    );
    runner.release_memory().expect("a release");
    pinned(
        failure(runner.eager(&(), |_| Ok(()))),
        "Runner::release_memory: the arena's memory is released; call Runner::restore_memory first",
    );
}

#[eager_on_graph]
fn out_of_bounds(cx: &mut Eager<'_, Trouble>, x: &Tensor, cell: &Arc<Tensor>) -> Result<Tensor> {
    if *cx.live() == Trouble::Kernel {
        read_beyond(cx, x, 1 << 30, cell)?;
    }
    axpy(cx, 1.0, x, x)
}

/// A kernel that fails while it runs is reported by the next wait, once, and the host device stays usable. On CUDA such a
/// failure ends the context, so there the rule asks for nothing.
pub fn a_failing_kernel_is_reported_by_the_next_wait(device: &Device) {
    if device.host_control().is_none() {
        return;
    }
    let mut runner = runner(device);
    let (x, cell) = (iota(device, &[16], 1.0), Arc::new(device.zeros(&[1], DType::F32).expect("a cell")));
    let mut graph = BreakableCudaGraph::<Trouble, Tensor>::new("kernel");
    graph.capture(&mut runner, &Trouble::No, move |cx| out_of_bounds(cx, &x, &cell)).expect("a capture");
    let output = graph.replay(&mut runner, &Trouble::Kernel).expect("the failure is not known yet");
    let error = failure(runner.read::<f32>(&output));
    assert!(matches!(&error, Error::Memory { kernel, .. } if kernel == "read_beyond"), "{error}");
    let output = graph.replay(&mut runner, &Trouble::No).expect("a replay");
    assert_eq!(runner.read::<f32>(&output).expect("a read")[0], 2.0);
    assert_usable(&mut runner);
}
