//! What the rules share: worlds of host devices with a lane for each rank, and a forward with every kind of collective.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bcg_kernels::{all_gather_columns, all_gather_rows, all_reduce, broadcast, reduce_scatter_rows, send_receive};
use bcg_runtime::{
    CommunicatorOptions, Context, Device, Eager, Error, HostOptions, LiveObjects, RankThreads, ReplayMode, Result,
    Runner, Tensor, World, WorldOptions, eager_on_graph,
};
use bcg_tests::conformance::fixture::{Batch, Graph, assert_usable, options, runner, scaled, step};
use bcg_tests::conformance::kernels::axpy;

/// How long ranks wait for one that does not come, where that is what a rule is about.
pub(crate) const SHORT: Duration = Duration::from_millis(200);
/// How long they wait where all come: longer than a loaded machine keeps a thread from running.
pub(crate) const LONG: Duration = Duration::from_secs(60);
/// Within which every rank has ended after another was lost: far more than [`SHORT`], for a loaded machine.
pub(crate) const BOUND: Duration = Duration::from_secs(20);
/// The numbers of ranks that the rules are run with.
pub(crate) const SIZES: [usize; 3] = [2, 4, 8];
/// Columns of the forward's input; rows are a multiple of [`SIZES`].
pub(crate) const COLUMNS: usize = 5;

/// One rank: what its thread works on.
pub(crate) struct Lane {
    pub(crate) runner: Runner,
    pub(crate) graph: Graph,
}

/// Makes the devices of a world, each with a schedule of its own.
pub(crate) fn devices(num_ranks: usize, seed: u64) -> Vec<Device> {
    let device = |rank: usize| {
        let mut options = HostOptions::default();
        (options.seed, options.ordinal) = (seed.wrapping_mul(31) + rank as u64, rank);
        Device::host_with(options)
    };
    (0..num_ranks).map(device).collect()
}

/// Makes a world of these devices.
pub(crate) fn world(devices: &[Device], timeout: Duration) -> World {
    let mut options = WorldOptions::default();
    options.timeout = timeout;
    World::new(devices.to_vec(), options).expect("a world")
}

/// Makes a thread and a runner, in poison mode, for each rank of a world of these devices.
pub(crate) fn lanes(devices: &[Device], timeout: Duration) -> RankThreads<Lane> {
    try_lanes(devices, timeout).expect("a runner for each rank")
}

/// As [`lanes`], where making them may fail.
pub(crate) fn try_lanes(devices: &[Device], timeout: Duration) -> Result<RankThreads<Lane>> {
    let world = world(devices, timeout);
    let lane =
        |communicator| Ok(Lane { runner: Runner::in_world(communicator, options())?, graph: Graph::new("ranks") });
    let lanes = world.communicators(CommunicatorOptions::default())?.into_iter().map(lane).collect::<Result<_>>()?;
    RankThreads::start(&world, lanes)
}

/// Runs `f` on every rank and returns what each got, errors too.
pub(crate) fn each<R: Send + 'static>(
    ranks: &mut RankThreads<Lane>,
    f: impl Fn(&mut Lane) -> Result<R> + Send + Sync + 'static,
) -> Vec<Result<R>> {
    let results = Arc::new(Mutex::new(BTreeMap::new()));
    let kept = Arc::clone(&results);
    let run = ranks.run(move |lane| {
        let result = f(lane);
        kept.lock().expect("no panic outside of forwards").insert(lane.runner.rank(), result);
        Ok(())
    });
    assert!(!matches!(run, Err(Error::Panic { .. })), "no panic outside of forwards: {run:?}");
    let results = std::mem::take(&mut *results.lock().expect("no panic outside of forwards"));
    results.into_values().collect()
}

/// Runs `f` on every rank, and checks that all results are equal. Returns them once.
pub(crate) fn all_equal<R: Send + PartialEq + std::fmt::Debug + 'static>(
    ranks: &mut RankThreads<Lane>,
    f: impl Fn(&mut Lane) -> Result<R> + Send + Sync + 'static,
) -> R {
    let results = ranks.run(f).expect("a run of all ranks");
    assert!(results.iter().all(|result| *result == results[0]), "ranks differ: {results:?}");
    results.into_iter().next().expect("at least one rank")
}

/// Checks that `f` ends within [`BOUND`], and returns what it returns.
pub(crate) fn bounded<R>(f: impl FnOnce() -> R) -> R {
    let begun = Instant::now();
    let result = f();
    assert!(begun.elapsed() < BOUND, "the ranks took {:?} to end", begun.elapsed());
    result
}

/// Checks that an error says which rank is lost.
pub(crate) fn assert_lost(error: &Error, lost: usize) {
    assert!(matches!(error.root(), Error::RankLost { rank, .. } if *rank == lost), "not the loss of {lost}: {error}");
}

/// Returns what is alive on each device.
pub(crate) fn live_objects(devices: &[Device]) -> Vec<LiveObjects> {
    devices.iter().map(Device::live_objects).collect()
}

/// Checks that nothing is left on the devices but what was there before, that each works on its own, and that a new world
/// of them does.
pub(crate) fn assert_as_before(devices: &[Device], before: &[LiveObjects], what: &str) {
    assert_eq!(live_objects(devices), before, "{what}: something leaked");
    for device in devices {
        device.synchronize().unwrap_or_else(|error| panic!("{what}: a failure is left on {}: {error}", device.name()));
        assert_eq!(device.host_control().expect("a host device").num_pending(), 0, "{what}: work is left");
        assert_usable(&mut runner(device));
    }
    let mut ranks = lanes(devices, LONG);
    all_equal(&mut ranks, |lane| run_eagerly(lane, 2.0, lane.runner.world_size()));
    drop(ranks);
    assert_eq!(live_objects(devices), before, "{what}: something of the second world leaked");
}

/// The input of a rank: other values on each.
pub(crate) fn input(lane: &Lane, rows: usize) -> Result<Tensor> {
    let rank = lane.runner.rank();
    let value = |at: usize| (1 + rank) as f32 * 0.37 + at as f32 * 0.11 - 1.0;
    let data: Vec<f32> = (0..rows * COLUMNS).map(value).collect();
    lane.runner.device().tensor(&[rows, COLUMNS], &data)
}

#[eager_on_graph]
fn summed(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    all_reduce(cx, x)
}

/// A forward with collectives in segments and in a break, and a side stream between them. All ranks get the same.
pub(crate) fn forward(x: Tensor) -> impl Fn(&mut Context<'_, Batch>) -> Result<Tensor> + Clone + Send + Sync + 'static {
    move |cx| {
        let sum = all_reduce(cx, &x)?;
        let own = axpy(cx, 1.0, &sum, &x)?; // differs from rank to rank
        let from_other = send_receive(cx, &own, 1)?;
        let own = scaled(cx, &from_other)?;
        let own = step(cx, &own)?;
        let own = summed(cx, &own)?;
        let own = axpy(cx, 0.5, &own, &x)?;
        let own = cx.scope(|cx| {
            let side = cx.side_stream("side")?;
            cx.on(&side, |cx| axpy(cx, 2.0, &own, &sum))
        })?;
        let part = reduce_scatter_rows(cx, &own)?;
        let part = scaled(cx, &part)?;
        let whole = all_gather_rows(cx, &part)?;
        let columns = all_gather_columns(cx, &own)?;
        let last = cx.world_size() - 1;
        let root = broadcast(cx, &columns.columns(0..COLUMNS)?, last)?;
        axpy(cx, 1.0, &whole, &root)
    }
}

/// Returns the bits of what the forward gives on the host.
pub(crate) fn read(lane: &mut Lane, output: &Tensor) -> Result<Vec<u32>> {
    Ok(lane.runner.read::<f32>(output)?.into_iter().map(f32::to_bits).collect())
}

/// Runs the forward eagerly.
pub(crate) fn run_eagerly(lane: &mut Lane, scale: f32, rows: usize) -> Result<Vec<u32>> {
    let forward = forward(input(lane, rows)?);
    let output = lane.runner.eager(&Batch { scale, rows: None }, forward)?;
    read(lane, &output)
}

/// Captures the forward in the lane's graph.
pub(crate) fn capture(lane: &mut Lane, scale: f32, rows: usize) -> Result<Vec<u32>> {
    let forward = forward(input(lane, rows)?);
    let output = lane.graph.capture(&mut lane.runner, &Batch { scale, rows: None }, forward)?;
    read(lane, &output)
}

/// Replays the lane's graph.
pub(crate) fn replay(lane: &mut Lane, mode: ReplayMode, scale: f32) -> Result<Vec<u32>> {
    lane.runner.set_replay_mode(mode);
    let output = lane.graph.replay(&mut lane.runner, &Batch { scale, rows: None })?;
    read(lane, &output)
}
