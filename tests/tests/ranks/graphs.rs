//! Captures and replays of all ranks together: equal to eager runs, in any order, under any schedule.

use std::time::Duration;

use bcg_kernels::all_reduce;
use bcg_runtime::{Context, Eager, Error, RankThreads, ReplayMode, Result, Tensor, eager_on_graph};
use bcg_tests::conformance::fixture::{Batch, Graph};
use bcg_tests::conformance::kernels::axpy;

use crate::fixture::{
    LONG, Lane, SIZES, all_equal, assert_as_before, capture, devices, each, forward, input, lanes, live_objects, read,
    replay, run_eagerly,
};

const MODES: [ReplayMode; 2] = [ReplayMode::Healed, ReplayMode::Chain];

#[test]
fn captures_and_replays_equal_eager_runs_and_mix_with_them() {
    for num_ranks in SIZES {
        let rows = 8;
        let mut ranks = lanes(&devices(num_ranks, 1), LONG);
        let eager = |ranks: &mut RankThreads<Lane>, scale| all_equal(ranks, move |lane| run_eagerly(lane, scale, rows));
        let expected = eager(&mut ranks, 2.0);
        assert_eq!(all_equal(&mut ranks, move |lane| capture(lane, 2.0, rows)), expected);
        for (turn, scale) in [5.0, -3.0, 2.0, 0.5, 5.0, 2.0].into_iter().enumerate() {
            let mode = MODES[turn % 2];
            let replayed = all_equal(&mut ranks, move |lane| replay(lane, mode, scale));
            assert_eq!(replayed, eager(&mut ranks, scale), "{num_ranks} ranks, {mode:?}, scale {scale}");
        }
    }
}

#[test]
fn replays_that_nobody_waits_for_keep_their_order() {
    for mode in MODES {
        let mut ranks = lanes(&devices(2, 5), LONG);
        let expected = all_equal(&mut ranks, |lane| run_eagerly(lane, 7.0, 4));
        all_equal(&mut ranks, |lane| capture(lane, 1.0, 4));
        let last = all_equal(&mut ranks, move |lane| {
            lane.runner.set_replay_mode(mode);
            for turn in 0..20 {
                lane.graph.replay(&mut lane.runner, &Batch { scale: turn as f32, rows: None })?;
            }
            replay(lane, mode, 7.0)
        });
        assert_eq!(last, expected);
    }
}

#[test]
fn sizes_alternate() {
    let mut ranks = lanes(&devices(2, 2), LONG);
    let sizes = [2, 16, 4];
    let run = move |lane: &mut Lane| {
        let mut graphs = Vec::new();
        for rows in sizes {
            let mut graph = Graph::new(format!("{rows} rows"));
            let forward = forward(input(lane, rows)?);
            graph.capture(&mut lane.runner, &Batch { scale: 1.0, rows: None }, forward)?;
            graphs.push((rows, graph));
        }
        let mut all = Vec::new();
        for turn in 0..12 {
            lane.runner.set_replay_mode(MODES[turn / 2 % 2]);
            let (rows, graph) = &mut graphs[turn * 5 % sizes.len()];
            let batch = Batch { scale: turn as f32 - 3.0, rows: None };
            let output = graph.replay(&mut lane.runner, &batch)?;
            let replayed = read(lane, &output)?;
            assert_eq!(replayed, run_eagerly(lane, batch.scale, *rows)?, "turn {turn}");
            all.push(replayed);
        }
        Ok(all)
    };
    all_equal(&mut ranks, run);
}

#[test]
fn a_capture_ahead_replays_and_verifies() {
    for num_ranks in SIZES {
        let mut ranks = lanes(&devices(num_ranks, 9), LONG);
        let expected = all_equal(&mut ranks, |lane| run_eagerly(lane, 3.0, 8));
        let verified = all_equal(&mut ranks, |lane| {
            let forward = forward(input(lane, 8)?);
            lane.graph.capture_ahead(&mut lane.runner, &Batch { scale: 1.0, rows: None }, forward)?;
            let mut outputs = Vec::new();
            for mode in MODES {
                lane.runner.set_replay_mode(mode);
                let output = lane.graph.replay_verified(&mut lane.runner, &Batch { scale: 3.0, rows: None })?;
                outputs.push(read(lane, &output)?);
            }
            Ok(outputs)
        });
        assert_eq!(verified, [expected.clone(), expected]);
    }
}

#[test]
fn a_replay_that_differs_on_one_rank_is_told_to_all() {
    let devices = devices(2, 0);
    let mut ranks = lanes(&devices, LONG);
    all_equal(&mut ranks, |lane| capture(lane, 1.0, 4));
    // The last kernel of the replay gives something else on one rank.
    devices[1].host_control().expect("a host device").inject("flip:axpy:6:22").expect("a fault");
    let results =
        each(&mut ranks, |lane| lane.graph.replay_verified(&mut lane.runner, &Batch { scale: 1.0, rows: None }));
    let errors: Vec<Error> = results.into_iter().filter_map(Result::err).collect();
    assert!(matches!(errors[..], [Error::Ranks { .. }, Error::Mismatch { .. }]), "{errors:?}");
    let expected = all_equal(&mut ranks, |lane| run_eagerly(lane, 2.0, 4));
    assert_eq!(all_equal(&mut ranks, |lane| replay(lane, ReplayMode::Healed, 2.0)), expected, "the world goes on");
}

#[test]
fn ranks_sleep_and_wake_with_their_graphs() {
    let mut ranks = lanes(&devices(4, 3), LONG);
    let before = all_equal(&mut ranks, |lane| capture(lane, 2.0, 8));
    for mode in MODES {
        all_equal(&mut ranks, |lane| lane.runner.release_memory());
        let asleep = each(&mut ranks, move |lane| replay(lane, mode, 2.0));
        assert!(asleep.iter().all(Result::is_err), "no forward begins while memory is released");
        all_equal(&mut ranks, |lane| lane.runner.restore_memory());
        assert_eq!(all_equal(&mut ranks, move |lane| replay(lane, mode, 2.0)), before);
        assert_eq!(all_equal(&mut ranks, |lane| run_eagerly(lane, 2.0, 8)), before);
    }
}

#[test]
fn a_capture_that_fails_on_one_rank_fails_on_all_and_the_world_goes_on() {
    for call in ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuLaunchKernel"] {
        let devices = devices(2, 0);
        let before = live_objects(&devices);
        let mut ranks = lanes(&devices, LONG);
        let expected = all_equal(&mut ranks, |lane| run_eagerly(lane, 2.0, 4));
        devices[1].host_control().expect("a host device").fail_calls_named(call, 1);
        let results = each(&mut ranks, |lane| capture(lane, 1.0, 4));
        let errors: Vec<Error> = results.into_iter().filter_map(Result::err).collect();
        let [Error::Ranks { what: "a capture", message }, own] = &errors[..] else { panic!("{call}: {errors:?}") };
        assert!(message.starts_with("rank 1:") && message.contains(call), "{call}: {message}");
        assert!(matches!(own.root(), Error::Driver { call: failed, code: 999, .. } if *failed == call), "{own}");
        assert!(ranks.world().lost().is_none());
        assert_eq!(all_equal(&mut ranks, |lane| capture(lane, 2.0, 4)), expected);
        assert_eq!(all_equal(&mut ranks, |lane| run_eagerly(lane, 2.0, 4)), expected);
        drop(ranks);
        assert_as_before(&devices, &before, call);
    }
}

#[test]
fn ranks_that_capture_different_work_are_refused() {
    let mut ranks = lanes(&devices(2, 0), LONG);
    let results = each(&mut ranks, |lane| capture(lane, 1.0, 2 + 62 * lane.runner.rank()));
    for result in results {
        assert!(matches!(result, Err(Error::Ranks { what: "a capture", .. })), "{result:?}");
    }
    all_equal(&mut ranks, |lane| capture(lane, 1.0, 4));
}

#[test]
fn every_schedule_gives_the_same_bits() {
    let rows = 4;
    let mut expected = None;
    for seed in 0..100 {
        let devices = devices(2, seed);
        for (rank, device) in devices.iter().enumerate() {
            let control = device.host_control().expect("a host device");
            let late = (seed >> (2 * rank)) % 4;
            control.set_delay("runner", late & 1 == 1);
            control.set_delay("side", late & 2 == 2);
        }
        let mut ranks = lanes(&devices, LONG);
        let mode = MODES[(seed % 2) as usize];
        let got = all_equal(&mut ranks, move |lane| {
            let captured = capture(lane, 2.0, rows)?;
            let replays = [replay(lane, mode, 2.0)?, replay(lane, mode, -1.5)?];
            let eager = run_eagerly(lane, -1.5, rows)?;
            assert_eq!((&captured, &eager), (&replays[0], &replays[1]));
            Ok(replays)
        });
        assert_eq!(got, *expected.get_or_insert_with(|| got.clone()), "seed {seed}");
    }
}

/// A body that needs the results of the work before it, which all ranks come to together.
#[eager_on_graph(rank_coupled, stub = doubled)]
fn scaled_by_first(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    let first = cx.read::<f32>(x)?[0];
    axpy(cx, first, x, x)
}

fn doubled(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    axpy(cx, 1.0, x, x)
}

/// The same without a stub.
#[eager_on_graph]
fn scaled_by_first_without_stub(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    let first = cx.read::<f32>(x)?[0];
    axpy(cx, first, x, x)
}

#[test]
fn all_ranks_come_to_a_rank_coupled_break_and_replay_its_body() {
    let mut ranks = lanes(&devices(2, 9), Duration::from_secs(3));
    let forward = |x: Tensor| {
        move |cx: &mut Context<'_, Batch>| {
            let sum = all_reduce(cx, &x)?;
            let scaled = scaled_by_first(cx, &sum)?;
            all_reduce(cx, &scaled)
        }
    };
    let batch = || Batch { scale: 1.0, rows: None };
    let eager = all_equal(&mut ranks, move |lane| {
        let x = input(lane, 4)?;
        let output = lane.runner.eager(&batch(), forward(x))?;
        read(lane, &output)
    });
    for mode in MODES {
        let replayed = all_equal(&mut ranks, move |lane| {
            lane.runner.set_replay_mode(mode);
            let x = input(lane, 4)?;
            lane.graph.capture_ahead(&mut lane.runner, &batch(), forward(x))?;
            let output = lane.graph.replay(&mut lane.runner, &batch())?;
            read(lane, &output)
        });
        assert_eq!(replayed, eager, "{mode:?}");
    }
    // Outside of a forward of all ranks the one that comes alone is not let in.
    let alone = each(&mut ranks, move |lane| match lane.runner.rank() {
        0 => Ok(()),
        _ => {
            let x = input(lane, 4)?;
            lane.runner.tail(&batch(), |cx| scaled_by_first(cx, &x).map(|_| ()))
        }
    });
    assert!(alone.iter().any(Result::is_err), "{alone:?}");
}

#[test]
fn a_break_that_reads_back_needs_a_stub_and_the_world_goes_on() {
    let mut ranks = lanes(&devices(2, 9), LONG);
    let refused = each(&mut ranks, |lane| {
        let x = input(lane, 4)?;
        let forward = move |cx: &mut Context<'_, Batch>| scaled_by_first_without_stub(cx, &x);
        lane.graph.capture(&mut lane.runner, &Batch { scale: 1.0, rows: None }, forward).map(|_| ())
    });
    for error in refused.into_iter().map(|refused| refused.expect_err("nothing runs in a capture of ranks")) {
        assert!(error.to_string().contains("give the break a stub"), "{error}");
    }
    let expected = all_equal(&mut ranks, |lane| run_eagerly(lane, 2.0, 4));
    assert_eq!(all_equal(&mut ranks, |lane| capture(lane, 2.0, 4)), expected);
}
