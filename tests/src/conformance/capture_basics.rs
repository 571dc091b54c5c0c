//! What is captured, where it breaks, and that a capture is also a run.

use std::sync::{Arc, Barrier, Mutex};

use bcg_runtime::{
    BreakableCudaGraph, Context, DType, Device, Eager, Error, Freeze, LiveBatch, ReplayMode, ReplayPath, Result,
    Tensor, eager_on_graph,
};

use super::fixture::{
    Batch, Graph, assert_like_eager, batch, batches, bits, census, failure, iota, replays_like_eager, runner, scaled,
    step,
};
use super::kernels::{axpy, count};

/// A forward without a break is one segment.
pub fn no_break_gives_one_segment(device: &Device) {
    let x = iota(device, &[40], 1.0);
    let graph = assert_like_eager(&mut runner(device), &batches(), move |cx| {
        let y = step(cx, &x)?;
        step(cx, &y)
    });
    assert_eq!(census(&graph), (1, 0));
    assert_eq!(graph.describe().segments[0].kernels, ["add_index", "add_index"]);
}

/// A break ends one segment and begins another.
pub fn one_break_gives_two_segments(device: &Device) {
    let x = iota(device, &[40], 1.0);
    let graph = assert_like_eager(&mut runner(device), &batches(), move |cx| {
        let y = step(cx, &x)?;
        let y = scaled(cx, &y)?;
        step(cx, &y)
    });
    assert_eq!(census(&graph), (2, 1));
    let description = graph.describe();
    assert_eq!((description.breaks[0].name, description.breaks[0].after_segment), ("scaled", 0));
    assert_eq!((description.breaks[0].num_launches, description.breaks[0].num_args), (1, 1));
}

/// `n` breaks give `n + 1` segments.
pub fn many_breaks_give_one_segment_more(device: &Device) {
    let x = iota(device, &[10], 0.0);
    let graph = assert_like_eager(&mut runner(device), &[0.5, 1.0, -0.5].map(batch), move |cx| {
        let mut y = step(cx, &x)?;
        for _ in 0..7 {
            y = scaled(cx, &y)?;
            y = step(cx, &y)?;
        }
        Ok(y)
    });
    assert_eq!(census(&graph), (8, 7));
}

/// A break may come before any captured work.
pub fn a_break_may_come_first(device: &Device) {
    let x = iota(device, &[10], 0.0);
    let graph = assert_like_eager(&mut runner(device), &batches(), move |cx| {
        let y = scaled(cx, &x)?;
        step(cx, &y)
    });
    assert_eq!(census(&graph), (2, 1));
    assert!(graph.describe().segments[0].is_empty);
}

/// A break may come after all captured work, and its output is the forward's.
pub fn a_break_may_come_last(device: &Device) {
    let x = iota(device, &[10], 0.0);
    let graph = assert_like_eager(&mut runner(device), &batches(), move |cx| {
        let y = step(cx, &x)?;
        scaled(cx, &y)
    });
    assert_eq!(census(&graph), (2, 1));
    assert!(graph.describe().segments[1].is_empty);
}

/// Two breaks may follow each other.
pub fn two_breaks_may_come_in_a_row(device: &Device) {
    let x = iota(device, &[10], 0.0);
    let graph = assert_like_eager(&mut runner(device), &batches(), move |cx| {
        let y = step(cx, &x)?;
        let y = scaled(cx, &y)?;
        let y = scaled(cx, &y)?;
        step(cx, &y)
    });
    assert_eq!(census(&graph), (3, 2));
    assert!(graph.describe().segments[1].is_empty);
}

/// Breaks may stand first, last, in a row and in between.
pub fn breaks_may_stand_everywhere(device: &Device) {
    let x = iota(device, &[10], 0.0);
    let graph = assert_like_eager(&mut runner(device), &[1.0, -2.0, 0.0].map(batch), move |cx| {
        let y = scaled(cx, &x)?;
        let y = scaled(cx, &y)?;
        let y = step(cx, &y)?;
        let z = scaled(cx, &y)?;
        let z = axpy(cx, 2.0, &z, &y)?;
        let z = scaled(cx, &z)?;
        scaled(cx, &z)
    });
    assert_eq!(census(&graph), (6, 5));
}

/// Segments without work are legal, and replaying them launches no graph; a healed replay is one launch, of the breaks.
pub fn an_empty_segment_costs_no_launch(device: &Device) {
    let x = iota(device, &[10], 0.0);
    let mut runner = runner(device);
    let mut graph = assert_like_eager(&mut runner, &batches(), move |cx| {
        cx.break_graph()?;
        let y = scaled(cx, &x)?;
        scaled(cx, &y)
    });
    let description = graph.describe();
    assert_eq!(description.segments.len(), 4);
    assert!(description.segments.iter().all(|segment| segment.is_empty && segment.num_nodes == 0));
    if let Some(control) = device.host_control() {
        let mark = control.num_calls();
        graph.replay(&mut runner, &batch(2.0)).expect("a replay");
        let launches = control.calls_since(mark).iter().filter(|call| **call == "cuGraphLaunch").count();
        assert_eq!(launches, usize::from(graph.last_replay() == Some(ReplayPath::Healed)));
    }
}

/// A break may lie deep in the call stack of captured code.
pub fn a_break_may_lie_deep_in_the_call_stack(device: &Device) {
    fn descend(cx: &mut Context<'_, Batch>, x: &Tensor, depth: usize) -> Result<Tensor> {
        let y = step(cx, x)?;
        let y = if depth == 0 { scaled(cx, &y)? } else { descend(cx, &y, depth - 1)? };
        step(cx, &y)
    }
    let x = iota(device, &[10], 0.0);
    let graph = assert_like_eager(&mut runner(device), &batches(), move |cx| descend(cx, &x, 20));
    assert_eq!(census(&graph), (2, 1));
    assert_eq!(graph.describe().segments[0].kernels.len(), 21);
}

struct Layer {
    weight: Tensor,
}

impl Layer {
    #[eager_on_graph]
    fn forward(self: &Arc<Self>, cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
        let scale = cx.live().scale;
        axpy(cx, scale, x, &self.weight)
    }
}

/// A method of a shared layer may be a break.
pub fn a_break_may_be_a_method(device: &Device) {
    let x = iota(device, &[10], 0.0);
    let layer = Arc::new(Layer { weight: iota(device, &[10], 5.0) });
    let graph = assert_like_eager(&mut runner(device), &batches(), move |cx| {
        let y = step(cx, &x)?;
        layer.forward(cx, &y)
    });
    assert_eq!(graph.describe().breaks[0].name, "forward");
}

#[eager_on_graph]
fn generic_break<L: LiveBatch, S: Freeze + Copy + Into<f32>>(
    cx: &mut Eager<'_, L>,
    x: &Tensor,
    scale: S,
) -> Result<Tensor> {
    axpy(cx, scale.into(), x, x)
}

/// A generic function may be a break; its instances are independent.
pub fn a_break_may_be_a_generic_function(device: &Device) {
    let x = iota(device, &[10], 0.0);
    let graph = assert_like_eager(&mut runner(device), &batches(), move |cx| {
        let y = generic_break(cx, &x, 3.0f32)?;
        let y = step(cx, &y)?;
        let y = generic_break(cx, &y, 2u8)?;
        scaled(cx, &y)
    });
    assert_eq!(census(&graph), (4, 3));
}

#[eager_on_graph]
fn note(cx: &mut Eager<'_, Batch>, notes: &Arc<Mutex<Vec<(f32, bool)>>>, x: &Tensor) -> Result<()> {
    let seen = (cx.live().scale, cx.is_capturing());
    notes.lock().expect("notes").push(seen);
    let _ = x;
    Ok(())
}

/// Outside a capture, an annotated function is a plain call with the live batch.
pub fn an_annotated_call_outside_a_capture_is_a_plain_call(device: &Device) {
    let notes = Arc::new(Mutex::new(Vec::new()));
    let x = iota(device, &[10], 0.0);
    let mut runner = runner(device);
    let sum = runner.eager(&batch(7.0), |cx| {
        let y = scaled(cx, &x)?;
        note(cx, &notes, &y)?;
        Ok(y)
    });
    let sum = runner.read::<f32>(&sum.expect("an eager run")).expect("a read");
    assert_eq!(sum, (0..10).map(|i| 8.0 * i as f32).collect::<Vec<_>>());
    assert_eq!(*notes.lock().expect("notes"), [(7.0, false)]);
}

#[eager_on_graph(enable = false)]
fn disabled(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    assert_eq!(cx.is_capturing(), x.num_elements() == 10, "it runs in whatever mode the caller is in");
    axpy(cx, 3.0, x, x)
}

/// With `enable = false` the function is a plain call, captured like all code around it.
pub fn a_disabled_break_is_captured_like_the_code_around_it(device: &Device) {
    let mut runner = runner(device);
    let x = iota(device, &[10], 0.0);
    let mut graph = Graph::new("disabled");
    let forward = move |cx: &mut Context<'_, Batch>| {
        let y = step(cx, &x)?;
        let y = disabled(cx, &y)?;
        step(cx, &y)
    };
    let captured = graph.capture(&mut runner, &batch(1.0), forward).expect("a capture");
    let captured = bits(&mut runner, &captured);
    assert_eq!(census(&graph), (1, 0));
    assert_eq!(graph.describe().segments[0].kernels, ["add_index", "axpy", "add_index"]);
    let replayed = graph.replay(&mut runner, &batch(1.0)).expect("a replay");
    assert_eq!(bits(&mut runner, &replayed), captured);
    let x = iota(device, &[11], 0.0);
    runner.eager(&batch(1.0), |cx| disabled(cx, &x)).expect("an eager call");
}

/// `break_graph` ends a segment and begins another one without a break between them.
pub fn break_graph_splits_a_segment(device: &Device) {
    let x = iota(device, &[10], 0.0);
    let graph = assert_like_eager(&mut runner(device), &batches(), move |cx| {
        let y = step(cx, &x)?;
        cx.break_graph()?;
        let y = step(cx, &y)?;
        cx.break_graph()?;
        cx.break_graph()?;
        step(cx, &y)
    });
    assert_eq!(census(&graph), (4, 0));
    let is_empty: Vec<bool> = graph.describe().segments.iter().map(|segment| segment.is_empty).collect();
    assert_eq!(is_empty, [false, false, true, false]);
}

#[eager_on_graph]
fn outer(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    assert!(!cx.is_capturing());
    let y = scaled(cx, x)?;
    cx.break_graph()?; // no segment is open, so there is nothing to split
    let z = scaled(cx, &y)?;
    axpy(cx, 1.0, &y, &z)
}

/// A break inside a break is a plain call: it makes no segment.
pub fn a_break_inside_a_break_is_a_plain_call(device: &Device) {
    let x = iota(device, &[10], 0.0);
    let graph = assert_like_eager(&mut runner(device), &batches(), move |cx| {
        let y = step(cx, &x)?;
        let y = outer(cx, &y)?;
        step(cx, &y)
    });
    assert_eq!(census(&graph), (2, 1));
    assert_eq!(graph.describe().breaks[0].name, "outer");
}

#[eager_on_graph]
fn capture_in_break(cx: &mut Eager<'_, Batch>, inner: &Arc<Mutex<bcg_runtime::Runner>>, x: &Tensor) -> Result<Tensor> {
    refused_capture(inner);
    axpy(cx, 1.0, x, x)
}

fn refused_capture(inner: &Mutex<bcg_runtime::Runner>) {
    let mut inner = inner.lock().expect("the inner runner");
    let mut graph = Graph::new("inner");
    let error = failure(graph.capture(&mut inner, &batch(1.0), |cx| cx.empty(&[1], DType::F32)));
    assert!(matches!(error, Error::CaptureState { .. }), "{error}");
    assert!(!graph.is_captured());
}

/// A capture inside captured code, or inside a break of one, is refused; the outer capture goes on.
pub fn a_nested_capture_is_refused_and_the_outer_one_survives(device: &Device) {
    let inner = Arc::new(Mutex::new(runner(device)));
    let (x, also_inner) = (iota(device, &[10], 0.0), Arc::clone(&inner));
    let mut graph = Graph::new("outer");
    let mut runner = runner(device);
    let captured = graph.capture(&mut runner, &batch(2.0), move |cx| {
        let y = step(cx, &x)?;
        refused_capture(&also_inner);
        let y = capture_in_break(cx, &also_inner, &y)?;
        scaled(cx, &y)
    });
    let captured = bits(&mut runner, &captured.expect("the outer capture"));
    let expected: Vec<u32> = (0..10).map(|i| (12.0 * i as f32).to_bits()).collect();
    assert_eq!((census(&graph), captured), ((3, 2), expected));
    let mut other = Graph::new("after");
    let mut inner = inner.lock().expect("the inner runner");
    other
        .capture(&mut inner, &batch(1.0), |cx| {
            let zeros = cx.empty(&[4], DType::F32)?;
            cx.fill_zero(&zeros)?;
            Ok(zeros)
        })
        .expect("a capture of its own");
}

/// Two threads may capture on two streams of one device at once.
pub fn two_threads_capture_on_two_streams_at_once(device: &Device) {
    let barrier = Arc::new(Barrier::new(2));
    let runners = [1.0, 100.0].map(|start| (start, runner(device), iota(device, &[64], start)));
    std::thread::scope(|threads| {
        for (start, mut runner, x) in runners {
            let barrier = Arc::clone(&barrier);
            threads.spawn(move || {
                let mut graph = Graph::new("thread");
                let captured_x = x.clone();
                let captured = graph.capture(&mut runner, &batch(start), move |cx| {
                    let y = step(cx, &captured_x)?;
                    barrier.wait(); // both segments are open
                    let y = step(cx, &y)?;
                    barrier.wait();
                    let y = scaled(cx, &y)?;
                    step(cx, &y)
                });
                let captured = bits(&mut runner, &captured.expect("a capture"));
                let forward = |cx: &mut Context<'_, Batch>| {
                    let y = step(cx, &x)?;
                    let y = step(cx, &y)?;
                    let y = scaled(cx, &y)?;
                    step(cx, &y)
                };
                let eager = runner.eager(&batch(start), forward).expect("an eager run");
                assert_eq!(captured, bits(&mut runner, &eager));
                replays_like_eager(&mut runner, &mut graph, &batches(), forward);
            });
        }
    });
}

/// The output of a capture is that of an eager run: its segments ran, and its breaks saw real data.
pub fn the_output_of_a_capture_equals_eager(device: &Device) {
    let x = iota(device, &[3, 7], 0.0);
    let mut runner = runner(device);
    let forward = move |cx: &mut Context<'_, Batch>| {
        let y = scaled(cx, &x)?;
        let y = step(cx, &y)?;
        let z = scaled(cx, &y)?;
        axpy(cx, 0.5, &z, &y)
    };
    let eager = runner.eager(&batch(6.0), &forward).expect("an eager run");
    let eager = bits(&mut runner, &eager);
    let mut graph = Graph::new("run");
    let captured = graph.capture(&mut runner, &batch(6.0), forward).expect("a capture");
    assert_eq!(bits(&mut runner, &captured), eager);
}

/// A capture ahead runs neither segments nor breaks; its replays equal eager runs.
pub fn a_capture_ahead_runs_nothing_and_replays_like_eager(device: &Device) {
    let (x, written) = (iota(device, &[40], 1.0), iota(device, &[40], 7.0));
    let mut runner = runner(device);
    let to = written.clone();
    let forward = move |cx: &mut Context<'_, Batch>| {
        let y = step(cx, &x)?;
        let y = scaled(cx, &y)?;
        cx.copy(&to, &y)?;
        let y = scaled(cx, &y)?;
        step(cx, &y)
    };
    runner.eager(&batch(1.0), &forward).expect("an eager run, which sizes the arena");
    let before = bits(&mut runner, &written);
    let mut graph = Graph::new("ahead");
    graph.capture_ahead(&mut runner, &batch(9.0), forward.clone()).expect("a capture");
    assert_eq!(bits(&mut runner, &written), before, "something ran");
    assert_eq!(census(&graph), (3, 2));
    assert_eq!(graph.describe().breaks[1].num_launches, 1);
    replays_like_eager(&mut runner, &mut graph, &batches(), forward);
}

/// A break that reads back cannot be captured without a run, so it is captured with one, even if it hides the refusal.
pub fn a_break_that_reads_back_is_captured_ahead_with_a_run(device: &Device) {
    #[eager_on_graph]
    fn sum_or_zero(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
        let sum: f32 = cx.read::<f32>(x).map_or(0.0, |values| values.iter().sum());
        axpy(cx, sum, x, x)
    }
    let x = iota(device, &[4], 1.0);
    let mut runner = runner(device);
    let forward = move |cx: &mut Context<'_, Batch>| {
        let y = step(cx, &x)?;
        let y = sum_or_zero(cx, &y)?;
        step(cx, &y)
    };
    let mut graph = Graph::new("ahead");
    graph.capture_ahead(&mut runner, &batch(1.0), forward.clone()).expect("a capture");
    assert_eq!(census(&graph), (2, 1));
    replays_like_eager(&mut runner, &mut graph, &batches(), forward);
}

/// Segments with the same kernels share an executable; those with others never do, and all replay like eager runs.
pub fn equal_segments_share_an_executable(device: &Device) {
    let x = iota(device, &[40], 1.0);
    let mut runner = runner(device);
    let forward = move |cx: &mut Context<'_, Batch>| {
        let mut y = step(cx, &x)?;
        for i in 0..6 {
            y = scaled(cx, &y)?;
            y = step(cx, &y)?;
            if i == 3 {
                y = axpy(cx, 2.0, &y, &y)?;
            }
        }
        Ok(y)
    };
    let mut num_execs = |mode| {
        runner.set_replay_mode(mode);
        let before = device.live_objects().execs;
        let mut graph = Graph::new("shared");
        let captured = graph.capture(&mut runner, &batch(2.0), forward.clone()).expect("a capture");
        let captured = bits(&mut runner, &captured);
        let eager = runner.eager(&batch(2.0), &forward).expect("an eager run");
        assert_eq!(captured, bits(&mut runner, &eager), "a capture is also a run");
        assert_eq!(census(&graph), (7, 6));
        replays_like_eager(&mut runner, &mut graph, &batches(), &forward);
        device.live_objects().execs - before
    };
    assert_eq!(num_execs(ReplayMode::Chain), 2, "seven segments of two kinds");
    assert_eq!(num_execs(ReplayMode::Healed), 1, "a merged one");
}

/// `is_capturing` is true in captured code only: not in breaks, not at replay, not in eager runs.
pub fn only_captured_code_is_capturing(device: &Device) {
    let notes = Arc::new(Mutex::new(Vec::new()));
    let x = iota(device, &[10], 0.0);
    let mut runner = runner(device);
    let in_forward = Arc::clone(&notes);
    let forward = move |cx: &mut Context<'_, Batch>| {
        in_forward.lock().expect("notes").push((0.0, cx.is_capturing()));
        note(cx, &in_forward, &x)?;
        in_forward.lock().expect("notes").push((0.0, cx.is_capturing()));
        Ok(x.clone())
    };
    let mut graph = Graph::new("modes");
    let take = || std::mem::take(&mut *notes.lock().expect("notes"));
    graph.capture(&mut runner, &batch(1.0), forward.clone()).expect("a capture");
    assert_eq!(take(), [(0.0, true), (1.0, false), (0.0, true)]);
    graph.replay(&mut runner, &batch(2.0)).expect("a replay");
    assert_eq!(take(), [(2.0, false)], "a replay runs the breaks and nothing else");
    runner.eager(&batch(3.0), forward).expect("an eager run");
    assert_eq!(take(), [(0.0, false), (3.0, false), (0.0, false)]);
}

/// A graph may have ten thousand segments.
pub fn ten_thousand_segments_are_legal(device: &Device) {
    const SEGMENTS: usize = 10_000;
    let cell = device.zeros(&[1], DType::I32).expect("a cell");
    let mut runner = runner(device);
    let mut graph = BreakableCudaGraph::<(), ()>::new("long");
    let counted = cell.clone();
    let forward = move |cx: &mut Context<'_, ()>| {
        for index in 0..SEGMENTS {
            if index > 0 {
                cx.break_graph()?;
            }
            count(cx, &counted)?;
        }
        Ok(())
    };
    graph.capture(&mut runner, &(), forward).expect("a capture");
    assert_eq!(graph.describe().segments.len(), SEGMENTS);
    graph.replay(&mut runner, &()).expect("a replay");
    assert_eq!(runner.read::<i32>(&cell).expect("a read"), [2 * SEGMENTS as i32]);
}

/// A matrix product is captured like a kernel: the segment names it, and a replay computes it anew.
pub fn a_matrix_product_is_captured_like_a_kernel(device: &Device) {
    let x = iota(device, &[6, 16], 1.0);
    let weight = iota(device, &[8, 16], -3.0);
    let graph = assert_like_eager(&mut runner(device), &batches(), move |cx| {
        let y = step(cx, &x)?;
        let y = scaled(cx, &y)?;
        let z = cx.empty(&[6, 8], DType::F32)?;
        cx.matmul(&z, &y, &weight)?;
        let z = scaled(cx, &z)?;
        let beside = cx.empty(&[6, 6], DType::F32)?;
        cx.scope(|cx| {
            let side = cx.side_stream("product")?;
            cx.on(&side, |cx| cx.matmul(&beside, &z, &z))
        })?;
        Ok(beside)
    });
    let segments = graph.describe().segments;
    assert_eq!((&segments[1].kernels[..], &segments[2].kernels[..]), (&["matmul"][..], &["matmul"][..]));
}
