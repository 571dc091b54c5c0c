//! Faults of the driver and lacks of memory, one at a time, over whole runs on the host device (law L5).
//!
//! A scenario is run once to count its driver calls; then once for each call, with that call failing. Every time the
//! error that comes back is the injected one, the runner then works (an eager run, a capture and a replay give right
//! values), and dropping everything returns every object of the device.
//!
//! Then the faults that do not pass: a call that hangs, one that is slow, a device that is lost, a bit that is wrong.

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bcg_runtime::{
    BreakableCudaGraph, Context, DType, Device, Eager, Error, HostControl, LiveObjects, PinnedBuffer, ReplayMode,
    ReplayPath, Result, Runner, RunnerOptions, Tensor, eager_on_graph,
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
    let mut pinned = PinnedBuffer::new(device, SIZE * 16).expect("pinned memory");
    pinned.write(&[0.5f32; SIZE * 4]).expect("a write");
    let pinned = Arc::new(pinned);
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

fn control(device: &Device) -> &HostControl {
    device.host_control().expect("a host device")
}

/// Waits until a call of `device` hangs.
fn wait_for_a_hang(device: &Device) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while control(device).num_hanging() == 0 {
        assert!(Instant::now() < deadline, "no call hangs");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_call_hangs_until_it_is_released_and_others_go_on() {
    let device = Device::host();
    let x = iota(&device, &[SIZE], 1.0);
    let mut runner = Runner::new(&device, RunnerOptions::default()).expect("a runner");
    control(&device).inject("hang:cuMemcpyDtoHAsync:2").expect("a fault");
    std::thread::scope(|scope| {
        let reads = scope.spawn(|| [(); 3].map(|()| device.read::<f32>(&x).expect("a read")[0]));
        wait_for_a_hang(&device);
        assert_usable_without_reading(&mut runner);
        std::thread::sleep(Duration::from_millis(20));
        assert!(!reads.is_finished());
        control(&device).clear_faults();
        assert_eq!(reads.join().expect("no panic"), [1.0; 3], "the call goes on where it hung");
    });
    assert_eq!(control(&device).num_hanging(), 0);
}

/// Uses a device of which one thread reads, without a read.
fn assert_usable_without_reading(runner: &mut Runner) {
    let output = runner.eager(&(), |cx| cx.empty(&[SIZE], DType::F32).and_then(|out| cx.fill_zero(&out)));
    output.expect("other calls do not wait for one that hangs");
    runner.device().synchronize().expect("nor do waits");
}

#[test]
fn a_hang_that_nobody_releases_ends_by_itself() {
    let device = Device::host();
    control(&device).inject("hang:any:1:60").expect("a fault");
    let began = Instant::now();
    device.synchronize().expect("the call goes on");
    assert!(began.elapsed() >= Duration::from_millis(60), "{:?}", began.elapsed());
    let began = Instant::now();
    device.synchronize().expect("a call");
    assert!(began.elapsed() < Duration::from_secs(60), "one call hangs, not every one");
}

#[test]
fn slow_calls_take_longer_until_the_faults_are_cleared() {
    let device = Device::host();
    control(&device).inject("slow:cuCtxSynchronize:2:30").expect("a fault");
    let took = || {
        let began = Instant::now();
        device.synchronize().expect("a slow call works");
        began.elapsed()
    };
    let slow = [took(), took(), took()];
    assert!(slow[1] >= Duration::from_millis(30) && slow[2] >= Duration::from_millis(30), "{slow:?}");
    control(&device).clear_faults();
    let quickest = (0..20).map(|_| took()).min().expect("a time");
    assert!(quickest < Duration::from_millis(30), "{quickest:?}");
}

#[test]
fn every_call_fails_once_the_device_is_lost_and_dropping_everything_leaves_nothing() {
    let live = padded(3.0, 4, SIZE);
    let rig = Rig::new();
    let mut state = make_state(&rig);
    let forward = state.forward.clone();
    drop(state.graph.capture(&mut state.runner, &live, forward).expect("a capture"));
    control(&rig.device).inject("lost:cuGraphLaunch:2").expect("a fault");
    let error = failure(state.graph.replay(&mut state.runner, &live));
    assert!(matches!(error.root(), Error::Driver { call: "cuGraphLaunch", code: 719, .. }), "{error}");
    control(&rig.device).clear_faults();
    for error in [
        failure(state.graph.replay(&mut state.runner, &live)),
        failure(state.runner.eager(&live, &state.forward)),
        failure(rig.device.empty(&[1], DType::F32)),
        failure(rig.device.synchronize()),
    ] {
        assert!(error.is_context_lost(), "no call works again: {error}");
    }
    drop(state);
    assert_eq!(rig.device.live_objects(), rig.baseline, "what is dropped is given back to the emulated driver");
    assert_usable(&mut Rig::new().runner());
}

/// Replays layers that are verified, with the faults asked for; returns what the verification says.
fn verify_with(faults: &str, mode: ReplayMode) -> String {
    let live = padded(3.0, 4, SIZE);
    let rig = Rig::new();
    let mut runner = rig.runner();
    runner.set_replay_mode(mode);
    let mut graph = Graph::new("verified");
    drop(graph.capture(&mut runner, &live, layers(&rig)).expect("a capture"));
    runner.device().synchronize().expect("the capture has run");
    control(&rig.device).inject(faults).expect("faults");
    let error = failure(graph.replay_verified(&mut runner, &live));
    assert!(matches!(error, Error::Mismatch { .. }), "{error}");
    drop(graph.replay_verified(&mut runner, &live).expect("the fault has happened, and the next replay is right"));
    error.to_string()
}

#[test]
fn a_flipped_bit_is_silent_and_a_verified_replay_names_its_segment() {
    let named = |error: &str| {
        let start = "graph `verified`: replay differs from eager first in segment 1, before break `scaled` (";
        assert!(error.starts_with(start) && error.ends_with("tensor 0: 1 of 96 bytes differ"), "{error}");
    };
    // `add_index` runs once in each of the three segments.
    named(&verify_with("flip:add_index:2:70", ReplayMode::Chain));
    // After a healed replay whose output differs, a chain of its steps tells where: there the fault happens again.
    named(&verify_with("flip:add_index:2:70,flip:add_index:8:70", ReplayMode::Healed));
    let once = verify_with("flip:add_index:2:70", ReplayMode::Healed);
    assert!(once.contains("first in the output of a healed replay: a chain of the same steps gives what"), "{once}");

    let device = Device::host();
    let mut runner = Runner::new(&device, RunnerOptions::default()).expect("a runner");
    let (x, y) = (iota(&device, &[2], 1.0), iota(&device, &[2], 5.0));
    control(&device).inject("flip:copy:2:31").expect("a fault");
    for expected in [[1.0, 2.0], [-1.0, 2.0], [1.0, 2.0]] {
        runner.eager(&(), |cx| cx.copy(&y, &x)).expect("a copy");
        assert_eq!(device.read::<f32>(&y).expect("a read"), expected, "bit 31 of the first value is its sign");
    }
}

#[test]
fn a_fault_that_cannot_be_read_is_refused_with_the_remedy() {
    let device = Device::host();
    for faults in [
        "hang",
        "hang:cuMemAlloc",
        "hang:cuMemAlloc:0",
        "hang:cuMemAlloc:x",
        "hang::1",
        "hang:cuMemAlloc:1:2:3",
        "slow:cuMemAlloc:1",
        "lost:cuMemAlloc:1:2",
        "lost:cuMemAlloc:1:-1",
        "fail:cuMemAlloc:1:9",
        "burn:cuMemAlloc:1",
        "fail:cuMemAlloc:1,hang",
    ] {
        let error = failure(control(&device).inject(faults)).to_string();
        let start = "BCG_HOST_FAULT: cannot read the fault `";
        assert!(
            error.starts_with(start) && error.contains("write `fail:CALL:N`, `panic:CALL:N`, `hang:CALL:N[:MILLI"),
            "{error}"
        );
        drop(device.empty(&[1], DType::F32).expect("a refused text asks for no fault"));
    }
    control(&device).inject("").expect("no fault");
    control(&device).inject(" fail:cuMemAlloc:2 ,, fail:cuMemAlloc:3 ").expect("two faults");
    let made = [(); 4].map(|()| device.empty(&[1], DType::F32).is_ok());
    assert_eq!(made, [true, false, false, true]);
}

/// Run as a process of its own by the test below: opens a host device and reports how its first wait went.
#[test]
#[ignore = "a process that another test starts"]
fn child_that_opens_a_device_from_its_environment() {
    match Device::host_from_env().and_then(|device| device.synchronize()) {
        Ok(()) => println!("the wait went well"),
        Err(error) => println!("{error}"),
    }
}

#[test]
fn a_process_takes_its_faults_from_its_environment_and_from_a_file_once() {
    let run = |faults: &std::ffi::OsStr| {
        let mut child = Command::new(std::env::current_exe().expect("this program"));
        child.args(["--exact", "child_that_opens_a_device_from_its_environment", "--ignored", "--nocapture"]);
        let output = child.env("BCG_HOST_FAULT", faults).output().expect("a process");
        String::from_utf8(output.stdout).expect("a report")
    };
    let lost = "cuCtxSynchronize failed: CUDA_ERROR_LAUNCH_FAILED (code 719)";
    assert!(run("lost:cuCtxSynchronize:1".as_ref()).contains(lost));
    assert!(run("hang:cuCtxSynchronize".as_ref()).contains("BCG_HOST_FAULT: cannot read the fault `hang:cuCtxSynch"));
    let path = std::env::temp_dir().join(format!("bcg-faults-{}", std::process::id()));
    std::fs::write(&path, "lost:cuCtxSynchronize:1\n").expect("a file");
    let from_file = format!("@{}", path.display());
    assert!(run(from_file.as_ref()).contains(lost));
    assert!(!path.exists(), "the file is taken");
    assert!(run(from_file.as_ref()).contains("the wait went well"), "a process that is started again has no fault");
}
