//! Healed replay: what breaks enqueue becomes nodes of one launch, and always with the values of an eager run.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use bcg_runtime::{
    ChainReason, Context, DType, Device, Dims, Eager, Error, Event, PinnedBuffer, ReplayMode, ReplayPath, Result, Rows,
    Runner, Tensor, eager_on_graph,
};

use super::fixture::{
    Batch, Graph, assert_like_eager, assert_usable, batch, batches, bits, failure, iota, options, padded,
    replays_like_eager, scaled, step,
};
use super::kernels::{axpy, axpy_into, geometry};

/// A runner that heals, whatever way the rules run in.
fn healing(device: &Device) -> Runner {
    let mut runner = Runner::new(device, options()).expect("a runner");
    runner.set_replay_mode(ReplayMode::Healed);
    runner
}

/// Replays, checks the output against an eager run, and returns how the replay went.
fn path(
    runner: &mut Runner,
    graph: &mut Graph,
    live: &Batch,
    forward: impl Fn(&mut Context<'_, Batch>) -> Result<Tensor>,
) -> ReplayPath {
    replays_like_eager(runner, graph, &[*live], forward);
    graph.last_replay().expect("a replay")
}

/// Three layers: a captured step and a break each, and a step at the end.
fn layers(x: &Tensor) -> impl Fn(&mut Context<'_, Batch>) -> Result<Tensor> + Clone + Send + Sync + use<> {
    let x = x.clone();
    move |cx| {
        let mut y = step(cx, &x)?;
        for _ in 0..3 {
            y = scaled(cx, &y)?;
            y = step(cx, &y)?;
        }
        Ok(y)
    }
}

/// Reasons why no break of a graph heals.
fn not_healable(graph: &Graph) -> Vec<Option<&'static str>> {
    graph.describe().breaks.iter().map(|one| one.not_healable).collect()
}

/// Healed, chain and eager give the same, in any order of the two, and a healed replay is one launch.
pub fn healed_chain_and_eager_are_equal(device: &Device) {
    let (x, mut runner) = (iota(device, &[16], 1.0), healing(device));
    let mut graph = assert_like_eager(&mut runner, &batches(), layers(&x));
    for mode in [ReplayMode::Chain, ReplayMode::Healed, ReplayMode::Healed, ReplayMode::Chain, ReplayMode::Healed] {
        runner.set_replay_mode(mode);
        let path = path(&mut runner, &mut graph, &batch(7.0), layers(&x));
        let expected =
            if mode == ReplayMode::Healed { ReplayPath::Healed } else { ReplayPath::Chain(ChainReason::Mode) };
        assert_eq!(path, expected);
    }
    assert_eq!(not_healable(&graph), [None; 3]);
    if let Some(control) = device.host_control() {
        let mark = control.num_calls();
        graph.replay(&mut runner, &batch(1.0)).expect("a replay");
        let calls = control.calls_since(mark);
        let count = |wanted: &str| calls.iter().filter(|call| call.starts_with(wanted)).count();
        assert_eq!((count("cuGraphLaunch"), count("cuLaunchKernel"), count("cuGraphExecKernelNode")), (1, 0, 3));
    }
}

/// A graph that was captured for a chain heals later, and one that was captured ahead from its first replay on.
pub fn a_graph_heals_whatever_way_it_was_captured(device: &Device) {
    let (x, mut runner) = (iota(device, &[16], 1.0), healing(device));
    runner.eager(&batch(1.0), layers(&x)).expect("an eager run");
    runner.set_replay_mode(ReplayMode::Chain);
    let mut graph = assert_like_eager(&mut runner, &batches(), layers(&x));
    runner.set_replay_mode(ReplayMode::Healed);
    let first = path(&mut runner, &mut graph, &batch(3.0), layers(&x));
    assert_eq!(first, ReplayPath::Chain(ChainReason::WorkChanged), "nothing was merged at its capture");
    assert_eq!(path(&mut runner, &mut graph, &batch(4.0), layers(&x)), ReplayPath::Healed);
    let mut ahead = Graph::new("ahead");
    ahead.capture_ahead(&mut runner, &batch(1.0), layers(&x)).expect("a capture");
    assert_eq!(path(&mut runner, &mut ahead, &batch(5.0), layers(&x)), ReplayPath::Healed);
}

#[eager_on_graph]
fn with_geometry(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    let (blocks, threads) = (cx.live().scale as u32, 32 * (1 + cx.live().scale as u32 % 3));
    let dims = Dims { shared_bytes: 1024 * blocks, ..Dims::linear(blocks, threads) };
    let out = cx.empty(x.shape(), DType::F32)?;
    cx.fill_zero(&out)?;
    geometry(cx, dims, &out)?;
    axpy(cx, 1.0, x, &out)
}

/// Grid, block and shared memory of a break's launch may differ at each replay.
pub fn geometry_and_shared_memory_may_change(device: &Device) {
    let (x, mut runner) = (iota(device, &[64], 1.0), healing(device));
    let forward = move |cx: &mut Context<'_, Batch>| {
        let y = step(cx, &x)?;
        let y = with_geometry(cx, &y)?;
        step(cx, &y)
    };
    let mut graph = assert_like_eager(&mut runner, &[1.0, 60.0, 2.0, 60.0].map(batch), forward.clone());
    assert_eq!(path(&mut runner, &mut graph, &batch(33.0), forward), ReplayPath::Healed);
    // The fill writes the same memory each time and the addition reads it: of the three nodes one differs.
    assert_eq!(graph.describe().breaks[0].num_patched, 4, "patched where the geometry was another than before");
}

/// Nodes are patched only where something differs from the executable's last launch.
pub fn what_does_not_change_is_not_patched(device: &Device) {
    let (x, mut runner) = (iota(device, &[16], 1.0), healing(device));
    let mut graph = Graph::new("patched");
    graph.capture(&mut runner, &batch(2.0), layers(&x)).expect("a capture");
    let patched = |graph: &Graph| graph.describe().breaks.iter().map(|one| one.num_patched).sum::<u64>();
    for (scale, expected) in [(2.0, 0), (2.0, 0), (5.0, 3), (5.0, 3), (2.0, 6)] {
        path(&mut runner, &mut graph, &batch(scale), layers(&x));
        assert_eq!(patched(&graph), expected, "after scale {scale}");
    }
}

#[eager_on_graph]
fn several_launches(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    let count = cx.live().scale as usize;
    let out = cx.empty(x.shape(), DType::F32)?;
    cx.copy(&out, x)?;
    (0..count).try_for_each(|index| axpy_into(cx, index as f32, x, &out, &out))?;
    Ok(out)
}

/// Another number of kernels is a chain, equal and counted, the first time; then it heals too.
pub fn another_sequence_of_work_is_a_chain_once(device: &Device) {
    let (x, mut runner) = (iota(device, &[16], 1.0), healing(device));
    let forward = move |cx: &mut Context<'_, Batch>| {
        let y = step(cx, &x)?;
        let y = several_launches(cx, &y)?;
        let y = step(cx, &y)?;
        scaled(cx, &y)
    };
    let mut graph = assert_like_eager(&mut runner, &[batch(2.0)], forward.clone());
    let changed = ReplayPath::Chain(ChainReason::WorkChanged);
    let replays = [(2.0, ReplayPath::Healed), (3.0, changed), (3.0, ReplayPath::Healed), (2.0, ReplayPath::Healed)];
    for (scale, expected) in replays.into_iter().chain([(0.0, changed), (0.0, ReplayPath::Healed)]) {
        assert_eq!(path(&mut runner, &mut graph, &batch(scale), &forward), expected, "{scale} launches");
    }
    assert_eq!(graph.describe().num_merged, 3);
    // There is a bound on what is kept; beyond it the chain does the work.
    for scale in 4..30 {
        path(&mut runner, &mut graph, &batch(scale as f32), &forward);
    }
    let kept = graph.describe().num_merged;
    assert_eq!(path(&mut runner, &mut graph, &batch(31.0), &forward), changed);
    assert_eq!(path(&mut runner, &mut graph, &batch(31.0), &forward), changed);
    assert_eq!(path(&mut runner, &mut graph, &batch(3.0), &forward), ReplayPath::Healed);
    assert_eq!(graph.describe().num_merged, kept);
}

#[eager_on_graph]
fn reads_back(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    let scale = cx.live().scale + cx.read::<f32>(x)?[0];
    axpy(cx, scale, x, x)
}

/// A break that reads back stays a break; what stands before and after it is one launch each.
pub fn a_break_that_reads_back_stays_and_its_neighbours_merge(device: &Device) {
    let (x, mut runner) = (iota(device, &[16], 1.0), healing(device));
    let forward = move |cx: &mut Context<'_, Batch>| {
        let y = step(cx, &x)?;
        let y = scaled(cx, &y)?;
        let y = step(cx, &y)?;
        let y = reads_back(cx, &y)?;
        let y = step(cx, &y)?;
        let y = scaled(cx, &y)?;
        step(cx, &y)
    };
    let mut graph = assert_like_eager(&mut runner, &batches(), forward.clone());
    assert_eq!(not_healable(&graph), [None, Some("Eager::read"), None]);
    assert_eq!(path(&mut runner, &mut graph, &batch(3.0), &forward), ReplayPath::Healed);
    assert_eq!(graph.describe().num_merged, 2);
    if let Some(control) = device.host_control() {
        let mark = control.num_calls();
        graph.replay(&mut runner, &batch(1.0)).expect("a replay");
        let calls = control.calls_since(mark);
        assert_eq!(calls.iter().filter(|call| **call == "cuGraphLaunch").count(), 2);
    }
}

#[eager_on_graph]
fn copies_and_fills(
    cx: &mut Eager<'_, Batch>,
    x: &Tensor,
    one: &Arc<PinnedBuffer>,
    other: &Arc<PinnedBuffer>,
) -> Result<Tensor> {
    let at = cx.live().scale as usize;
    let out = cx.empty(&[4, 4], DType::F32)?;
    cx.copy(&out, x)?;
    cx.fill_bytes(&out.rows(at..at + 1)?, at as u8)?;
    cx.copy(&out.rows(3 - at..4 - at)?, &x.rows(at..at + 1)?)?;
    let part = cx.empty(&[4], DType::F32)?;
    cx.copy_from_pinned(&part, if at == 2 { one } else { other })?;
    axpy(cx, 1.0, &out, &part.reshape(&[1, 4])?.rows(0..1)?)?;
    cx.copy(&out.columns(0..2)?, &x.columns(2..4)?)?; // rows: a copy that never changes
    axpy_into(cx, 1.0, &out.rows(0..1)?, &part.reshape(&[1, 4])?, &out.rows(0..1)?)?;
    Ok(out)
}

/// Fills, copies, and copies from page-locked memory inside a break are patched like kernels.
pub fn copies_and_fills_in_a_break_heal(device: &Device) {
    let (x, mut runner) = (iota(device, &[4, 4], 1.0), healing(device));
    let [one, other] = [5.0f32, 9.0].map(|value| {
        let mut pinned = PinnedBuffer::new(device, 16).expect("pinned memory");
        pinned.write(&[value; 4]).expect("a write");
        Arc::new(pinned)
    });
    let forward = move |cx: &mut Context<'_, Batch>| {
        let y = step(cx, &x)?;
        let y = copies_and_fills(cx, &y, &one, &other)?;
        step(cx, &y)
    };
    let mut graph = assert_like_eager(&mut runner, &[1.0, 2.0, 3.0, 1.0].map(batch), forward.clone());
    for scale in [2.0, 1.0, 3.0, 0.0] {
        assert_eq!(path(&mut runner, &mut graph, &batch(scale), &forward), ReplayPath::Healed);
    }
}

#[eager_on_graph]
fn moved_rows(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    let at = cx.live().scale as usize;
    let out = cx.empty(&[4, 2], DType::F32)?;
    cx.copy(&out, &x.columns(at..at + 2)?)?;
    Ok(out)
}

/// The driver patches no copy of rows: one that moves is other work, and a graph keeps an executable for each place.
pub fn a_copy_of_rows_that_moves_is_other_work(device: &Device) {
    let (x, mut runner) = (iota(device, &[4, 4], 1.0), healing(device));
    let forward = move |cx: &mut Context<'_, Batch>| {
        let y = step(cx, &x)?;
        let y = moved_rows(cx, &y)?;
        step(cx, &y)
    };
    let mut graph = assert_like_eager(&mut runner, &[batch(0.0)], forward.clone());
    for (scale, expected) in [(0.0, ReplayPath::Healed), (1.0, ReplayPath::Chain(ChainReason::WorkChanged))] {
        assert_eq!(path(&mut runner, &mut graph, &batch(scale), &forward), expected);
        assert_eq!(path(&mut runner, &mut graph, &batch(scale), &forward), ReplayPath::Healed);
    }
}

#[eager_on_graph]
fn fails_at_nine(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    let y = axpy(cx, 1.0, x, x)?;
    match cx.live().scale {
        9.0 => Err(Error::other("nine")),
        8.0 => panic!("eight"),
        scale => axpy(cx, scale, &y, x),
    }
}

/// An error or a panic while work is kept back runs none of it, and the graph heals again.
pub fn an_error_while_recording_leaves_the_graph_replayable(device: &Device) {
    let (x, mut runner) = (iota(device, &[16], 1.0), healing(device));
    let forward = move |cx: &mut Context<'_, Batch>| {
        let y = step(cx, &x)?;
        let y = fails_at_nine(cx, &y)?;
        scaled(cx, &y)
    };
    let mut graph = assert_like_eager(&mut runner, &batches(), forward.clone());
    for scale in [9.0, 8.0] {
        let error = failure(graph.replay(&mut runner, &batch(scale)));
        assert!(matches!(error, Error::Break { name: "fails_at_nine", segment: 0, .. }), "{error}");
        assert_eq!(path(&mut runner, &mut graph, &batch(3.0), &forward), ReplayPath::Healed);
    }
    assert_usable(&mut runner);
}

/// Replays that are queued keep the arguments they were launched with, though the executable is patched meanwhile.
pub fn replays_in_flight_keep_their_arguments(device: &Device) {
    let mut runner = healing(device);
    let (x, kept) = (iota(device, &[16], 1.0), device.zeros(&[8, 16], DType::F32).expect("a tensor"));
    let mut graph = assert_like_eager(&mut runner, &batches(), layers(&x));
    let scales: Vec<f32> = (0..8).map(|index| index as f32 - 3.0).collect();
    for (index, &scale) in scales.iter().enumerate() {
        let output = graph.replay(&mut runner, &batch(scale)).expect("a replay");
        assert_eq!(graph.last_replay(), Some(ReplayPath::Healed));
        let row = kept.rows(index..index + 1).and_then(|row| row.reshape(&[16])).expect("a row");
        runner.tail(&batch(scale), |cx| cx.copy(&row, &output)).expect("a tail");
    }
    let kept = bits(&mut runner, &kept);
    for (row, scale) in kept.chunks(16).zip(scales) {
        let eager = runner.eager(&batch(scale), layers(&x)).expect("an eager run");
        assert_eq!(row, bits(&mut runner, &eager), "scale {scale}");
    }
}

/// A replay patches and launches while the replay before it runs: it returns before that one is done.
pub fn patching_does_not_wait_for_a_running_replay(device: &Device) {
    let control = device.host_control();
    // Milliseconds of copies for a GPU, so that the host is far ahead of it.
    let (numel, num_copies) = if control.is_some() { (16, 2) } else { (64 << 20, 32) };
    let [from, to] = [0; 2].map(|_| device.zeros(&[numel], DType::F32).expect("a tensor"));
    let (x, mut runner) = (iota(device, &[16], 1.0), healing(device));
    let forward = move |cx: &mut Context<'_, Batch>| {
        let mut y = step(cx, &x)?;
        for _ in 0..num_copies {
            cx.copy(&to, &from)?;
        }
        for _ in 0..3 {
            y = scaled(cx, &y)?;
        }
        step(cx, &y)
    };
    let mut graph = assert_like_eager(&mut runner, &batches(), forward);
    let num_patched = |graph: &Graph| graph.describe().breaks.iter().map(|one| one.num_patched).sum::<u64>();
    runner.synchronize().expect("a wait");
    if let Some(control) = &control {
        control.set_delay("runner", true);
    }
    let (before, start) = (num_patched(&graph), Instant::now());
    let mut num_pending = 0;
    for scale in [5.0, 6.0, 7.0] {
        graph.replay(&mut runner, &batch(scale)).expect("a replay");
        if let Some(control) = &control {
            assert!(control.num_pending() > num_pending, "a replay ran work that was queued");
            num_pending = control.num_pending();
        }
    }
    let launched = start.elapsed();
    runner.synchronize().expect("a wait");
    let finished = start.elapsed();
    assert_eq!((num_patched(&graph) - before, graph.last_replay()), (9, Some(ReplayPath::Healed)));
    assert!(control.is_some() || 3 * launched < finished, "launched after {launched:?}, finished after {finished:?}");
}

/// What a break's body does besides launching, chosen by the live batch.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Aside {
    Nothing,
    ReadDevice,
    Synchronize,
    Upload,
    Matmul,
    SideStream,
    Event,
    FreesWhatItUsed,
    OtherRunner,
}

const ASIDES: [(Aside, Option<&str>); 9] = [
    (Aside::Nothing, None),
    (Aside::ReadDevice, Some("Device::synchronize")),
    (Aside::Synchronize, Some("Stream::synchronize")),
    (Aside::Upload, Some("Eager::upload")),
    (Aside::Matmul, Some("a matrix product")),
    (Aside::SideStream, Some("a side stream")),
    (Aside::Event, Some("an event")),
    (Aside::FreesWhatItUsed, Some("freeing device memory")),
    (Aside::OtherRunner, None),
];

/// Adds to `total`, does something aside with what it has so far, and adds again.
#[eager_on_graph]
fn with_aside(cx: &mut Eager<'_, Batch>, x: &Tensor, total: &Tensor) -> Result<Tensor> {
    let aside = ASIDES[cx.live().scale as usize].0;
    axpy_into(cx, 1.0, x, total, total)?;
    let device = cx.device().clone();
    let square = cx.empty(&[4, 4], DType::F32)?;
    cx.copy(&square, &total.reshape(&[4, 4])?)?;
    match aside {
        Aside::Nothing => {}
        Aside::ReadDevice => cx.fill_bytes(&square, device.read::<f32>(total)?[0] as u8)?,
        Aside::Synchronize => cx.synchronize()?,
        Aside::Upload => cx.upload(&square, &[3.0f32; 16])?,
        Aside::Matmul => cx.matmul(&square, &total.reshape(&[4, 4])?, &x.reshape(&[4, 4])?)?,
        Aside::SideStream => cx.scope(|cx| {
            let side = cx.side_stream("aside")?;
            cx.on(&side, |cx| cx.copy(&square, &x.reshape(&[4, 4])?))
        })?,
        Aside::Event => cx.record(&Event::new(&device)?)?,
        Aside::FreesWhatItUsed => {
            let lent = device.zeros(&[4, 4], DType::F32)?;
            axpy_into(cx, 1.0, &lent, &square, &square)?;
        }
        Aside::OtherRunner => {
            let mut other = Runner::new(&device, options())?;
            let own = iota(&device, &[4], 0.0);
            let mut graph = Graph::new("other");
            graph.capture(&mut other, &batch(2.0), move |cx| scaled(cx, &own))?;
            let doubled = graph.replay(&mut other, &batch(1.0))?;
            assert_eq!(other.read::<f32>(&doubled)?, [0.0, 2.0, 4.0, 6.0]);
        }
    }
    axpy(cx, 2.0, &square, &total.reshape(&[4, 4])?)
}

/// Whatever a body does at a replay, in the middle of work that was kept back: it finds the device as in an eager run,
/// the replay gives the values of one, and the break stays a break from then on.
pub fn a_body_that_leaves_the_record_finds_the_device_as_in_an_eager_run(device: &Device) {
    for (index, (aside, reason)) in ASIDES.into_iter().enumerate() {
        let (x, total) = (iota(device, &[16], 1.0), device.zeros(&[16], DType::F32).expect("a total"));
        let mut runner = healing(device);
        let cell = total.clone();
        let forward = move |cx: &mut Context<'_, Batch>| {
            let y = step(cx, &x)?;
            let y = with_aside(cx, &y, &cell)?;
            let z = step(cx, &y)?;
            scaled(cx, &z)
        };
        let mut graph = Graph::new("aside");
        graph.capture(&mut runner, &batch(0.0), forward.clone()).expect("a capture");
        for round in 0..3 {
            device.write(&total, &[1.0f32; 16]).expect("a write");
            let replayed = graph.replay(&mut runner, &batch(index as f32)).expect("a replay");
            let replayed = (bits(&mut runner, &replayed), device.read::<f32>(&total).expect("a read"));
            device.write(&total, &[1.0f32; 16]).expect("a write");
            let eager = runner.eager(&batch(index as f32), &forward).expect("an eager run");
            let eager = (bits(&mut runner, &eager), device.read::<f32>(&total).expect("a read"));
            assert_eq!(replayed, eager, "{aside:?}, replay {round}");
        }
        let why = not_healable(&graph);
        match (aside, reason) {
            // It frees its runner's memory.
            (Aside::OtherRunner, _) => assert!(why[0].is_some(), "{why:?}"),
            (_, reason) => assert_eq!(why, [reason, None], "{aside:?}"),
        }
        assert_usable(&mut runner);
    }
}

/// Memory that is lent to one run of a body: the handles are the only ones.
type Lent = Arc<Mutex<Option<(Tensor, Arc<PinnedBuffer>)>>>;

fn lend(device: &Device, lent: &Lent, value: f32) {
    let mut pinned = PinnedBuffer::new(device, 64).expect("pinned memory");
    pinned.write(&[value; 16]).expect("a write");
    let tensor = device.tensor(&[16], &[10.0 * value; 16]).expect("a tensor");
    *lent.lock().expect("no panic") = Some((tensor, Arc::new(pinned)));
}

/// Drops handles, and takes memory of the same size and another content, which may lie where the other was.
fn drop_and_overwrite(device: &Device, handles: (Tensor, Arc<PinnedBuffer>)) -> Result<()> {
    drop(handles);
    let mut pinned = PinnedBuffer::new(device, 64)?;
    pinned.write(&[f32::NAN; 16])?;
    device.tensor(&[16], &[f32::NAN; 16]).map(drop)
}

/// Adds what is lent to `x`. Another thread drops it before the body ends.
#[eager_on_graph]
fn with_lent_memory(cx: &mut Eager<'_, Batch>, x: &Tensor, lent: &Lent) -> Result<Tensor> {
    let handles = lent.lock().expect("no panic").take().expect("lent for this run");
    let staged = cx.empty(&[16], DType::F32)?;
    cx.copy_from_pinned(&staged, &handles.1)?;
    let scale = cx.live().scale;
    let sum = axpy(cx, scale, &handles.0, &staged)?;
    let device = cx.device().clone();
    std::thread::spawn(move || drop_and_overwrite(&device, handles)).join().expect("no panic")?;
    axpy(cx, 1.0, x, &sum)
}

/// Another thread may drop the last handle to memory that kept-back work names: it is freed once that work is enqueued.
pub fn memory_that_another_thread_gives_up_is_kept_for_work_kept_back(device: &Device) {
    let (x, mut runner, lent) = (iota(device, &[16], 1.0), healing(device), Lent::default());
    let also = Arc::clone(&lent);
    let forward = move |cx: &mut Context<'_, Batch>| {
        let y = step(cx, &x)?;
        let y = with_lent_memory(cx, &y, &also)?;
        step(cx, &y)
    };
    let mut graph = Graph::new("lent");
    lend(device, &lent, 1.0);
    graph.capture(&mut runner, &batch(1.0), forward).expect("a capture");
    let objects = device.live_objects();
    for (value, scale) in [(1.0, 1.0), (2.0, 3.0), (3.0, -1.0)] {
        lend(device, &lent, value);
        let replayed = graph.replay(&mut runner, &batch(scale)).expect("a replay");
        let added = scale * 10.0 * value + value;
        let expected: Vec<f32> = (0..16).map(|i| 1.0 + 3.0 * i as f32 + added).collect();
        assert_eq!(runner.read::<f32>(&replayed).expect("a read"), expected);
        assert_eq!(graph.last_replay(), Some(ReplayPath::Healed));
        let now = device.live_objects();
        assert_eq!(
            (now.allocations, now.allocated_bytes),
            (objects.allocations, objects.allocated_bytes),
            "it is freed"
        );
    }
}

/// A runner with a graph, which a body replays, and what is lent to that graph's body.
type Inner = Arc<Mutex<(Runner, Graph)>>;

/// Adds `x` and what is lent to `total`, then replays a graph whose body drops what is lent.
#[eager_on_graph]
fn with_inner_replay(
    cx: &mut Eager<'_, Batch>,
    x: &Tensor,
    total: &Tensor,
    lent: &Lent,
    inner: &Inner,
) -> Result<Tensor> {
    let lent_now = lent.lock().expect("no panic").clone();
    if let Some((tensor, _)) = &lent_now {
        axpy_into(cx, 1.0, x, tensor, total)?;
    }
    drop(lent_now);
    let (runner, graph) = &mut *inner.lock().expect("no panic");
    let seen = graph.replay(runner, &batch(0.0))?;
    assert_eq!(runner.read::<f32>(&seen)?[0], cx.device().read::<f32>(total)?[0], "as in an eager run");
    axpy(cx, 1.0, x, total)
}

/// Reads `total`, and drops what is lent.
#[eager_on_graph]
fn reading_and_dropping(cx: &mut Eager<'_, Batch>, total: &Tensor, lent: &Lent) -> Result<Tensor> {
    if let Some(handles) = lent.lock().expect("no panic").take() {
        drop_and_overwrite(&cx.device().clone(), handles)?;
    }
    let values = cx.device().read::<f32>(total)?;
    let out = cx.empty(&[16], DType::F32)?;
    cx.upload(&out, &values)?;
    Ok(out)
}

/// A replay inside a break finds the device as in an eager run: what the break has enqueued has run for its reads, and is
/// over for what it frees.
pub fn a_replay_inside_a_break_finds_the_work_before_it_enqueued(device: &Device) {
    let (x, total) = (iota(device, &[16], 1.0), device.zeros(&[16], DType::F32).expect("a total"));
    let (lent, mut runner) = (Lent::default(), healing(device));
    let inner = {
        let (mut runner, mut graph) = (healing(device), Graph::new("inner"));
        let (x, total, lent) = (x.clone(), total.clone(), Arc::clone(&lent));
        let forward = move |cx: &mut Context<'_, Batch>| {
            scaled(cx, &x)?; // so that this graph is replayed with work kept back too
            reading_and_dropping(cx, &total, &lent)
        };
        graph.capture(&mut runner, &batch(0.0), forward).expect("a capture");
        Inner::new(Mutex::new((runner, graph)))
    };
    let mut graph = Graph::new("outer");
    let also = Arc::clone(&lent);
    let forward = move |cx: &mut Context<'_, Batch>| {
        let y = step(cx, &x)?;
        with_inner_replay(cx, &y, &total, &also, &inner)
    };
    graph.capture(&mut runner, &batch(1.0), forward).expect("a capture");
    for value in [1.0, 2.0, 3.0] {
        lend(device, &lent, value);
        let replayed = graph.replay(&mut runner, &batch(1.0)).expect("a replay");
        let expected: Vec<f32> = (0..16).map(|i| 2.0 * (1.0 + 2.0 * i as f32) + 10.0 * value).collect();
        assert_eq!(runner.read::<f32>(&replayed).expect("a read"), expected);
    }
    assert_eq!(not_healable(&graph), [Some("a replay or capture of another graph")]);
}

/// A forward whose batch fills its rows heals, and so does one with a tail to scrub, without a patch.
pub fn padded_and_exact_batches_heal(device: &Device) {
    const SIZE: usize = 6;
    let (x, mut runner) = (iota(device, &[SIZE, 4], 1.0), healing(device));
    let mut graph = assert_like_eager(&mut runner, &[padded(2.0, SIZE, SIZE)], layers(&x));
    path(&mut runner, &mut graph, &padded(2.0, 3, SIZE), layers(&x));
    let patched = |graph: &Graph| graph.describe().breaks.iter().map(|one| one.num_patched).sum::<u64>();
    let before = patched(&graph);
    for valid in [1, 2, SIZE, 5, 0] {
        let rows = Rows { valid, padded: SIZE };
        assert_eq!(
            path(&mut runner, &mut graph, &Batch { scale: 2.0, rows: Some(rows) }, layers(&x)),
            ReplayPath::Healed
        );
    }
    assert_eq!(patched(&graph), before, "the number of valid rows lies on the device");
}

/// Bridges are not copied: a break's output is served where the capture had it, in a healed replay too.
pub fn a_healed_replay_copies_no_bridge(device: &Device) {
    let (x, mut runner) = (iota(device, &[16], 1.0), healing(device));
    let mut graph = assert_like_eager(&mut runner, &batches(), layers(&x));
    let before = runner.stats();
    (0..10).for_each(|scale| drop(graph.replay(&mut runner, &batch(scale as f32)).expect("a replay")));
    let after = runner.stats();
    assert_eq!(after.bridge_copied_bytes, before.bridge_copied_bytes);
    assert_eq!(after.num_copies, before.num_copies);
}
