//! Faults of the driver and lacks of memory, one at a time, over whole runs on the host device (law L5).
//!
//! A scenario is run once to count its driver calls; then once for each call, with that call failing. Every time the
//! error that comes back is the injected one, the runner then works (an eager run, a capture and a replay give right
//! values), and dropping everything returns every object of the device.

use std::sync::Arc;

use bcg_runtime::{
    BreakableCudaGraph, Context, DType, Device, Eager, Error, LiveObjects, PinnedBuffer, ReplayMode, ReplayPath,
    Result, Runner, RunnerOptions, Tensor, eager_on_graph,
};
use bcg_tests::conformance::fixture::{Batch, Graph, assert_usable, batch, failure, iota, padded, scaled, step};
use bcg_tests::conformance::kernels::{axpy, count};

const SIZE: usize = 6;

#[eager_on_graph]
fn busy(cx: &mut Eager<'_, Batch>, x: &Tensor, cell: &Tensor) -> Result<(Tensor, Tensor)> {
    let scale = cx.live().scale;
    let first = cx.read::<f32>(x)?[0];
    let host = cx.empty(x.shape(), DType::F32)?;
    cx.upload(&host, &vec![first; x.num_elements()])?;
    count(cx, cell)?;
    let y = cx.scope(|cx| {
        let side = cx.side_stream("busy side")?;
        cx.on(&side, |cx| axpy(cx, scale, x, &host))
    })?;
    let scratch = cx.empty(&[1 << 10], DType::U8)?;
    cx.fill_zero(&scratch)?;
    let z = scaled(cx, &y)?;
    Ok((y, z))
}

/// A forward that makes every kind of driver call that a forward can make.
fn forward(device: &Device) -> impl Fn(&mut Context<'_, Batch>) -> Result<Tensor> + Clone + Send + Sync + use<> {
    let x = iota(device, &[SIZE, 4], 1.0);
    let weight = iota(device, &[4, 4], -1.0);
    let cell = device.zeros(&[1], DType::I32).expect("a cell");
    let pinned = Arc::new(PinnedBuffer::new(device, SIZE * 16).expect("pinned memory"));
    pinned.write(&[0.5f32; SIZE * 4]).expect("a write");
    move |cx| {
        let staged = cx.empty(&[SIZE, 4], DType::F32)?;
        cx.copy_from_pinned(&staged, &pinned)?;
        let y = axpy(cx, 2.0, &x, &staged)?;
        let z = cx.scope(|cx| {
            let side = cx.side_stream("segment side")?;
            cx.on(&side, |cx| axpy(cx, 1.0, &y, &x))
        })?;
        let product = cx.empty(&[SIZE, 4], DType::F32)?;
        cx.matmul(&product, &z, &weight)?;
        let (y, w) = busy(cx, &product, &cell)?;
        cx.break_graph()?;
        let out = cx.empty(&[SIZE, 8], DType::F32)?;
        cx.fill_zero(&out)?;
        cx.copy(&out.columns(0..4)?, &y)?;
        cx.copy(&out.columns(4..8)?, &w)?;
        let out = step(cx, &out)?;
        scaled(cx, &out)
    }
}

/// What a scenario works on, made anew for each fault.
struct Rig {
    device: Device,
    baseline: LiveObjects,
}

impl Rig {
    fn new() -> Self {
        let device = Device::host();
        let baseline = device.live_objects();
        Self { device, baseline }
    }

    fn runner(&self) -> Runner {
        let mut options = RunnerOptions::default();
        options.arena_bytes = 1 << 20;
        options.poison = true;
        Runner::new(&self.device, options).expect("a runner")
    }

    fn num_calls(&self) -> u64 {
        self.device.host_control().expect("a host device").num_calls()
    }

    fn fail_call(&self, n: u64) {
        self.device.host_control().expect("a host device").fail_call(n);
    }

    /// Checks that nothing is left, once everything of the scenario was dropped.
    fn check_baseline(&self, what: &str) {
        assert_eq!(self.device.live_objects(), self.baseline, "{what}: something leaked");
        self.device.synchronize().expect("a device without pending failures");
    }
}

/// Tells whether an error is the injected one: a failed call, or a lack of memory where the call allocates.
fn is_injected(error: &Error, call: &str) -> bool {
    match error.root() {
        Error::Driver { call: failed, code: 999, .. } => *failed == call,
        Error::OutOfMemory { .. } => {
            ["cuMemAlloc", "cuMemMap", "cuMemAddressReserve", "cuMemHostAlloc"].contains(&call)
        }
        _ => false,
    }
}

/// Runs `scenario` with each of its driver calls failing once. `prepare` makes its state, in which nothing fails.
fn fail_each_call<S>(
    name: &str,
    prepare: impl Fn(&Rig) -> S,
    scenario: impl Fn(&mut S) -> Result<()>,
    runner: impl Fn(&mut S) -> &mut Runner,
) {
    let rig = Rig::new();
    let mut state = prepare(&rig);
    let mark = rig.num_calls();
    scenario(&mut state).expect("a run without faults");
    let calls = rig.device.host_control().expect("a host device").calls_since(mark);
    assert!(!calls.is_empty());
    for (index, call) in calls.iter().enumerate() {
        let rig = Rig::new();
        let mut state = prepare(&rig);
        rig.fail_call(index as u64 + 1);
        let error = failure(scenario(&mut state));
        let what = format!("{name}: call {index} of {}, {call}: {error}", calls.len());
        assert!(is_injected(&error, call), "{what}: this is not the injected error");
        eprintln!("{what}");
        assert_usable(runner(&mut state));
        scenario(&mut state).unwrap_or_else(|error| panic!("{what}: the next run failed: {error}"));
        drop(state);
        rig.check_baseline(&what);
    }
}

/// A runner and a graph on it.
struct State<F> {
    runner: Runner,
    graph: Graph,
    forward: F,
}

fn make_state(rig: &Rig) -> State<impl Fn(&mut Context<'_, Batch>) -> Result<Tensor> + Clone + Send + Sync + use<>> {
    let forward = forward(&rig.device);
    State { runner: rig.runner(), graph: BreakableCudaGraph::new("faults"), forward }
}

/// What the forward gives, and how often its break has run, decide that a run was right.
fn check(runner: &mut Runner, output: &Tensor, expected: &[f32]) -> Result<()> {
    assert_eq!(runner.read::<f32>(output)?, expected);
    Ok(())
}

fn expected(live: &Batch) -> Vec<f32> {
    let rig = Rig::new();
    let mut runner = rig.runner();
    let output = runner.eager(live, forward(&rig.device)).expect("an eager run");
    runner.read::<f32>(&output).expect("a read")
}

#[test]
fn each_call_of_an_eager_run_fails_once() {
    let live = padded(3.0, 4, SIZE);
    let expected = expected(&live);
    fail_each_call(
        "eager",
        make_state,
        |state| {
            let output = state.runner.eager(&live, &state.forward)?;
            check(&mut state.runner, &output, &expected)
        },
        |state| &mut state.runner,
    );
}

#[test]
fn each_call_of_a_capture_fails_once() {
    let live = padded(3.0, 4, SIZE);
    let expected = expected(&live);
    fail_each_call(
        "capture",
        make_state,
        |state| {
            let captured = state.graph.capture(&mut state.runner, &live, state.forward.clone());
            assert_eq!(captured.is_ok(), state.graph.is_captured());
            if captured.is_err() {
                let refused = failure(state.graph.replay(&mut state.runner, &live));
                assert!(matches!(refused, Error::NotCaptured { .. }), "{refused}");
            }
            let output = captured?;
            check(&mut state.runner, &output, &expected)
        },
        |state| &mut state.runner,
    );
}

#[test]
fn each_call_of_a_replay_fails_once_and_the_graph_stays() {
    let live = padded(3.0, 4, SIZE);
    let expected = expected(&live);
    fail_each_call(
        "replay",
        |rig| {
            let mut state = make_state(rig);
            let forward = state.forward.clone();
            state.graph.capture(&mut state.runner, &padded(1.0, SIZE, SIZE), forward).expect("a capture");
            state
        },
        |state| {
            let output = state.graph.replay(&mut state.runner, &live)?;
            check(&mut state.runner, &output, &expected)
        },
        |state| &mut state.runner,
    );
}

/// A forward of equal layers, whose breaks heal.
fn layers(rig: &Rig) -> impl Fn(&mut Context<'_, Batch>) -> Result<Tensor> + Clone + Send + Sync + use<> {
    let x = iota(&rig.device, &[SIZE, 4], 1.0);
    move |cx| {
        (0..3).try_fold(x.clone(), |x, _| {
            let y = step(cx, &x)?;
            scaled(cx, &y)
        })
    }
}

fn expected_of_layers(live: &Batch) -> Vec<f32> {
    let rig = Rig::new();
    let mut runner = rig.runner();
    let output = runner.eager(live, layers(&rig)).expect("an eager run");
    runner.read::<f32>(&output).expect("a read")
}

#[test]
fn each_call_of_healed_replays_and_of_the_capture_before_fails_once() {
    let lives = [padded(3.0, 4, SIZE), padded(-2.0, 4, SIZE), padded(5.0, SIZE, SIZE)];
    let expected = lives.each_ref().map(expected_of_layers);
    fail_each_call(
        "healed",
        |rig| State { runner: rig.runner(), graph: BreakableCudaGraph::new("healed"), forward: layers(rig) },
        |state| {
            drop(state.graph.capture(&mut state.runner, &lives[0], state.forward.clone())?);
            for (live, expected) in lives.iter().zip(&expected).chain(lives.iter().zip(&expected)) {
                let output = state.graph.replay(&mut state.runner, live)?;
                check(&mut state.runner, &output, expected)?;
            }
            assert_eq!(state.graph.last_replay(), Some(ReplayPath::Healed));
            Ok(())
        },
        |state| &mut state.runner,
    );
}

#[test]
fn each_call_of_a_capture_with_shared_executables_and_of_its_replay_fails_once() {
    let live = padded(3.0, 4, SIZE);
    let expected = expected_of_layers(&live);
    let updates = std::cell::Cell::new(0);
    fail_each_call(
        "shared",
        |rig| {
            let forward = layers(rig);
            let mut runner = rig.runner();
            runner.set_replay_mode(ReplayMode::Chain);
            runner.eager(&live, &forward).expect("the arena gets its size");
            (State { runner, graph: BreakableCudaGraph::new("shared"), forward }, rig.device.clone())
        },
        |(state, device)| {
            let control = device.host_control().expect("a host device");
            let mark = control.num_calls();
            state.graph.capture_ahead(&mut state.runner, &live, state.forward.clone())?;
            let output = state.graph.replay(&mut state.runner, &live)?;
            let calls = control.calls_since(mark);
            updates.set(updates.get() + calls.iter().filter(|call| **call == "cuGraphExecUpdate").count());
            check(&mut state.runner, &output, &expected)
        },
        |(state, _)| &mut state.runner,
    );
    assert!(updates.get() > 0, "equal segments share an executable");
}

#[test]
fn each_call_of_a_release_and_restoration_fails_once() {
    let live = padded(3.0, 4, SIZE);
    let expected = expected(&live);
    fail_each_call(
        "sleep",
        |rig| {
            let mut state = make_state(rig);
            let forward = state.forward.clone();
            state.graph.capture(&mut state.runner, &live, forward).expect("a capture");
            state
        },
        |state| {
            let slept = state.runner.release_memory().and_then(|()| state.runner.restore_memory());
            if slept.is_err() {
                state.runner.restore_memory().expect("the second attempt");
            }
            slept?;
            let output = state.graph.replay(&mut state.runner, &live)?;
            check(&mut state.runner, &output, &expected)
        },
        |state| &mut state.runner,
    );
}

#[test]
fn each_call_of_making_a_runner_fails_once_and_leaves_nothing() {
    let rig = Rig::new();
    let mark = rig.num_calls();
    drop(rig.runner());
    let calls = rig.device.host_control().expect("a host device").calls_since(mark);
    for (index, call) in calls.iter().enumerate() {
        rig.fail_call(index as u64 + 1);
        match Runner::new(&rig.device, {
            let mut options = RunnerOptions::default();
            options.arena_bytes = 1 << 20;
            options
        }) {
            Ok(_) => {
                assert_eq!(*call, "cuCtxSynchronize", "only the wait before a runner is dropped has no caller to tell");
            }
            Err(error) => assert!(is_injected(&error, call), "{error}"),
        }
        rig.check_baseline(call);
    }
    assert_usable(&mut rig.runner());
}

#[test]
fn each_allocation_that_finds_no_memory_leaves_the_runner_usable() {
    let rig = Rig::new();
    let make = |bytes: usize| {
        Runner::new(&rig.device, {
            let mut options = RunnerOptions::default();
            options.arena_bytes = bytes;
            options
        })
    };
    for call in ["cuMemAlloc", "cuMemAddressReserve", "cuMemMap"] {
        rig.device.host_control().expect("a host device").fail_calls_named(call, 1);
        let error = failure(make(1 << 20));
        assert!(matches!(error, Error::OutOfMemory { .. }), "{call}: {error}");
        rig.check_baseline(call);
    }
    let mut runner = make(0).expect("a runner without memory");
    let bytes = 1 << 20;
    let grow = |runner: &mut Runner| runner.eager(&(), |cx| cx.empty(&[bytes], DType::U8)).map(drop);
    rig.device.host_control().expect("a host device").fail_calls_named("cuMemMap", 1);
    let before = rig.device.live_objects();
    let error = failure(grow(&mut runner)).to_string();
    assert!(error.starts_with("host:0: out of memory: ") && error.contains(" bytes requested, "), "{error}");
    assert!(error.ends_with(" free; lower the model's memory use (KV cache tokens, largest capture size)"), "{error}");
    assert_eq!((rig.device.live_objects(), runner.arena_stats().mapped_bytes), (before, 0));
    grow(&mut runner).expect("the arena grows at the next attempt");
    assert_usable(&mut runner);
    drop(runner);
    rig.check_baseline("the arena's growth");
}

#[test]
fn a_device_that_is_really_full_says_so_and_recovers() {
    let mut options = bcg_runtime::HostOptions::default();
    options.memory_bytes = 64 << 20;
    let device = Device::host_with(options);
    let mut runner = Runner::new(&device, {
        let mut options = RunnerOptions::default();
        options.arena_bytes = 1 << 20;
        options
    })
    .expect("a runner");
    let hog = device.empty(&[40 << 20], DType::U8).expect("most of the memory");
    let forward = |cx: &mut Context<'_, ()>| cx.empty(&[30 << 20], DType::U8).map(drop);
    let error = failure(runner.eager(&(), forward));
    assert!(matches!(error, Error::OutOfMemory { .. } | Error::ArenaFull { .. }), "{error}");
    assert_usable(&mut runner);
    drop(hog);
    runner.eager(&(), forward).expect("there is memory again");
    assert_usable(&mut runner);
}

#[test]
fn two_faults_in_one_run_report_the_first() {
    let live = batch(2.0);
    let rig = Rig::new();
    let mut state = make_state(&rig);
    let control = rig.device.host_control().expect("a host device").clone();
    let mark = control.num_calls();
    let forward = state.forward.clone();
    state.graph.capture(&mut state.runner, &live, forward).expect("a capture");
    let calls = control.calls_since(mark);
    for (index, call) in calls.iter().enumerate() {
        let rig = Rig::new();
        let mut state = make_state(&rig);
        let control = rig.device.host_control().expect("a host device");
        (1..=3).for_each(|also| control.fail_call(index as u64 + also));
        let error = failure(state.graph.capture(&mut state.runner, &live, state.forward.clone()));
        assert!(is_injected(&error, call), "call {index}, {call}: {error}");
        control.clear_faults();
        assert_usable(&mut state.runner);
    }
}
