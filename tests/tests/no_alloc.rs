//! A replay allocates nothing on the host once it is warm, counted by the allocator of this process.
//!
//! The emulated device is counted too: warm, it enqueues and runs work without allocating. Not covered: vectors and live
//! values that the author of a break makes, and outputs that have to be copied into their bridges.

use bcg_runtime::{
    BreakableCudaGraph, Context, DType, Device, Eager, Result, Runner, RunnerOptions, Tensor, eager_on_graph,
};
use bcg_tests::allocations::{CountingAllocator, num_allocations};
use bcg_tests::conformance::fixture::{Batch, batch, padded};
use bcg_tests::conformance::kernels::{add_index_into, axpy, axpy_into};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

#[eager_on_graph]
fn two_launches(cx: &mut Eager<'_, Batch>, x: &Tensor, state: &Tensor) -> Result<Tensor> {
    let scale = cx.live().scale;
    axpy_into(cx, scale, x, state, state)?;
    axpy(cx, 0.5, x, state)
}

#[eager_on_graph]
fn on_a_side_stream(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
    let y = cx.scope(|cx| {
        let side = cx.side_stream("side")?;
        cx.on(&side, |cx| axpy(cx, 2.0, x, x))
    })?;
    let z = two_launches(cx, x, &y)?;
    Ok((y, Some(z)))
}

#[test]
fn a_warm_replay_allocates_nothing() {
    const BREAKS: usize = 36;
    let device = Device::host();
    let mut runner = Runner::new(&device, {
        let mut options = RunnerOptions::default();
        options.arena_bytes = 1 << 20;
        options
    })
    .expect("a runner");
    let (x, state) = (device.zeros(&[4, 8], DType::F32).expect("x"), device.zeros(&[4, 8], DType::F32).expect("state"));
    let mut graph = BreakableCudaGraph::new("warm");
    let forward = move |cx: &mut Context<'_, Batch>| {
        let mut y = cx.empty(x.shape(), x.dtype())?;
        add_index_into(cx, &x, &y)?;
        for _ in 0..BREAKS {
            y = two_launches(cx, &y, &state)?;
            add_index_into(cx, &y, &y)?;
            cx.fill_zero(&state)?;
        }
        Ok(on_a_side_stream(cx, &y)?.0)
    };
    graph.capture(&mut runner, &padded(1.0, 4, 4), forward).expect("a capture");
    let mut replay = |live: &Batch| {
        drop(graph.replay(&mut runner, live).expect("a replay"));
        runner.synchronize().expect("no failure");
    };
    // Until the emulated device's log of calls, the largest of its buffers, has reached its bound.
    (0..600).for_each(|_| replay(&padded(2.0, 3, 4)));
    for live in [padded(2.0, 3, 4), padded(-1.0, 4, 4), padded(0.5, 0, 4), batch(3.0)] {
        replay(&live);
        let before = num_allocations();
        (0..10).for_each(|_| replay(&live));
        assert_eq!(num_allocations() - before, 0, "10 replays of {BREAKS} breaks with {live:?}");
    }
}

#[test]
fn the_counter_counts() {
    let before = num_allocations();
    drop(std::hint::black_box(Box::new(7)));
    assert_eq!(num_allocations() - before, 1);
}
