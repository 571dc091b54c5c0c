//! How what a break returns crosses to the work after it (law L3).

use std::sync::{Arc, Mutex};

use bcg_runtime::{
    BreakableCudaGraph, Bridge, Context, DType, Device, Eager, Freeze, Live, LiveBatch, Result, Tensor, eager_on_graph,
};

use super::fixture::{
    Batch, Graph, assert_like_eager, batch, batches, bits, census, failure, iota, runner, scaled, step,
};
use super::kernels::{axpy, axpy_into};

#[eager_on_graph]
fn note_address(cx: &mut Eager<'_, Batch>, notes: &Arc<Mutex<Vec<u64>>>, x: &Tensor) -> Result<()> {
    let address = cx.addr(x)?.as_u64();
    notes.lock().expect("notes").push(address);
    Ok(())
}

/// What a break allocates and returns lies at the same address at each replay, so nothing is copied.
pub fn a_returned_tensor_keeps_its_address(device: &Device) {
    let notes = Arc::new(Mutex::new(Vec::new()));
    let (x, noted) = (iota(device, &[100], 0.0), Arc::clone(&notes));
    let mut runner = runner(device);
    let mut graph = Graph::new("address");
    let forward = move |cx: &mut Context<'_, Batch>| {
        let y = step(cx, &x)?;
        let z = scaled(cx, &y)?;
        note_address(cx, &noted, &z)?;
        step(cx, &z)
    };
    graph.capture(&mut runner, &batch(1.0), forward).expect("a capture");
    for scale in [2.0, 3.0] {
        graph.replay(&mut runner, &batch(scale)).expect("a replay");
    }
    let notes = notes.lock().expect("notes");
    assert_eq!((notes.len(), notes[1], notes[2]), (3, notes[0], notes[0]));
    assert_eq!(runner.stats().bridge_copied_bytes, 0);
}

#[derive(Clone, Freeze, Bridge)]
struct Routed {
    inputs: Tensor,
    parts: Vec<Tensor>,
    rest: Option<Tensor>,
}

#[eager_on_graph]
fn two_tensors(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<(Tensor, [Tensor; 2])> {
    let scale = cx.live().scale;
    let y = axpy(cx, scale, x, x)?;
    let z = axpy(cx, scale, &y, x)?;
    let w = axpy(cx, scale, &z, x)?;
    Ok((w, [z, y]))
}

#[eager_on_graph]
fn a_struct(cx: &mut Eager<'_, Batch>, x: &Tensor, has_rest: bool) -> Result<Routed> {
    let scale = cx.live().scale;
    let inputs = axpy(cx, scale, x, x)?;
    let parts = (0..3).map(|i| axpy(cx, i as f32, &inputs, x)).collect::<Result<Vec<_>>>()?;
    let rest = if has_rest { Some(axpy(cx, 0.5, &inputs, x)?) } else { None };
    Ok(Routed { inputs, parts, rest })
}

/// Tuples, arrays, vectors, options and derived structs cross a break element by element.
pub fn tuples_and_structs_cross_a_break(device: &Device) {
    let x = iota(device, &[2, 6], 1.0);
    let mut runner = runner(device);
    let graph = assert_like_eager(&mut runner, &batches(), move |cx| {
        let (w, [z, y]) = two_tensors(cx, &x)?;
        let sum = axpy(cx, 2.0, &w, &z)?;
        let sum = axpy(cx, 3.0, &y, &sum)?;
        let with_rest = a_struct(cx, &sum, true)?;
        let without = a_struct(cx, &with_rest.parts[2], false)?;
        assert!(without.rest.is_none());
        let mut sum = axpy(cx, 1.0, &without.inputs, &with_rest.inputs)?;
        for part in with_rest.parts.iter().chain(&with_rest.rest).chain(&without.parts) {
            sum = axpy(cx, 1.0, part, &sum)?;
        }
        Ok(sum)
    });
    let bytes: Vec<usize> = graph.describe().breaks.iter().map(|step| step.bridge_bytes / 48).collect();
    assert_eq!((census(&graph), bytes), ((4, 3), vec![3, 5, 4]));
    assert_eq!(runner.stats().bridge_copied_bytes, 0);
}

#[eager_on_graph]
fn fresh_or(cx: &mut Eager<'_, Batch>, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let scale = cx.live().scale;
    if scale > 0.0 {
        return axpy(cx, 2.0, a, a);
    }
    Ok(if scale < -1.0 { b.clone() } else { a.clone() })
}

/// Storage other than the captured one is copied into the bridge at replay, and its bytes are counted.
pub fn other_storage_is_copied_into_the_bridge_and_counted(device: &Device) {
    let mut runner = runner(device);
    let (a, b) = (iota(device, &[4, 8], 0.0), iota(device, &[4, 8], 100.0));
    let (left, right) = (a.columns(0..3).expect("columns"), b.columns(5..8).expect("columns"));
    let mut graph = Graph::new("other storage");
    let forward = move |cx: &mut Context<'_, Batch>| {
        let a = axpy(cx, 1.0, &left, &left)?;
        let c = fresh_or(cx, &a, &right)?;
        let d = fresh_or(cx, &right, &left)?;
        let sum = axpy(cx, 3.0, &c, &d)?;
        axpy(cx, 1.0, &sum, &a)
    };
    graph.capture(&mut runner, &batch(1.0), forward.clone()).expect("a capture");
    for (scale, copied) in [(1.0, 0), (-1.0, 96), (1.0, 0), (-2.0, 96), (-1.0, 96)] {
        let before = runner.stats().bridge_copied_bytes;
        let replayed = graph.replay(&mut runner, &batch(scale)).expect("a replay");
        assert_eq!(runner.stats().bridge_copied_bytes - before, copied, "scale {scale}");
        let replayed = bits(&mut runner, &replayed);
        let eager = runner.eager(&batch(scale), &forward).expect("an eager run");
        assert_eq!(replayed, bits(&mut runner, &eager), "scale {scale}");
    }
}

/// An output that was an argument at capture must be it at replay: a copy into it would overwrite the argument.
pub fn an_argument_that_was_returned_is_never_overwritten(device: &Device) {
    let mut runner = runner(device);
    let (a, b) = (iota(device, &[6], 0.0), iota(device, &[6], 100.0));
    let (captured_a, captured_b) = (a.clone(), b.clone());
    let mut graph = Graph::new("argument");
    let forward = move |cx: &mut Context<'_, Batch>| {
        let c = fresh_or(cx, &captured_a, &captured_b)?;
        axpy(cx, 1.0, &c, &captured_a)
    };
    graph.capture(&mut runner, &batch(-1.0), forward).expect("a capture");
    for scale in [1.0, -2.0] {
        let error = failure(graph.replay(&mut runner, &batch(scale))).to_string();
        let message = "): output of the break: expected the argument or persistent tensor that was returned at capture, got \
                       other memory, which a copy would put in its place";
        assert!(error.ends_with(message), "{error}");
    }
    let replayed = graph.replay(&mut runner, &batch(-1.0)).expect("a replay");
    let expected: Vec<f32> = (0..6).map(|i| 2.0 * i as f32).collect();
    assert_eq!(runner.read::<f32>(&replayed).expect("a read"), expected);
}

#[eager_on_graph]
fn swaps(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<(Tensor, Tensor)> {
    let live = cx.live().scale;
    let scratch = if live > 0.0 { Some(cx.empty(x.shape(), x.dtype())?) } else { None };
    let first = axpy(cx, 2.0, x, x)?;
    let second = axpy(cx, 4.0, x, x)?;
    drop(scratch);
    Ok((second, first))
}

/// Where one output lies in the bridge of another, neither is overwritten before it was copied.
pub fn outputs_that_changed_places_are_all_carried(device: &Device) {
    for captured in [0.0, 1.0] {
        let x = iota(device, &[100], 1.0);
        assert_like_eager(&mut runner(device), &[captured, 1.0, 0.0].map(batch), move |cx| {
            let y = step(cx, &x)?;
            let (second, first) = swaps(cx, &y)?;
            axpy(cx, 7.0, &second, &first)
        });
    }
}

#[eager_on_graph]
fn with_scratch(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    let live = cx.live().scale;
    let mut sum = axpy(cx, live, x, x)?;
    for index in 0..live as usize {
        let scratch = cx.empty(&[x.dim(0), (1 + index) * x.dim(1)], DType::F32)?;
        cx.fill_bytes(&scratch, 0x7F)?;
        let scratch = scratch.columns(0..x.dim(1))?;
        cx.copy(&scratch, x)?;
        sum = axpy(cx, 1.0, &scratch, &sum)?;
    }
    Ok(sum)
}

/// A break may allocate more, less or larger at replay than at capture; what then lies elsewhere is copied.
pub fn a_break_may_allocate_differently_at_replay(device: &Device) {
    for captured in [0.0, 1.0, 4.0] {
        let x = iota(device, &[3, 70], 1.0);
        let batches = [captured, 4.0, 0.0, 2.0, 7.0, 1.0].map(batch);
        assert_like_eager(&mut runner(device), &batches, move |cx| {
            let y = step(cx, &x)?;
            let z = with_scratch(cx, &y)?;
            let w = with_scratch(cx, &z)?;
            let sum = axpy(cx, 1.0, &w, &z)?;
            axpy(cx, 1.0, &sum, &y)
        });
    }
}

/// What the live batch asks a break to return.
#[derive(Clone, Copy, Debug)]
enum Shapes {
    AsCaptured,
    OtherShape,
    OtherDtype,
    OneLess,
    NoOption,
}

impl LiveBatch for Shapes {}

#[eager_on_graph]
fn shapeshifter(cx: &mut Eager<'_, Shapes>) -> Result<(Tensor, Vec<Tensor>, Option<Tensor>)> {
    let live = *cx.live();
    let mut zeros = |shape: &[usize], dtype| -> Result<Tensor> {
        let tensor = cx.empty(shape, dtype)?;
        cx.fill_zero(&tensor)?;
        Ok(tensor)
    };
    let first = match live {
        Shapes::OtherShape => zeros(&[3, 4], DType::F32)?,
        Shapes::OtherDtype => zeros(&[4, 3], DType::I32)?,
        _ => zeros(&[4, 3], DType::F32)?,
    };
    let second = if matches!(live, Shapes::OneLess) { vec![] } else { vec![zeros(&[1], DType::F32)?] };
    let third = if matches!(live, Shapes::NoOption) { None } else { Some(zeros(&[1], DType::F32)?) };
    Ok((first, second, third))
}

/// An output of another shape, dtype or structure than at capture is an error naming break, output, expected and got.
pub fn a_changed_output_is_an_error_naming_break_expected_and_got(device: &Device) {
    let mut runner = runner(device);
    let mut graph = BreakableCudaGraph::new("shapes");
    let forward = |cx: &mut Context<'_, Shapes>| Ok(shapeshifter(cx)?.0);
    graph.capture(&mut runner, &Shapes::AsCaptured, forward).expect("a capture");
    let expected = [
        (Shapes::OtherShape, "output [0]: expected f32 [4, 3] as captured, got f32 [3, 4]"),
        (Shapes::OtherDtype, "output [0]: expected f32 [4, 3] as captured, got i32 [4, 3]"),
        (Shapes::OneLess, "output [1]: expected 1 elements, got 0"),
        (Shapes::NoOption, "output [2]: expected Some, got None"),
    ];
    for (live, message) in expected {
        let error = failure(graph.replay(&mut runner, &live)).to_string();
        assert!(error.starts_with("break `shapeshifter` after segment 0 ("), "{error}");
        assert!(error.ends_with(&format!("): {message}")), "{error}");
        let replayed = graph.replay(&mut runner, &Shapes::AsCaptured).expect("a replay");
        assert_eq!(runner.read::<f32>(&replayed).expect("a read"), [0.0; 12]);
    }
}

#[eager_on_graph]
fn scale_in_place(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<()> {
    let scale = cx.live().scale;
    axpy_into(cx, scale, x, x, x)
}

#[eager_on_graph]
fn scale_and_return(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    let scale = cx.live().scale;
    axpy_into(cx, scale, x, x, x)?;
    x.rows(1..x.dim(0))
}

/// A break may write its output into an argument, and return it or a view of it.
pub fn an_output_may_be_written_into_an_argument(device: &Device) {
    let x = iota(device, &[4, 8], 1.0);
    let mut runner = runner(device);
    assert_like_eager(&mut runner, &batches(), move |cx| {
        let y = step(cx, &x)?;
        scale_in_place(cx, &y)?;
        scale_in_place(cx, &y.columns(2..5)?)?;
        let z = step(cx, &y)?;
        let view = scale_and_return(cx, &z)?;
        axpy(cx, 1.0, &view, &y.rows(0..3)?)
    });
    assert_eq!(runner.stats().bridge_copied_bytes, 0);
}

/// The output of a break need not be used.
pub fn an_output_may_stay_unused(device: &Device) {
    let x = iota(device, &[8], 1.0);
    let graph = assert_like_eager(&mut runner(device), &batches(), move |cx| {
        let y = step(cx, &x)?;
        scaled(cx, &y)?;
        two_tensors(cx, &y)?;
        step(cx, &y)
    });
    assert_eq!(census(&graph), (3, 2));
}

/// An output may be used any number of segments later.
pub fn an_output_may_be_used_segments_later(device: &Device) {
    let x = iota(device, &[8], 1.0);
    assert_like_eager(&mut runner(device), &batches(), move |cx| {
        let early = scaled(cx, &x)?;
        let mut y = step(cx, &early)?;
        for _ in 0..3 {
            y = scaled(cx, &y)?;
            y = step(cx, &y)?;
        }
        let z = scaled(cx, &early)?; // as an argument of a later break
        let z = axpy(cx, 1.0, &z, &early)?; // and in captured work
        axpy(cx, 1.0, &z, &y)
    });
}

/// Dropping the handle of an output lets later work reuse its memory, and yet each replay finds it in place.
pub fn dropping_the_handle_does_not_free_the_bridge(device: &Device) {
    let x = iota(device, &[256], 1.0);
    let mut runner = runner(device);
    let graph = assert_like_eager(&mut runner, &batches(), move |cx| {
        let y = {
            let bridge = scaled(cx, &x)?;
            step(cx, &bridge)?
        };
        let reuse = axpy(cx, 5.0, &y, &y)?; // takes the memory of `bridge`
        let z = {
            let bridge = scaled(cx, &reuse)?;
            drop(reuse);
            axpy(cx, 1.0, &bridge, &y)?
        };
        drop(y);
        let more = (0..4).map(|i| axpy(cx, i as f32, &z, &x)).collect::<Result<Vec<_>>>()?;
        axpy(cx, 1.0, &more[3], &more[0])
    });
    assert!(graph.describe().extent_bytes <= 8 * 1024, "the memory of dropped bridges is reused");
    assert_eq!(runner.stats().bridge_copied_bytes, 0);
}

/// Each replay writes its bridges anew: nothing of the replay before is left in them.
pub fn a_second_replay_refreshes_the_bridge(device: &Device) {
    let x = iota(device, &[8], 1.0);
    let mut runner = runner(device);
    let mut graph = Graph::new("refresh");
    let forward = move |cx: &mut Context<'_, Batch>| {
        let y = scaled(cx, &x)?;
        step(cx, &y)
    };
    graph.capture(&mut runner, &batch(1.0), forward).expect("a capture");
    for scale in [4.0, -1.0, 0.5, 4.0] {
        let replayed = graph.replay(&mut runner, &batch(scale)).expect("a replay");
        let expected: Vec<f32> = (0..8).map(|i| scale * (1.0 + i as f32) + 1.0 + 2.0 * i as f32).collect();
        assert_eq!(runner.read::<f32>(&replayed).expect("a read"), expected);
    }
}

#[eager_on_graph]
fn plan(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<(Live<f32>, Tensor, Live<Vec<i32>>)> {
    let scale = cx.live().scale;
    let first = cx.read::<f32>(x)?[0];
    let y = axpy(cx, 1.0, x, x)?;
    Ok((Live::new(scale + first), y, Live::new(vec![scale as i32; 3])))
}

#[eager_on_graph]
fn apply(cx: &mut Eager<'_, Batch>, x: &Tensor, factor: &Live<f32>, list: &Live<Vec<i32>>) -> Result<Tensor> {
    let factor = factor.get(cx) + list.get(cx).iter().sum::<i32>() as f32;
    axpy(cx, factor, x, x)
}

/// Host values that a break returns are, at the next break, those of the run at hand.
pub fn host_values_of_a_break_are_live_at_the_next_break(device: &Device) {
    let x = iota(device, &[8], 1.0);
    assert_like_eager(&mut runner(device), &batches(), move |cx| {
        let (factor, y, list) = plan(cx, &x)?;
        let y = step(cx, &y)?;
        let (second, z, _) = plan(cx, &y)?;
        let y = apply(cx, &y, &factor, &list)?; // of the break before the last
        let y = axpy(cx, 1.0, &z, &y)?;
        apply(cx, &y, &second, &list)
    });
}

/// A host value that a forward returns is that of the run which ended last.
pub fn a_returned_host_value_is_that_of_the_last_run(device: &Device) {
    let x = iota(device, &[8], 1.0);
    let mut runner = runner(device);
    let mut graph = BreakableCudaGraph::<Batch, Live<f32>>::new("live output");
    let forward = move |cx: &mut Context<'_, Batch>| Ok(plan(cx, &x)?.0);
    let captured = graph.capture(&mut runner, &batch(5.0), forward).expect("a capture");
    assert_eq!(captured.get_after(&runner), 6.0);
    for scale in [7.0, -2.0] {
        let replayed = graph.replay(&mut runner, &batch(scale)).expect("a replay");
        assert_eq!(replayed.get_after(&runner), 1.0 + scale);
    }
}
