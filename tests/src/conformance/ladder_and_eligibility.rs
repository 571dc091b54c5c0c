//! Which sizes there are, and whether a forward replays, captures or runs eagerly.

use std::cell::Cell;

use bcg_runtime::{
    CacheOptions, Context, Decision, Device, DeviceKind, Eager, EagerReason, Error, GraphCache, Ladder, ReplayMode,
    Result, Runner, Tensor, eager_on_graph,
};

use super::fixture::{Batch, assert_usable, batch, bits, failure, iota, options, padded, runner, scaled, step};
use super::kernels::axpy;

/// Above 16 rows, a ladder of relative steps pads by at most an eighth.
pub fn padding_is_at_most_an_eighth_above_sixteen_rows(_device: &Device) {
    for max in [17, 64, 1000, 8192] {
        let ladder = Ladder::relative(max, 1).expect("a ladder");
        assert_eq!(ladder.largest(), max);
        for rows in 17..=max {
            let size = ladder.size_for(rows).expect("a size");
            assert!(size >= rows && (size - rows) * 8 <= rows, "{rows} rows are padded to {size}");
        }
        assert_eq!(ladder.size_for(max + 1), None);
    }
}

/// All sizes are multiples of the alignment that the layers ask for.
pub fn sizes_keep_the_alignment_of_the_layers(_device: &Device) {
    for alignment in [1, 2, 8, 64, 100] {
        let ladder = Ladder::relative(1000, alignment).expect("a ladder");
        assert!(ladder.sizes().iter().all(|size| size % alignment == 0), "{:?}", ladder.sizes());
        assert_eq!(ladder.largest(), 1000 / alignment * alignment);
    }
}

/// Sizes above the prefill chunk are dropped.
pub fn sizes_are_clamped_to_the_chunk(_device: &Device) {
    let ladder = Ladder::explicit(vec![512, 8, 64, 8]).expect("a ladder");
    assert_eq!(ladder.sizes(), [8, 64, 512]);
    assert_eq!(ladder.clamped(511).expect("a ladder").sizes(), [8, 64]);
    assert_eq!(ladder.clamped(512).expect("a ladder"), ladder);
}

/// Graphs that are asked for without any size are an error, not silence.
pub fn an_empty_ladder_with_graphs_asked_for_is_an_error(_device: &Device) {
    let ladder = Ladder::explicit(vec![64]).expect("a ladder");
    for refused in
        [Ladder::explicit(vec![]), ladder.clamped(63), Ladder::relative(0, 1), Ladder::relative(7, 8), Ladder::exact(0)]
    {
        let message = "capture sizes: graphs are asked for but no capture size is left; give at least one size above 0";
        assert_eq!(failure(refused).to_string(), message);
    }
    let error = failure(Ladder::explicit(vec![0, 8])).to_string();
    assert_eq!(error, "capture sizes: 0 is not a capture size; remove it");
}

type Cache = GraphCache<Batch, Tensor>;

fn cache(sizes: &[usize], mut options: CacheOptions) -> Cache {
    options.ladder = Some(Ladder::explicit(sizes.to_vec()).expect("a ladder"));
    Cache::new("prefill", options)
}

fn lazy() -> CacheOptions {
    let mut options = CacheOptions::default();
    options.lazy = true;
    options
}

fn forward_of(x: &Tensor) -> impl Fn(&mut Context<'_, Batch>) -> Result<Tensor> + Clone + Send + Sync + 'static {
    let x = x.clone();
    move |cx| {
        let y = step(cx, &x)?;
        let z = scaled(cx, &y)?;
        axpy(cx, 2.0, &z, &y)
    }
}

fn capture(cache: &mut Cache, runner: &mut Runner, size: usize) -> Result<Tensor> {
    let x = iota(&runner.device().clone(), &[size, 4], size as f32);
    cache.capture(size, runner, &padded(1.0, size, size), forward_of(&x))
}

/// Returns a cache that may take no memory, and a size whose graph it did not keep.
fn without_budget(runner: &mut Runner) -> (Cache, usize) {
    let mut options = lazy();
    options.ladder = Some(Ladder::exact(256).expect("a ladder"));
    options.bytes_max = 0;
    let mut cache = Cache::new("none", options);
    // A driver takes memory in pieces, so the first graphs may seem to cost nothing.
    let refused = (1..=256).find(|&size| {
        let x = iota(&runner.device().clone(), &[size, 4], size as f32);
        let forward = move |cx: &mut Context<'_, Batch>| (0..256).try_fold(x.clone(), |y, _| step(cx, &y));
        let live = padded(1.0, size, size);
        let output = cache.capture(size, runner, &live, forward.clone()).expect("a capture");
        let output = bits(runner, &output);
        let eager = runner.eager(&live, forward).expect("an eager run");
        assert_eq!(output, bits(runner, &eager), "the capture served its batch");
        !cache.captured_sizes().contains(&size)
    });
    assert_eq!(cache.graph_bytes(), 0);
    (cache, refused.expect("a size that was not kept"))
}

/// Every reason of the closed enum is reached, and counted.
pub fn every_reason_to_run_eagerly_is_reached_and_counted(device: &Device) {
    let mut runner = runner(device);
    let reached = Cell::new(0);
    let expect = |cache: &mut Cache, rows: usize, reason: EagerReason| {
        assert_eq!(cache.decide(rows), Decision::Eager(reason));
        assert_eq!(cache.stats().eager[&reason], 1);
        reached.set(reached.get() | 1 << reason as u32);
    };
    expect(&mut Cache::new("off", CacheOptions::default()), 4, EagerReason::Disabled);
    let mut ahead = cache(&[8, 32], CacheOptions::default());
    expect(&mut ahead, 0, EagerReason::NoRows);
    expect(&mut ahead, 33, EagerReason::AboveLargest);
    expect(&mut ahead, 9, EagerReason::TooMuchPadding);
    expect(&mut ahead, 8, EagerReason::NotCaptured);
    capture(&mut ahead, &mut runner, 8).expect("a capture");
    assert_eq!(ahead.decide(8), Decision::Replay { size: 8 });
    let mut failing = cache(&[8], lazy());
    assert_eq!(failing.decide(8), Decision::Capture { size: 8 });
    failure(failing.capture(8, &mut runner, &batch(1.0), |_| Err(Error::other("no"))));
    expect(&mut failing, 8, EagerReason::CaptureFailed);
    assert_eq!(failing.stats().num_capture_failures, 1);
    let (mut small, size) = without_budget(&mut runner);
    expect(&mut small, size, EagerReason::OverBudget);
    for reason in EagerReason::ALL {
        assert_ne!(reached.get() & 1 << reason as u32, 0, "{reason} was not reached");
    }
    assert_usable(&mut runner);
}

/// The first use of a size captures it, and that capture serves the request; later uses replay.
pub fn a_lazy_cache_captures_at_first_use(device: &Device) {
    let mut runner = runner(device);
    let mut cache = cache(&[4, 8, 16], lazy());
    for (rows, size, is_new) in [(3, 4, true), (4, 4, false), (9, 16, true), (2, 4, false), (16, 16, false)] {
        let x = iota(device, &[size, 4], size as f32);
        let live = padded(2.0, rows, size);
        let output = match cache.decide(rows) {
            Decision::Capture { size: decided } if is_new => {
                assert_eq!(decided, size);
                cache.capture(size, &mut runner, &live, forward_of(&x))
            }
            Decision::Replay { size: decided } if !is_new => {
                assert_eq!(decided, size);
                cache.replay(size, &mut runner, &live)
            }
            other => panic!("{rows} rows: {other:?}"),
        };
        let output = bits(&mut runner, &output.expect("a run"));
        let eager = runner.eager(&live, forward_of(&x)).expect("an eager run");
        assert_eq!(output, bits(&mut runner, &eager), "{rows} rows");
    }
    assert_eq!(cache.captured_sizes(), [4, 16]);
    assert_eq!((cache.stats().num_captures, cache.stats().num_replays), (2, 3));
}

/// A lazy cache of exact sizes captures each size as it is, and pads nothing.
pub fn a_lazy_cache_of_exact_sizes_pads_nothing(device: &Device) {
    let mut runner = runner(device);
    let mut options = lazy();
    options.ladder = Some(Ladder::exact(40).expect("a ladder"));
    let mut cache = Cache::new("exact", options);
    for rows in [1, 3, 17, 33, 39, 40] {
        assert_eq!(cache.decide(rows), Decision::Capture { size: rows });
        capture(&mut cache, &mut runner, rows).expect("a capture");
        assert_eq!(cache.decide(rows), Decision::Replay { size: rows });
    }
    assert_eq!(cache.decide(41), Decision::Eager(EagerReason::AboveLargest));
}

/// Beyond its bound, a cache drops the least recently used graph.
pub fn the_least_recently_used_graph_goes_first(device: &Device) {
    let mut runner = runner(device);
    let mut options = lazy();
    options.graphs_max = 2;
    let mut cache = cache(&[4, 5, 6, 7], options);
    capture(&mut cache, &mut runner, 4).expect("a capture");
    capture(&mut cache, &mut runner, 5).expect("a capture");
    cache.replay(4, &mut runner, &padded(1.0, 4, 4)).expect("a replay");
    capture(&mut cache, &mut runner, 6).expect("a capture");
    assert_eq!(cache.captured_sizes(), [4, 6]);
    assert!(matches!(failure(cache.replay(5, &mut runner, &batch(1.0))), Error::NotCaptured { .. }));
    assert_eq!(cache.decide(5), Decision::Capture { size: 5 }, "a dropped size is captured again when it is needed");
    capture(&mut cache, &mut runner, 7).expect("a capture");
    assert_eq!(cache.captured_sizes(), [6, 7]);
    assert_eq!(cache.stats().num_evictions, 2);
}

/// The graphs of a cache keep to their budget of device memory; the least recently used goes first, and no output
/// changes.
pub fn graphs_keep_to_their_budget_of_bytes(device: &Device) {
    let mut runner = runner(device);
    let sizes = [4, 5, 6, 7, 8, 9, 10, 11];
    let mut unbounded = cache(&sizes, lazy());
    for size in sizes {
        capture(&mut unbounded, &mut runner, size).expect("a capture");
    }
    let bytes_max = unbounded.graph_bytes() / 2;
    drop(unbounded);
    let mut options = lazy();
    options.bytes_max = bytes_max;
    let mut cache = cache(&sizes, options);
    for size in [4, 5, 6, 7, 8, 9, 10, 11, 7, 4, 4, 11] {
        let (x, live) = (iota(device, &[size, 4], size as f32), padded(1.0, size, size));
        let output = match cache.decide(size) {
            Decision::Capture { .. } => cache.capture(size, &mut runner, &live, forward_of(&x)),
            Decision::Replay { .. } => cache.replay(size, &mut runner, &live),
            Decision::Eager(_) => runner.eager(&live, forward_of(&x)),
        };
        let output = bits(&mut runner, &output.expect("a run"));
        let eager = runner.eager(&live, forward_of(&x)).expect("an eager run");
        assert_eq!(output, bits(&mut runner, &eager), "{size} rows");
        assert!(cache.graph_bytes() <= bytes_max, "{} of {bytes_max} bytes", cache.graph_bytes());
    }
    if device.kind() == DeviceKind::Host {
        assert_eq!(cache.captured_sizes(), [4, 7, 10, 11], "half of eight graphs of one size");
    }
}

#[eager_on_graph]
fn scaled_in_steps(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    let steps = cx.live().scale as usize;
    (0..steps).try_fold(x.clone(), |y, _| axpy(cx, 1.0, &y, x))
}

/// What a replay adds to its graph, because its breaks did other work, counts against the budget too.
pub fn executables_made_at_a_replay_count_against_the_budget(device: &Device) {
    let mut runner = runner(device);
    let inputs = [4, 5].map(|size| iota(device, &[size, 4], size as f32));
    let forward = |size: usize| {
        let x = inputs[size - 4].clone();
        move |cx: &mut Context<'_, Batch>| {
            let y = step(cx, &x)?;
            let z = scaled_in_steps(cx, &y)?;
            step(cx, &z)
        }
    };
    let mut bytes_max = usize::MAX;
    for is_bounded in [false, true] {
        let mut bounded = lazy();
        bounded.bytes_max = bytes_max;
        let mut cache = cache(&[4, 5], bounded);
        for size in [4, 5] {
            cache.capture(size, &mut runner, &padded(1.0, size, size), forward(size)).expect("a capture");
        }
        let captured_bytes = cache.graph_bytes();
        for steps in [2.0, 3.0, 2.0, 5.0] {
            if device.kind() == DeviceKind::Cuda && cache.decide(5) != (Decision::Replay { size: 5 }) {
                break; // a driver takes memory in pieces, of which one may be more than the budget
            }
            let live = padded(steps, 5, 5);
            let replayed = cache.replay(5, &mut runner, &live).expect("a replay");
            let replayed = bits(&mut runner, &replayed);
            let eager = runner.eager(&live, forward(5)).expect("an eager run");
            assert_eq!(replayed, bits(&mut runner, &eager), "{steps} steps");
            assert!(cache.graph_bytes() <= bytes_max, "{} of {bytes_max} bytes", cache.graph_bytes());
        }
        if is_bounded {
            let is_exact = device.kind() == DeviceKind::Host;
            assert!(!is_exact || cache.captured_sizes() == [5], "the other one had to go");
        } else if device.kind() == DeviceKind::Host && options().replay == ReplayMode::Healed {
            assert!(cache.graph_bytes() > captured_bytes, "{captured_bytes} bytes became {}", cache.graph_bytes());
        }
        bytes_max = cache.graph_bytes().saturating_sub(1);
    }
}

/// A graph that is dropped while its replay is queued finishes that replay.
pub fn a_graph_may_be_evicted_while_it_runs(device: &Device) {
    let mut runner = runner(device);
    device.host_control().into_iter().for_each(|control| control.set_delay("runner", true));
    let mut options = lazy();
    options.graphs_max = 1;
    let mut cache = cache(&[4, 5], options);
    let kept = iota(device, &[4, 4], 0.0);
    capture(&mut cache, &mut runner, 4).expect("a capture");
    let live = padded(3.0, 4, 4);
    let eager = runner.eager(&live, forward_of(&iota(device, &[4, 4], 4.0))).expect("an eager run");
    let expected = bits(&mut runner, &eager);
    let replayed = cache.replay(4, &mut runner, &live).expect("a replay");
    runner.tail(&live, |cx| cx.copy(&kept, &replayed)).expect("a tail");
    capture(&mut cache, &mut runner, 5).expect("the capture that evicts");
    assert_eq!((cache.captured_sizes(), bits(&mut runner, &kept)), (vec![5], expected));
    cache.clear();
    assert!(cache.captured_sizes().is_empty());
}

/// All sizes have the same number of breaks; a capture with another number is refused.
pub fn all_sizes_have_the_same_number_of_breaks(device: &Device) {
    let mut runner = runner(device);
    let mut cache = cache(&[4, 8], lazy());
    capture(&mut cache, &mut runner, 4).expect("a capture");
    let x = iota(device, &[8, 4], 0.0);
    let error = failure(cache.capture(8, &mut runner, &batch(1.0), move |cx| step(cx, &x)));
    assert!(matches!(error, Error::Census { expected: 1, got: 0, .. }), "{error}");
    assert_eq!(cache.captured_sizes(), [4]);
}

/// Every Nth replay of a cache is verified.
pub fn every_nth_replay_is_verified(device: &Device) {
    let mut runner = runner(device);
    let mut options = lazy();
    options.verify_every = Some(3);
    let mut cache = cache(&[4], options);
    capture(&mut cache, &mut runner, 4).expect("a capture");
    for index in 0..7 {
        cache.replay(4, &mut runner, &padded(index as f32, 4, 4)).expect("a replay");
    }
    assert_eq!((cache.stats().num_replays, cache.stats().num_verified), (7, 2));
}
