//! One arena for all sizes and segments: reuse, sharing, refusal of stale use, release (laws L7, L9 and L10).

use std::sync::{Arc, Mutex};

use bcg_runtime::{
    BreakableCudaGraph, CacheOptions, Context, DType, Device, Eager, Error, GraphCache, Ladder, PinnedBuffer, Result,
    Runner, Tensor, eager_on_graph,
};

use super::fixture::{
    Batch, Graph, assert_like_eager, assert_usable, batch, batches, bits, failure, iota, options, padded,
    replays_like_eager, runner, scaled, step,
};
use super::kernels::{axpy, axpy_into};

/// A forward on `[size, 16]` with intermediates, bridges and two breaks.
fn forward_of(x: &Tensor) -> impl Fn(&mut Context<'_, Batch>) -> Result<Tensor> + Clone + Send + Sync + 'static {
    let x = x.clone();
    move |cx| {
        let y = step(cx, &x)?;
        let z = scaled(cx, &y)?;
        let w = axpy(cx, 2.0, &z, &y)?;
        drop((y, z));
        let v = scaled(cx, &w)?;
        let u = step(cx, &v)?;
        axpy(cx, 1.0, &u, &w)
    }
}

/// Captures [`forward_of`] at a size.
fn capture_size(runner: &mut Runner, size: usize) -> (Graph, Tensor) {
    let device = runner.device().clone();
    let x = iota(&device, &[size, 16], size as f32);
    let mut graph = Graph::new(format!("size {size}"));
    graph.capture(runner, &batch(1.0), forward_of(&x)).expect("a capture");
    (graph, x)
}

/// Captures the sizes in the given order and replays them in every order.
fn replay_in_every_order(runner: &mut Runner, sizes: [usize; 3]) {
    let mut graphs = sizes.map(|size| capture_size(runner, size));
    let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    let mut expected = Vec::new();
    for (_, x) in &graphs {
        let eager = runner.eager(&batch(3.0), forward_of(x)).expect("an eager run");
        expected.push(bits(runner, &eager));
    }
    for index in orders.into_iter().flatten() {
        let replayed = graphs[index].0.replay(runner, &batch(3.0)).expect("a replay");
        assert_eq!(bits(runner, &replayed), expected[index], "size {}", sizes[index]);
    }
    for (graph, x) in &mut graphs {
        replays_like_eager(runner, graph, &batches(), forward_of(x));
    }
}

/// Within a forward, a block is free again as soon as its last reader was enqueued.
pub fn intermediate_memory_is_reused_within_a_forward(device: &Device) {
    const BLOCK: usize = 64 * 1024;
    let x = iota(device, &[BLOCK / 4], 0.0);
    let graph = assert_like_eager(&mut runner(device), &batches()[..2], move |cx| {
        let mut y = step(cx, &x)?;
        for index in 0..20 {
            y = if index % 5 == 0 { scaled(cx, &y)? } else { axpy(cx, 0.5, &y, &x)? };
        }
        Ok(y)
    });
    let extent = graph.describe().extent_bytes;
    assert!(extent <= 2 * BLOCK, "two blocks are enough, {extent} bytes are used");
}

/// Sizes captured from the largest to the smallest share memory; replays in every order equal eager.
pub fn falling_sizes_share_memory_and_replay_in_every_order(device: &Device) {
    replay_in_every_order(&mut runner(device), [64, 24, 5]);
}

/// Sizes captured from the smallest to the largest share memory too.
pub fn rising_sizes_share_memory_and_replay_in_every_order(device: &Device) {
    replay_in_every_order(&mut runner(device), [5, 24, 64]);
}

/// An arena that grows between captures does not move: graphs captured before replay as before.
pub fn the_arena_grows_between_captures_without_moving(device: &Device) {
    let mut options = options();
    options.arena_bytes = 0;
    let mut runner = Runner::new(device, options).expect("a runner");
    assert_eq!(runner.arena_stats().mapped_bytes, 0);
    let small = iota(device, &[8, 16], 1.0);
    runner.eager(&batch(1.0), forward_of(&small)).expect("the eager run that grows the arena");
    let mut graph = assert_like_eager(&mut runner, &batches(), forward_of(&small));
    let mapped = runner.arena_stats().mapped_bytes;
    let grow = |cx: &mut Context<'_, Batch>| cx.empty(&[mapped + 1], DType::U8).map(drop);
    runner.eager(&batch(1.0), grow).expect("an eager run that grows the arena further");
    assert!(runner.arena_stats().mapped_bytes > mapped);
    replays_like_eager(&mut runner, &mut graph, &batches(), forward_of(&small));
}

/// Many sizes take the memory of the largest one: nothing on top in the arena, and no allocation for each.
pub fn many_sizes_cost_no_more_than_the_largest(device: &Device) {
    let mut runner = runner(device);
    let largest = capture_size(&mut runner, 64);
    let (stats, objects) = (runner.arena_stats(), device.live_objects());
    let sizes: Vec<_> = (1..16).map(|index| capture_size(&mut runner, 4 * index)).collect();
    assert_eq!(runner.arena_stats().mapped_bytes, stats.mapped_bytes);
    let inputs: usize = sizes.iter().map(|(_, x)| x.size_bytes()).sum();
    assert_eq!(device.live_objects().allocated_bytes, objects.allocated_bytes + inputs);
    let extents: Vec<usize> = sizes.iter().map(|(graph, _)| graph.describe().extent_bytes).collect();
    assert!(extents.iter().all(|extent| *extent <= largest.0.describe().extent_bytes), "{extents:?}");
}

/// An arena that would have to grow inside a segment refuses; an eager run before makes the capture possible.
pub fn growth_inside_a_segment_is_refused(device: &Device) {
    let mut runner = runner(device);
    let bytes = runner.arena_stats().mapped_bytes + 1;
    let forward = move |cx: &mut Context<'_, ()>| {
        let large = cx.empty(&[bytes], DType::U8)?;
        cx.fill_bytes(&large, 7)?;
        large.rows(0..4)
    };
    let mut graph = BreakableCudaGraph::new("growth");
    let error = failure(graph.capture(&mut runner, &(), forward));
    assert!(
        matches!(&error, Error::Segment { segment: 0, cause } if matches!(**cause, Error::ArenaFull { .. })),
        "{error}"
    );
    assert_eq!(runner.arena_stats().mapped_bytes, bytes - 1);
    assert_usable(&mut runner);
    runner.eager(&(), forward).expect("an eager run");
    graph.capture(&mut runner, &(), forward).expect("a capture");
    let replayed = graph.replay(&mut runner, &()).expect("a replay");
    assert_eq!(runner.read::<u8>(&replayed).expect("a read"), [7; 4]);
}

/// A break may grow the arena, at capture and at replay: no segment is open then.
pub fn a_break_may_grow_the_arena(device: &Device) {
    for captured in [0.0, 1.0] {
        let x = iota(device, &[8], 1.0);
        assert_like_eager(&mut runner(device), &[batch(captured), batch(1.0), batch(0.0)], move |cx| {
            let y = step(cx, &x)?;
            let y = grows(cx, &y)?;
            step(cx, &y)
        });
    }
}

#[eager_on_graph]
fn grows(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    let bytes = if cx.live().scale > 0.0 { 3 << 20 } else { 1 };
    let scratch = cx.empty(&[bytes], DType::U8)?;
    cx.fill_bytes(&scratch, 1)?;
    axpy(cx, 2.0, x, x)
}

#[eager_on_graph]
fn takes_away(cx: &mut Eager<'_, Batch>, x: Tensor) -> Result<Tensor> {
    let extra = if cx.live().scale > 1.0 { Some(cx.empty(x.shape(), x.dtype())?) } else { None };
    let y = cx.empty(x.shape(), x.dtype())?;
    cx.fill_zero(&y)?;
    axpy_into(cx, 2.0, &x, &y, &y)?;
    drop(x);
    let z = axpy(cx, 3.0, &y, &y)?; // at capture, in the memory that `x` had
    drop(extra);
    Ok(z)
}

/// The memory of an argument that a break was given for good is reused after its last use, and never before, although
/// the break allocates more at replay than at capture.
pub fn an_argument_given_away_is_not_overwritten_early(device: &Device) {
    let x = iota(device, &[300], 1.0);
    assert_like_eager(&mut runner(device), &[0.0, 2.0, 1.0, 3.0].map(batch), move |cx| {
        let y = step(cx, &x)?;
        let z = takes_away(cx, y)?;
        step(cx, &z)
    });
}

#[eager_on_graph]
fn forks_with_scratch(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    let has_scratch = cx.live().scale > 1.0;
    let out = cx.empty(x.shape(), x.dtype())?;
    cx.scope(|cx| {
        let side = cx.side_stream("side")?;
        cx.on(&side, |cx| {
            let read_late = axpy(cx, 1.0, x, x)?;
            axpy_into(cx, 2.0, &read_late, x, &out)
        })?;
        if has_scratch {
            let scratch = cx.empty(x.shape(), x.dtype())?; // its recorded address is that of `read_late`
            cx.fill_bytes(&scratch, 0x11)?;
        }
        Ok(())
    })?;
    let y = axpy(cx, 1.0, x, x)?;
    axpy(cx, 1.0, &out, &y)
}

/// Inside a break, memory that side work still reads is kept until the join at replay too, although the break allocates
/// otherwise than at capture.
pub fn memory_read_on_a_side_stream_of_a_break_is_kept_at_replay(device: &Device) {
    let x = iota(device, &[300], 1.0);
    for late in [true, false] {
        device.host_control().into_iter().for_each(|control| control.set_delay("side", late));
        let x = x.clone();
        assert_like_eager(&mut runner(device), &[0.0, 2.0, 1.0, 3.0].map(batch), move |cx| {
            let y = step(cx, &x)?;
            let z = forks_with_scratch(cx, &y)?;
            step(cx, &z)
        });
    }
}

/// The arena keeps to its bound, and says so.
pub fn the_arena_keeps_to_its_bound(device: &Device) {
    let mut options = options();
    options.arena_bytes_max = Some(4 << 20);
    let mut runner = Runner::new(device, options).expect("a runner");
    let bytes = runner.arena_stats().reserved_bytes + 1;
    let error = failure(runner.eager(&(), |cx| cx.empty(&[bytes], DType::U8)));
    assert!(matches!(error, Error::ArenaFull { .. }), "{error}");
    assert_usable(&mut runner);
}

/// Sizes whose elements, bytes or strides cannot be counted are refused, and the error names them: none wraps around to a
/// small number.
pub fn sizes_that_would_overflow_are_refused(device: &Device) {
    // In 64 bits, 8 * (2^61 + 1) elements of four bytes wrap around to 32 bytes.
    let wraps = (1 << 61) + 1;
    let mut runner = runner(device);
    let empty = device.empty(&[0, 1 << 40], DType::F32).expect("an empty tensor");
    for shape in [&[wraps, 8][..], &[1 << 32, 1 << 32], &[usize::MAX], &[1 << 62], &[0, 1 << 62], &[1 << 20; 4]] {
        for error in [
            failure(device.empty(shape, DType::F32)),
            failure(device.zeros(shape, DType::U8)),
            failure(device.tensor(shape, &[1.0f32; 8])),
            failure(runner.eager(&(), |cx| cx.empty(shape, DType::F32))),
            failure(empty.reshape(shape)),
        ] {
            assert!(matches!(error, Error::Shape { .. }), "{error}");
            assert!(error.to_string().contains(&format!("got {shape:?}")), "{error}");
        }
    }
    assert_eq!(empty.reshape(&[1 << 40, 0]).expect("as empty").row_bytes(), 0);
    let beyond = failure(empty.rows(1..2)).to_string();
    assert_eq!(beyond, "Tensor::rows: expected a range within 0..0, got 1..2");
    let large = failure(device.empty(&[1 << 59], DType::I64));
    assert!(!matches!(large, Error::Shape { .. }), "counted, and more than there is: {large}");

    let mut unbounded = options();
    unbounded.arena_bytes_max = Some(usize::MAX);
    let error = failure(Runner::new(device, unbounded));
    assert!(matches!(error, Error::Option { option: "RunnerOptions::arena_bytes_max", .. }), "{error}");
    failure(PinnedBuffer::new(device, usize::MAX));
    let many = 1 << 32; // 0 in 32 bits
    let error = failure(runner.eager(&padded(1.0, many, many), |_| Ok(())));
    assert!(matches!(error, Error::Option { option: "LiveBatch::rows", .. }), "{error}");
    assert_usable(&mut runner);
}

/// Device memory cannot be allocated while a segment is open; the capture fails and the runner stays usable.
pub fn allocating_device_memory_in_a_segment_is_refused(device: &Device) {
    for swallow in [false, true] {
        let mut runner = runner(device);
        let also = device.clone();
        let mut graph = BreakableCudaGraph::<Batch, ()>::new("allocates");
        let captured = graph.capture(&mut runner, &batch(1.0), move |_| {
            let allocated = also.empty(&[1 << 20], DType::U8);
            if swallow { Ok(()) } else { allocated.map(drop) }
        });
        let error = failure(captured);
        assert!(matches!(error, Error::Segment { segment: 0, .. }), "{error}");
        assert_usable(&mut runner);
    }
}

/// A tensor of one capture is refused in another one.
pub fn a_tensor_of_one_capture_is_refused_in_another(device: &Device) {
    let mut runner = runner(device);
    let x = iota(device, &[64], 1.0);
    let smuggled = Arc::new(Mutex::new(None));
    let put = Arc::clone(&smuggled);
    let mut first = Graph::new("first");
    let captured = first.capture(&mut runner, &batch(1.0), move |cx| {
        let y = step(cx, &x)?;
        *put.lock().expect("a place") = Some(y.clone());
        scaled(cx, &y)
    });
    drop(captured.expect("a capture"));
    type Use = fn(&mut Context<'_, Batch>, &Tensor) -> Result<Tensor>;
    let uses: [Use; 2] = [|cx, y| step(cx, y), |cx, y| scaled(cx, y)];
    for (number, usage) in uses.into_iter().enumerate() {
        let take = Arc::clone(&smuggled);
        let mut second = Graph::new("second");
        let error = failure(second.capture(&mut runner, &batch(1.0), move |cx| {
            let stale = take.lock().expect("a place").clone().expect("a tensor");
            usage(cx, &stale)
        }));
        assert!(matches!(error.root(), Error::Stale { .. }), "use {number}: {error}");
    }
    assert_usable(&mut runner);
}

/// The output of a forward is refused once a later forward took its memory, and so is a tensor of another runner.
pub fn a_tensor_is_refused_after_a_later_forward_took_its_memory(device: &Device) {
    let mut runner = runner(device);
    let x = iota(device, &[64], 1.0);
    let mut graph = Graph::new("first");
    let first = graph.capture(&mut runner, &batch(1.0), forward_of(&iota(device, &[4, 16], 1.0))).expect("a capture");
    let second = graph.replay(&mut runner, &batch(1.0)).expect("a replay");
    assert!(matches!(runner.read::<f32>(&first), Err(Error::Stale { .. })));
    assert!(runner.read::<f32>(&second).is_ok());
    let third = runner.eager(&batch(1.0), |cx| step(cx, &x)).expect("an eager run");
    assert!(matches!(runner.read::<f32>(&second), Err(Error::Stale { .. })));
    let mut other = super::fixture::runner(device);
    assert!(matches!(other.read::<f32>(&third), Err(Error::Foreign { .. })));
    let error = failure(other.eager(&batch(1.0), |cx| step(cx, &third)));
    assert!(matches!(error, Error::Foreign { .. }), "{error}");
    let tail = runner.tail(&batch(2.0), |cx| scaled(cx, &third)).expect("a tail");
    assert_eq!(runner.read::<f32>(&tail).expect("a read")[1], 9.0);
}

/// A graph may be dropped while its replay is queued, together with all that it uses.
pub fn a_graph_may_be_dropped_while_its_replay_is_queued(device: &Device) {
    let mut runner = runner(device);
    let before = device.live_objects();
    let x = iota(device, &[8, 16], 1.0);
    let eager = runner.eager(&batch(2.0), forward_of(&x)).expect("an eager run");
    let expected = bits(&mut runner, &eager);
    let mut graph = Graph::new("dropped");
    graph.capture(&mut runner, &batch(1.0), forward_of(&x)).expect("a capture");
    let replayed = graph.replay(&mut runner, &batch(2.0)).expect("a replay");
    drop((graph, x));
    assert_eq!(bits(&mut runner, &replayed), expected);
    assert_eq!(device.live_objects(), before);
}

/// Two graphs of one runner share its arena and may be replayed in turn, without waiting in between.
pub fn two_graphs_may_share_one_arena(device: &Device) {
    let mut runner = runner(device);
    let (mut a, mut b) = (capture_size(&mut runner, 12), capture_size(&mut runner, 33));
    let outputs = [12, 33].map(|size| device.zeros(&[size, 16], DType::F32).expect("a tensor"));
    for scale in [2.0, -1.0, 4.0] {
        for ((graph, _), kept) in [&mut a, &mut b].into_iter().zip(&outputs) {
            let replayed = graph.replay(&mut runner, &batch(scale)).expect("a replay");
            runner.tail(&batch(scale), |cx| cx.copy(kept, &replayed)).expect("a tail");
        }
        for ((_, x), kept) in [&a, &b].into_iter().zip(&outputs) {
            let eager = runner.eager(&batch(scale), forward_of(x)).expect("an eager run");
            assert_eq!(bits(&mut runner, kept), bits(&mut runner, &eager));
        }
    }
}

/// Two runners have two arenas: their replays may overlap, and a graph of one is refused by the other.
pub fn two_arenas_are_independent(device: &Device) {
    let (mut one, mut two) = (runner(device), runner(device));
    let (mut a, mut b) = (capture_size(&mut one, 12), capture_size(&mut two, 12));
    for scale in [2.0, -1.0] {
        let from_one = a.0.replay(&mut one, &batch(scale)).expect("a replay");
        let from_two = b.0.replay(&mut two, &batch(scale)).expect("a replay");
        let (from_one, from_two) = (bits(&mut one, &from_one), bits(&mut two, &from_two));
        assert_eq!(from_one, from_two);
        let eager = one.eager(&batch(scale), forward_of(&b.1)).expect("an eager run");
        assert_eq!(bits(&mut one, &eager), from_one);
    }
    assert!(matches!(failure(a.0.replay(&mut two, &batch(1.0))), Error::Foreign { .. }));
    replays_like_eager(&mut two, &mut b.0, &batches(), forward_of(&b.1));
}

/// A thousand replays leave memory and handles as they were.
pub fn a_thousand_replays_grow_nothing(device: &Device) {
    let mut runner = runner(device);
    let (mut graph, x) = capture_size(&mut runner, 3);
    graph.replay(&mut runner, &batch(1.0)).expect("a replay");
    let (objects, stats) = (device.live_objects(), runner.arena_stats());
    for index in 0..1000 {
        graph.replay(&mut runner, &batch((index % 7) as f32)).expect("a replay");
    }
    assert_eq!((device.live_objects(), runner.arena_stats()), (objects, stats));
    replays_like_eager(&mut runner, &mut graph, &batches(), forward_of(&x));
}

/// Released memory comes back with all graphs intact; in between, a forward is refused.
pub fn released_memory_comes_back_with_graphs_intact(device: &Device) {
    let mut runner = runner(device);
    let (mut graph, x) = capture_size(&mut runner, 20);
    let (objects, mapped) = (device.live_objects(), runner.arena_stats().mapped_bytes);
    for _ in 0..3 {
        let output = graph.replay(&mut runner, &batch(1.0)).expect("a replay");
        runner.release_memory().expect("a release");
        assert_eq!(runner.arena_stats().mapped_bytes, 0);
        assert_eq!(device.live_objects().allocated_bytes, objects.allocated_bytes - mapped);
        let error = failure(graph.replay(&mut runner, &batch(1.0)));
        assert!(matches!(error, Error::Option { option: "Runner::release_memory", .. }), "{error}");
        assert!(matches!(runner.read::<f32>(&output), Err(Error::Stale { .. })));
        runner.restore_memory().expect("a restoration");
        assert_eq!((device.live_objects(), runner.arena_stats().mapped_bytes), (objects, mapped));
        replays_like_eager(&mut runner, &mut graph, &batches(), forward_of(&x));
    }
}

/// A release ends the forward that ran last: its tensors are stale, then and after the memory came back, and its tail
/// gets no memory in between.
pub fn a_release_ends_the_forward_that_ran_last(device: &Device) {
    let mut runner = runner(device);
    let x = iota(device, &[64], 1.0);
    let output = runner.eager(&batch(1.0), |cx| step(cx, &x)).expect("an eager run");
    runner.release_memory().expect("a release");
    for is_released in [true, false] {
        assert!(matches!(runner.read::<f32>(&output), Err(Error::Stale { .. })));
        let error = failure(runner.tail(&batch(2.0), |cx| scaled(cx, &output)));
        assert!(matches!(error.root(), Error::Stale { .. } | Error::Option { .. }), "{error}");
        let tail = runner.tail(&batch(2.0), |cx| scaled(cx, &x));
        if is_released {
            assert!(matches!(failure(tail).root(), Error::Option { option: "Runner::release_memory", .. }));
            runner.restore_memory().expect("a restoration");
        } else {
            let tail = tail.expect("a tail that needs nothing of the forward");
            assert_eq!(runner.read::<f32>(&tail).expect("a read")[1], 6.0);
        }
    }
    runner.restore_memory().expect("nothing to restore");
    assert_usable(&mut runner);
}

/// Memory is released and comes back while a cache holds graphs of several sizes, one of them captured in between.
pub fn memory_is_released_while_a_cache_holds_graphs(device: &Device) {
    let mut runner = runner(device);
    let mut options = CacheOptions::default();
    options.ladder = Some(Ladder::exact(32).expect("a ladder"));
    options.lazy = true;
    let mut cache = GraphCache::new("cache", options);
    let objects = |device: &Device| {
        let mut objects = device.live_objects();
        objects.allocations = 0;
        objects.allocated_bytes = 0;
        objects
    };
    for size in [20, 7, 32] {
        let x = iota(device, &[size, 16], size as f32);
        let captured = cache.capture(size, &mut runner, &batch(1.0), forward_of(&x)).expect("a capture");
        drop(captured);
        let (held, bytes) = (objects(device), cache.graph_bytes());
        runner.release_memory().expect("a release");
        assert!(failure(cache.replay(size, &mut runner, &batch(1.0))).to_string().contains("Runner::restore_memory"));
        assert_eq!((objects(device), cache.graph_bytes()), (held, bytes), "graphs stay");
        runner.restore_memory().expect("a restoration");
        for size in cache.captured_sizes() {
            let replayed = cache.replay(size, &mut runner, &batch(3.0)).expect("a replay");
            let replayed = bits(&mut runner, &replayed);
            let x = iota(device, &[size, 16], size as f32);
            let eager = runner.eager(&batch(3.0), forward_of(&x)).expect("an eager run");
            assert_eq!(replayed, bits(&mut runner, &eager), "{size} rows");
        }
    }
    assert_eq!(cache.captured_sizes(), [7, 20, 32]);
}

/// A runner and its graphs leave nothing behind.
pub fn dropping_everything_returns_everything(device: &Device) {
    let before = device.live_objects();
    {
        let mut runner = runner(device);
        let (mut graph, _x) = capture_size(&mut runner, 20);
        assert_usable(&mut runner);
        graph.replay(&mut runner, &batch(1.0)).expect("a replay");
        drop(runner); // before its graph: the graph keeps what it needs
        assert!(graph.is_captured());
    }
    assert_eq!(device.live_objects(), before);
}
