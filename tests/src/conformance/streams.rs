//! Forks and joins: inside segments, inside breaks, and across the edges where they are refused.

use std::sync::{Arc, Mutex};

use bcg_runtime::{
    BreakableCudaGraph, Context, DType, Device, Eager, Error, Event, OpStream, Result, Stream, Tensor, eager_on_graph,
};

use super::fixture::{
    Batch, Graph, assert_like_eager, assert_usable, batch, batches, bits, census, failure, iota, runner, scaled, step,
};
use super::kernels::{add_index, add_index_into, axpy, axpy_into, count};

const SIDE: &str = "side";

/// Runs a rule's part with the side streams' work late, where the device lets the schedule be chosen, and then as it comes.
fn late_and_not(device: &Device, mut part: impl FnMut()) {
    if let Some(control) = device.host_control() {
        control.set_delay(SIDE, true);
        part();
        control.set_delay(SIDE, false);
        control.set_delay("runner", true);
        part();
        control.set_delay("runner", false);
    }
    part();
}

/// Side work that reads what was written before the fork and is read after the join.
fn forked(cx: &mut OpStream, x: &Tensor) -> Result<Tensor> {
    let y = add_index(cx, x)?;
    let (a, b) = cx.scope(|cx| {
        let side = cx.side_stream(SIDE)?;
        let a = cx.on(&side, |cx| {
            let a = axpy(cx, 2.0, &y, &y)?;
            add_index(cx, &a)
        })?;
        let b = axpy(cx, -1.0, &y, &y)?;
        let b = add_index(cx, &b)?;
        Ok((a, b))
    })?;
    axpy(cx, 7.0, &a, &b)
}

/// A scope's side stream forks from and joins into one segment.
pub fn a_segment_may_fork_and_join(device: &Device) {
    let x = iota(device, &[16], 1.0);
    late_and_not(device, || {
        let x = x.clone();
        let graph = assert_like_eager(&mut runner(device), &batches(), move |cx| {
            let y = forked(cx, &x)?;
            let y = scaled(cx, &y)?;
            forked(cx, &y)
        });
        assert_eq!(census(&graph), (2, 1));
    });
}

/// Scopes nest, and a scope may have several side streams, also of one name.
pub fn scopes_may_nest(device: &Device) {
    let x = iota(device, &[16], 1.0);
    late_and_not(device, || {
        let x = x.clone();
        assert_like_eager(&mut runner(device), &batches(), move |cx| {
            let y = step(cx, &x)?;
            let parts = cx.scope(|cx| {
                let sides = [cx.side_stream(SIDE)?, cx.side_stream(SIDE)?, cx.side_stream("other")?];
                let mut parts = Vec::new();
                for (index, side) in sides.iter().enumerate() {
                    parts.push(cx.on(side, |cx| axpy(cx, index as f32, &y, &y))?);
                }
                parts.push(cx.on(&sides[0], |cx| forked(cx, &y))?);
                parts.push(forked(cx, &y)?);
                Ok(parts)
            })?;
            let mut sum = scaled(cx, &y)?;
            for part in &parts {
                sum = axpy(cx, 2.0, part, &sum)?;
            }
            Ok(sum)
        });
    });
}

/// Memory that side work still reads is not handed out before the join, although its last handle dropped.
pub fn memory_read_on_a_side_stream_is_kept_until_the_join(device: &Device) {
    let x = iota(device, &[256], 1.0);
    late_and_not(device, || {
        let x = x.clone();
        assert_like_eager(&mut runner(device), &batches(), move |cx| {
            let out = cx.empty(x.shape(), x.dtype())?;
            let read = step(cx, &x)?;
            let other = cx.scope(|cx| {
                let side = cx.side_stream(SIDE)?;
                cx.on(&side, |cx| add_index_into(cx, &read, &out))?;
                drop(read);
                axpy(cx, 100.0, &x, &x) // must not take the memory that `read` had
            })?;
            let sum = scaled(cx, &out)?;
            axpy(cx, 1.0, &sum, &other)
        });
    });
}

/// A stream of the caller's own joins the capture through events.
pub fn a_segment_may_fork_through_events(device: &Device) {
    let x = iota(device, &[16], 1.0);
    late_and_not(device, || {
        let (x, own) = (x.clone(), Arc::new(Stream::new(device, SIDE).expect("a stream")));
        let events: Arc<[Event; 2]> = Arc::new([(); 2].map(|()| Event::new(device).expect("an event")));
        assert_like_eager(&mut runner(device), &batches(), move |cx| {
            let y = step(cx, &x)?;
            let mut sum = scaled(cx, &y)?;
            for round in 0..2 {
                cx.record(&events[0])?;
                let a = cx.on_stream(&own, |cx| {
                    cx.wait(&events[0])?;
                    let a = axpy(cx, round as f32, &sum, &y)?;
                    cx.record(&events[1])?;
                    Ok(a)
                })?;
                let b = axpy(cx, 3.0, &sum, &y)?;
                cx.wait(&events[1])?;
                sum = axpy(cx, 5.0, &a, &b)?;
            }
            Ok(sum)
        });
    });
}

/// Forks `own` from the current stream, runs `count` there and does not join.
fn fork_and_leave(cx: &mut OpStream, own: &Arc<Stream>, event: &Event, cell: &Tensor) -> Result<()> {
    cx.record(event)?;
    cx.on_stream(own, |cx| {
        cx.wait(event)?;
        count(cx, cell)
    })
}

#[eager_on_graph]
fn leaves_a_fork(cx: &mut Eager<'_, Batch>, own: &Arc<Stream>, event: &Arc<Event>, cell: &Tensor) -> Result<()> {
    if cx.live().scale > 0.0 { fork_and_leave(cx, own, event, cell) } else { Ok(()) }
}

/// A side stream that was not joined at a break, at the end of the capture, of a break or of a forward is an error
/// that names the stream and the place; the runner stays usable.
pub fn an_unjoined_side_stream_is_an_error_naming_the_stream(device: &Device) {
    type Forward = fn(&mut Context<'_, Batch>, &Arc<Stream>, &Arc<Event>, &Tensor) -> Result<()>;
    let places: [(&str, &str, Forward); 3] = [
        ("segment 0: ", "break `leaves_a_fork` (", |cx, own, event, cell| {
            fork_and_leave(cx, own, event, cell)?;
            leaves_a_fork(cx, own, event, cell)
        }),
        ("segment 1: ", "the end of the capture; ", |cx, own, event, cell| {
            cx.break_graph()?;
            fork_and_leave(cx, own, event, cell)
        }),
        ("break `leaves_a_fork` after segment 0 (", "the end of break `leaves_a_fork` (", |cx, own, event, cell| {
            leaves_a_fork(cx, own, event, cell)
        }),
    ];
    let mut runner = runner(device);
    let own = Arc::new(Stream::new(device, "my stream").expect("a stream"));
    let (event, cell) =
        (Arc::new(Event::new(device).expect("an event")), device.zeros(&[1], DType::I32).expect("a cell"));
    for (start, place, forward) in places {
        let (own, event, cell) = (Arc::clone(&own), Arc::clone(&event), cell.clone());
        let mut graph = BreakableCudaGraph::<Batch, ()>::new("unjoined");
        let run = move |cx: &mut Context<'_, Batch>| forward(cx, &own, &event, &cell);
        let error = failure(graph.capture(&mut runner, &batch(1.0), run)).to_string();
        let expected = format!("side stream `my stream` was not joined before {place}");
        assert!(error.starts_with(start) && error.contains(&expected), "{error}");
        assert!(error.ends_with("; wait on its event from the capturing stream, or use a scope"), "{error}");
        assert_usable(&mut runner);
    }
    let error = failure(runner.eager(&batch(1.0), |cx| fork_and_leave(cx, &own, &event, &cell))).to_string();
    assert!(error.contains("side stream `my stream` was not joined before the end of the forward;"), "{error}");
    let mut graph = BreakableCudaGraph::<Batch, ()>::new("unjoined at replay");
    graph.capture(&mut runner, &batch(0.0), move |cx| leaves_a_fork(cx, &own, &event, &cell)).expect("a capture");
    let error = failure(graph.replay(&mut runner, &batch(1.0))).to_string();
    assert!(error.contains("was not joined before the end of break `leaves_a_fork` ("), "{error}");
    graph.replay(&mut runner, &batch(0.0)).expect("a replay");
    assert_usable(&mut runner);
}

#[eager_on_graph]
fn forks_inside(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    let scale = cx.live().scale;
    cx.scope(|cx| {
        let side = cx.side_stream(SIDE)?;
        cx.on(&side, |cx| axpy(cx, scale, x, x))
    })
}

/// Side work inside a break is joined at its end: the segment after it reads finished data, however late the work runs.
pub fn side_work_inside_a_break_is_joined_at_its_end(device: &Device) {
    let x = iota(device, &[16], 1.0);
    late_and_not(device, || {
        let x = x.clone();
        let graph = assert_like_eager(&mut runner(device), &batches(), move |cx| {
            let y = step(cx, &x)?;
            let y = forks_inside(cx, &y)?;
            let z = step(cx, &y)?;
            axpy_into(cx, 2.0, &z, &y, &y)?;
            forks_inside(cx, &y)
        });
        assert_eq!(census(&graph), (3, 2));
    });
}

/// Captured code that waits for an event from outside of the capture fails; the wait is never dropped, even if the
/// caller ignores the error.
pub fn waiting_for_work_outside_the_capture_is_an_error(device: &Device) {
    for ignore in [false, true] {
        let mut runner = runner(device);
        let (event, cell) = (Event::new(device).expect("an event"), device.zeros(&[1], DType::I32).expect("a cell"));
        let mut other = super::fixture::runner(device);
        let record = |cx: &mut Context<'_, Batch>| {
            count(cx, &cell)?;
            cx.record(&event)
        };
        other.eager(&batch(1.0), record).expect("work outside of the capture");
        let captured_cell = cell.clone();
        let mut graph = BreakableCudaGraph::<Batch, ()>::new("isolation");
        let error = failure(graph.capture(&mut runner, &batch(1.0), move |cx| {
            let waited = cx.wait(&event);
            if !ignore {
                waited?;
            }
            count(cx, &captured_cell)
        }));
        assert!(matches!(error, Error::Segment { segment: 0, .. }), "{error}");
        assert_usable(&mut runner);
        assert_eq!(other.read::<i32>(&cell).expect("a read"), [1]);
    }
}

/// Work of another stream that is enqueued while a segment is open runs as usual and is not captured.
pub fn work_of_another_stream_during_a_capture_is_unaffected(device: &Device) {
    let other = Arc::new(Mutex::new(runner(device)));
    let cell = device.zeros(&[1], DType::I32).expect("a cell");
    let (also_other, counted, x) = (Arc::clone(&other), cell.clone(), iota(device, &[16], 1.0));
    let mut runner = runner(device);
    let mut graph = Graph::new("unaffected");
    let captured = graph.capture(&mut runner, &batch(2.0), move |cx| {
        let y = step(cx, &x)?;
        let mut other = also_other.lock().expect("the other runner");
        other.eager(&batch(1.0), |cx| count(cx, &counted))?;
        other.synchronize()?;
        let y = step(cx, &y)?;
        scaled(cx, &y)
    });
    let captured = bits(&mut runner, &captured.expect("a capture"));
    let segment = &graph.describe().segments[0];
    assert_eq!(segment.num_nodes - segment.num_fills, 2, "the fills poison fresh memory");
    let replayed = graph.replay(&mut runner, &batch(2.0)).expect("a replay");
    assert_eq!(bits(&mut runner, &replayed), captured);
    assert_eq!(other.lock().expect("the other runner").read::<i32>(&cell).expect("a read"), [1]);
}

/// A side stream needs a scope, and does not outlive it.
pub fn a_side_stream_lives_in_its_scope(device: &Device) {
    let mut runner = runner(device);
    let error = failure(runner.eager(&(), |cx| cx.side_stream(SIDE)));
    assert!(matches!(error, Error::Option { option: "OpStream::side_stream", .. }), "{error}");
    let error = failure(runner.eager(&(), |cx| {
        let side = cx.scope(|cx| cx.side_stream(SIDE))?;
        cx.on(&side, |_| Ok(()))
    }));
    assert!(matches!(error, Error::Option { option: "OpStream::on", .. }), "{error}");
    assert_usable(&mut runner);
}

/// An error inside a scope is the one that is returned, and its side streams are joined all the same.
pub fn an_error_inside_a_scope_joins_its_side_streams(device: &Device) {
    let mut runner = runner(device);
    let x = iota(device, &[16], 1.0);
    let mut graph = BreakableCudaGraph::<Batch, Tensor>::new("error in a scope");
    let forward = move |cx: &mut Context<'_, Batch>| {
        let failed = cx.scope(|cx| {
            let side = cx.side_stream(SIDE)?;
            cx.on(&side, |cx| {
                add_index(cx, &x)?;
                Err::<(), _>(Error::other("the first error"))
            })
        });
        assert_eq!(failure(failed).to_string(), "the first error");
        scaled(cx, &x)
    };
    graph.capture(&mut runner, &batch(1.0), forward).expect("the error was handled and the stream joined");
    graph.replay(&mut runner, &batch(1.0)).expect("a replay");
    assert_usable(&mut runner);
}
