//! What a break reads anew at each replay and what it keeps from its capture (laws L1, L2 and L12).

use std::sync::{Arc, Mutex};

use bcg_runtime::{
    BreakableCudaGraph, Context, DType, Device, Eager, Freeze, Generation, LiveBatch, Result, Tensor, eager_on_graph,
};

use super::fixture::{
    Batch, Graph, assert_like_eager, batch, batches, bits, failure, iota, replays_like_eager, runner, scaled, step,
};
use super::kernels::{axpy, copy_index, count};

/// A replay reads what its static inputs hold now, in segments and in breaks.
pub fn replay_reads_live_inputs(device: &Device) {
    let x = iota(device, &[8], 1.0);
    let forward = {
        let x = x.clone();
        move |cx: &mut Context<'_, Batch>| {
            let y = step(cx, &x)?;
            let z = scaled(cx, &x)?;
            axpy(cx, 3.0, &y, &z)
        }
    };
    let mut runner = runner(device);
    let mut graph = Graph::new("inputs");
    let captured = graph.capture(&mut runner, &batch(2.0), forward.clone()).expect("a capture");
    let mut last = bits(&mut runner, &captured);
    for round in 1..4 {
        let data: Vec<f32> = (0..8).map(|i| (i * round * 10) as f32).collect();
        runner.upload(&x, &data).expect("an upload");
        let replayed = graph.replay(&mut runner, &batch(2.0)).expect("a replay");
        let replayed = bits(&mut runner, &replayed);
        assert_ne!(replayed, last);
        let expected: Vec<u32> = (0..8).map(|i| (3.0 * (data[i] + i as f32) + 3.0 * data[i]).to_bits()).collect();
        assert_eq!(replayed, expected);
        last = replayed;
    }
    replays_like_eager(&mut runner, &mut graph, &batches(), forward);
}

/// A batch full of host values.
struct HostValues {
    scale: f32,
    indices: Vec<i32>,
    offsets: (f32, Option<f32>),
    name: String,
}

impl LiveBatch for HostValues {}

#[eager_on_graph]
fn uses_all_host_values(cx: &mut Eager<'_, HostValues>, x: &Tensor) -> Result<Tensor> {
    let live = cx.live();
    let index = cx.empty(&[live.indices.len()], DType::I32)?;
    cx.upload(&index, &live.indices)?;
    let picked = copy_index(cx, x, &index)?;
    let offset = cx.empty(picked.shape(), DType::F32)?;
    let value = live.offsets.0 + live.offsets.1.unwrap_or(0.0) + live.name.len() as f32;
    cx.upload(&offset, &vec![value; live.indices.len()])?;
    axpy(cx, live.scale, &picked, &offset)
}

/// With every host value of the batch changed since the capture, a replay equals an eager run.
pub fn no_host_value_of_the_captured_batch_survives_to_a_replay(device: &Device) {
    let x = iota(device, &[8], 1.0);
    let forward = move |cx: &mut Context<'_, HostValues>| {
        let y = axpy(cx, 1.0, &x, &x)?;
        let y = uses_all_host_values(cx, &y)?;
        let y = axpy(cx, 2.0, &y, &y)?;
        uses_all_host_values(cx, &y)
    };
    let batches = [
        HostValues { scale: 2.0, indices: vec![0, 1, 2], offsets: (1.0, None), name: "captured".to_owned() },
        HostValues { scale: -1.0, indices: vec![2, 0, 1], offsets: (5.0, Some(7.0)), name: String::new() },
        HostValues { scale: 0.0, indices: vec![1, 1, 1], offsets: (-5.0, Some(0.5)), name: "another one".to_owned() },
    ];
    let mut runner = runner(device);
    let mut graph = BreakableCudaGraph::new("host values");
    graph.capture(&mut runner, &batches[0], forward.clone()).expect("a capture");
    for live in batches.iter().rev() {
        let replayed = graph.replay(&mut runner, live).expect("a replay");
        let replayed = bits(&mut runner, &replayed);
        let eager = runner.eager(live, &forward).expect("an eager run");
        assert_eq!(replayed, bits(&mut runner, &eager), "{}", live.name);
    }
}

#[derive(Clone, Freeze)]
struct Cache {
    k: Tensor,
    v: Option<Tensor>,
    page_size: usize,
}

#[derive(Clone, Freeze)]
struct Pair<T>(T, &'static str);

#[eager_on_graph]
fn sum_of_all(
    cx: &mut Eager<'_, Batch>,
    pair: &(Tensor, f32),
    maybe: &Option<Tensor>,
    list: &Vec<Tensor>,
    cache: &Cache,
    tagged: &Pair<[Tensor; 2]>,
    plain: (Arc<str>, bool, u8, i64, char),
) -> Result<Tensor> {
    let (shared, yes, seven, minus_nine, x) = plain;
    assert_eq!((&*shared, tagged.1, yes, seven, minus_nine, x), ("shared", "tag", true, 7, -9, 'x'));
    let mut sum = axpy(cx, pair.1, &pair.0, &pair.0)?;
    for x in list.iter().chain(maybe).chain([&cache.k]).chain(&cache.v).chain(&tagged.0) {
        sum = axpy(cx, 1.0, x, &sum)?;
    }
    let scale = cx.live().scale * cache.page_size as f32;
    axpy(cx, scale, &sum, &sum)
}

/// Tuples, options, vectors, arrays, shared values, scalars and derived structs are frozen at capture and come back.
pub fn arguments_of_every_kind_come_back_at_replay(device: &Device) {
    let x = iota(device, &[8], 1.0);
    for has_option in [true, false] {
        let x = x.clone();
        let graph = assert_like_eager(&mut runner(device), &batches(), move |cx| {
            let y = step(cx, &x)?;
            let z = step(cx, &y)?;
            let option = has_option.then(|| y.clone());
            let cache = Cache { k: z.clone(), v: option.clone(), page_size: 4 };
            let tagged = Pair([x.clone(), y.clone()], "tag");
            let list = vec![y.clone(), z.clone(), x.clone()];
            let plain = (Arc::from("shared"), true, 7, -9, 'x');
            let sum = sum_of_all(cx, &(y, 3.0), &option, &list, &cache, &tagged, plain)?;
            step(cx, &sum)
        });
        assert_eq!(graph.describe().breaks[0].num_args, if has_option { 9 } else { 7 });
    }
}

/// A batch that owns something.
struct Owner(f32, #[expect(dead_code, reason = "only its life matters")] Arc<()>);

impl LiveBatch for Owner {}

#[eager_on_graph]
fn uses_owner(cx: &mut Eager<'_, Owner>, x: &Tensor) -> Result<Tensor> {
    let scale = cx.live().0;
    axpy(cx, scale, x, x)
}

/// Nothing that a graph keeps refers to the batch it was captured with.
pub fn a_break_keeps_no_reference_to_the_captured_batch(device: &Device) {
    let x = iota(device, &[8], 1.0);
    let mut runner = runner(device);
    let mut graph = BreakableCudaGraph::new("owner");
    let owned = Arc::new(());
    let captured = Owner(2.0, Arc::clone(&owned));
    graph.capture(&mut runner, &captured, move |cx: &mut Context<'_, Owner>| uses_owner(cx, &x)).expect("a capture");
    drop(captured);
    assert_eq!(Arc::strong_count(&owned), 1, "the graph holds the captured batch");
    let replayed = graph.replay(&mut runner, &Owner(-2.0, Arc::clone(&owned))).expect("a replay");
    assert_eq!(runner.read::<f32>(&replayed).expect("a read")[1], -2.0);
    assert_eq!(Arc::strong_count(&owned), 1, "the graph holds the replayed batch");
}

/// Weights written in place are what the next replay uses, and their generation stays.
pub fn weights_updated_in_place_are_seen_by_replay(device: &Device) {
    let weights = Generation::new("weights");
    let w = iota(device, &[8], 1.0).stamped(&weights).expect("a stamp");
    let forward = {
        let w = w.clone();
        move |cx: &mut Context<'_, Batch>| {
            let y = step(cx, &w)?;
            let z = scaled(cx, &w)?;
            axpy(cx, 1.0, &y, &z)
        }
    };
    let mut runner = runner(device);
    let mut graph = assert_like_eager(&mut runner, &batches(), forward.clone());
    device.write(&w, &[9.0f32; 8]).expect("a write");
    replays_like_eager(&mut runner, &mut graph, &batches(), forward);
    let replayed = graph.replay(&mut runner, &batch(2.0)).expect("a replay");
    assert_eq!(runner.read::<f32>(&replayed).expect("a read")[3], 9.0 + 3.0 + 27.0);
}

#[eager_on_graph]
fn uses_shared(cx: &mut Eager<'_, Batch>, shared: &Arc<Tensor>, x: &Tensor) -> Result<Tensor> {
    axpy(cx, 1.0, shared, x)
}

/// A graph captured with weights that were replaced since is refused, whether a segment, an argument or the inside of a
/// break uses them; a new capture works.
pub fn rebinding_weights_after_capture_is_refused(device: &Device) {
    type Forward = fn(&mut Context<'_, Batch>, &Tensor) -> Result<Tensor>;
    let uses: [(&str, Forward); 3] = [
        ("segment", |cx, w| step(cx, w)),
        ("argument", |cx, w| scaled(cx, w)),
        ("inside a break", |cx, w| {
            let x = cx.empty(w.shape(), w.dtype())?;
            cx.fill_zero(&x)?;
            uses_shared(cx, &Arc::new(w.clone()), &x)
        }),
    ];
    for (place, forward) in uses {
        let weights = Generation::new("weights");
        let w = iota(device, &[8], 1.0).stamped(&weights).expect("a stamp");
        let mut runner = runner(device);
        let mut graph = assert_like_eager(&mut runner, &batches(), move |cx| forward(cx, &w));
        weights.advance();
        let error = failure(graph.replay(&mut runner, &batch(1.0)));
        let message = "weights changed after the capture (generation 0 captured, 1 now); capture the graph again";
        assert_eq!(error.root().to_string(), message, "{place}");
        let w = iota(device, &[8], 2.0).stamped(&weights).expect("a stamp");
        assert_like_eager(&mut runner, &batches(), move |cx| forward(cx, &w));
    }
}

/// A graph captured with a KV pool that was made anew since is refused.
pub fn a_kv_pool_made_anew_after_capture_is_refused(device: &Device) {
    let generation = Generation::new("kv pool");
    let make_pool = || {
        let k = iota(device, &[4, 2], 0.0).stamped(&generation).expect("a stamp");
        let v = iota(device, &[4, 2], 9.0).stamped(&generation).expect("a stamp");
        Cache { k, v: Some(v), page_size: 2 }
    };
    let capture = |runner: &mut bcg_runtime::Runner, pool: &Cache| {
        let pool = pool.clone();
        assert_like_eager(runner, &batches(), move |cx| {
            let x = step(cx, &pool.k)?;
            attend(cx, &pool, &x)
        })
    };
    let mut runner = runner(device);
    let pool = make_pool();
    let mut graph = capture(&mut runner, &pool);
    drop(pool);
    generation.advance();
    let pool = make_pool();
    let error = failure(graph.replay(&mut runner, &batch(1.0))).to_string();
    assert_eq!(error, "kv pool changed after the capture (generation 0 captured, 1 now); capture the graph again");
    capture(&mut runner, &pool);
}

#[eager_on_graph]
fn attend(cx: &mut Eager<'_, Batch>, pool: &Cache, x: &Tensor) -> Result<Tensor> {
    let scale = cx.live().scale;
    let y = axpy(cx, scale, &pool.k, x)?;
    match &pool.v {
        Some(v) => axpy(cx, 1.0, v, &y),
        None => Ok(y),
    }
}

#[eager_on_graph]
fn counted_break(cx: &mut Eager<'_, Batch>, cell: &Tensor, runs: &Arc<Mutex<usize>>) -> Result<()> {
    *runs.lock().expect("runs") += 1;
    count(cx, cell)
}

/// State is written as often at capture and at replay as in an eager run: once for each run, on device and host.
pub fn side_effects_happen_as_often_as_in_eager(device: &Device) {
    let cells: Vec<Tensor> = (0..2).map(|_| device.zeros(&[1], DType::I32).expect("a cell")).collect();
    let runs = Arc::new(Mutex::new(0));
    let (captured_cells, captured_runs) = (cells.clone(), Arc::clone(&runs));
    let forward = move |cx: &mut Context<'_, Batch>| {
        count(cx, &captured_cells[0])?;
        counted_break(cx, &captured_cells[1], &captured_runs)?;
        count(cx, &captured_cells[0])?;
        counted_break(cx, &captured_cells[1], &captured_runs)
    };
    let mut runner = runner(device);
    let mut graph = BreakableCudaGraph::<Batch, ()>::new("effects");
    let expect = |runner: &mut bcg_runtime::Runner, num_runs: i32| {
        let counts: Vec<i32> = cells.iter().flat_map(|cell| runner.read::<i32>(cell).expect("a read")).collect();
        assert_eq!(counts, [2 * num_runs; 2]);
        assert_eq!(*runs.lock().expect("runs"), 2 * num_runs as usize);
    };
    runner.eager(&batch(1.0), &forward).expect("an eager run");
    expect(&mut runner, 1);
    graph.capture(&mut runner, &batch(1.0), forward).expect("a capture");
    expect(&mut runner, 2);
    for replays in 1..=3 {
        graph.replay(&mut runner, &batch(1.0)).expect("a replay");
        expect(&mut runner, 2 + replays);
    }
}

/// A graph keeps the persistent tensors that its segments and breaks use.
pub fn a_graph_keeps_its_persistent_tensors_alive(device: &Device) {
    let mut runner = runner(device);
    let mut graph = Graph::new("keeps");
    let allocated = || device.live_objects().allocations;
    let before = allocated();
    let (a, b) = (Arc::new(Mutex::new(Some(iota(device, &[8], 1.0)))), iota(device, &[8], 2.0));
    let taken = Arc::clone(&a);
    let captured = graph.capture(&mut runner, &batch(2.0), move |cx| {
        // The forward itself keeps `b`, but of `a` only the recorded work and the frozen argument are left.
        let a = taken.lock().expect("a").take().expect("captured once");
        let y = axpy(cx, 1.0, &a, &b)?;
        let z = scaled(cx, &a)?;
        axpy(cx, 1.0, &y, &z)
    });
    let captured = bits(&mut runner, &captured.expect("a capture"));
    assert_eq!(allocated(), before + 2);
    let fresh = iota(device, &[8], 77.0); // would take the place of a freed tensor
    let replayed = graph.replay(&mut runner, &batch(2.0)).expect("a replay");
    assert_eq!(bits(&mut runner, &replayed), captured);
    drop((fresh, graph, a));
    assert_eq!(allocated(), before);
}
