//! A rank that is late, fails, panics, is dropped or does something else: every rank ends in time with an error that names
//! it, and leaves nothing behind.

use std::thread::sleep;
use std::time::Duration;

use bcg_kernels::{all_reduce, send_receive};
use bcg_runtime::{
    CommunicatorOptions, Context, Device, Eager, Error, LiveBatch, RankThreads, ReplayMode, Result, Runner, Tensor,
    World, WorldOptions, eager_on_graph,
};
use bcg_tests::conformance::fixture::options;
use bcg_tests::conformance::kernels::read_beyond;

use crate::fixture::{
    LONG, Lane, SHORT, SIZES, all_equal, assert_as_before, assert_lost, bounded, capture, devices, each, input, lanes,
    live_objects, replay, run_eagerly, world,
};

/// Runs a world of which `lost` behaves as `f` says, and checks that all ranks that `f` gives an error say that it is lost.
fn lose(num_ranks: usize, what: &str, f: impl Fn(&mut Lane, usize) -> Result<()> + Send + Sync + Clone + 'static) {
    let lost = num_ranks - 1;
    let devices = devices(num_ranks, 4);
    let before = live_objects(&devices);
    let mut ranks = lanes(&devices, SHORT);
    all_equal(&mut ranks, |lane| capture(lane, 2.0, lane.runner.world_size()));
    let results = bounded(|| each(&mut ranks, move |lane| f(lane, lost)));
    for (rank, result) in results.into_iter().enumerate() {
        match result {
            Err(error) if rank == lost => eprintln!("{what}: rank {rank} itself: {error}"),
            Err(error) => assert_lost(&error, lost),
            Ok(()) => panic!("{what}: rank {rank} of {num_ranks} had no error"),
        }
    }
    assert_lost(&ranks.world().lost().expect("a lost world"), lost);
    // No rank goes on, and none waits.
    let again = bounded(|| each(&mut ranks, |lane| run_eagerly(lane, 1.0, 8)));
    again.into_iter().for_each(|result| assert_lost(&result.expect_err("a lost world"), lost));
    let again = bounded(|| each(&mut ranks, |lane| replay(lane, ReplayMode::Healed, 1.0)));
    again.into_iter().for_each(|result| assert_lost(&result.expect_err("a lost world"), lost));
    // Its devices serve another world while it is still there, and after.
    let mut second = lanes(&devices, LONG);
    all_equal(&mut second, |lane| run_eagerly(lane, 1.0, 8));
    drop((ranks, second));
    assert_as_before(&devices, &before, what);
}

/// A forward of one sum, before which a rank does what `f` does.
fn sum_after(lane: &mut Lane, f: impl FnOnce(&mut Context<'_, ()>) -> Result<()>) -> Result<Vec<f32>> {
    let x = input(lane, 2)?;
    let sum = lane.runner.eager(&(), |cx| {
        f(cx)?;
        all_reduce(cx, &x)
    })?;
    lane.runner.read::<f32>(&sum)
}

#[test]
fn a_rank_that_comes_too_late_to_a_forward_is_lost() {
    for num_ranks in SIZES {
        lose(num_ranks, "late to a forward", |lane, lost| {
            if lane.runner.rank() == lost {
                sleep(3 * SHORT);
            }
            run_eagerly(lane, 1.0, 8).map(drop)
        });
    }
}

#[test]
fn a_rank_that_comes_too_late_to_a_collective_is_lost() {
    for num_ranks in SIZES {
        lose(num_ranks, "late to a collective", |lane, lost| {
            let is_lost = lane.runner.rank() == lost;
            let result = sum_after(lane, |_| {
                if is_lost {
                    sleep(3 * SHORT);
                }
                Ok(())
            });
            if !is_lost {
                let message = result.as_ref().expect_err("a lost rank").to_string();
                assert!(message.contains("all_reduce") && message.contains("did not come within 200ms"), "{message}");
            }
            result.map(drop)
        });
    }
}

#[test]
fn a_rank_that_comes_late_to_a_replay_is_lost() {
    for mode in [ReplayMode::Healed, ReplayMode::Chain] {
        lose(2, "late to a replay", move |lane, lost| {
            if lane.runner.rank() == lost {
                sleep(3 * SHORT);
            }
            replay(lane, mode, 1.0).map(drop)
        });
    }
}

#[test]
fn a_rank_whose_forward_fails_is_lost_at_once() {
    for num_ranks in SIZES {
        lose(num_ranks, "a forward that fails", |lane, lost| {
            let is_lost = lane.runner.rank() == lost;
            sum_after(lane, |_| if is_lost { Err(Error::other("asked for")) } else { Ok(()) }).map(drop)
        });
    }
}

#[test]
fn a_rank_whose_kernel_fails_is_lost_at_once() {
    for num_ranks in SIZES {
        lose(num_ranks, "a kernel that fails", |lane, lost| {
            let (is_lost, x) = (lane.runner.rank() == lost, input(lane, 2)?);
            let read = sum_after(lane, |cx| {
                let out = cx.empty(&[1], x.dtype())?;
                if is_lost { read_beyond(cx, &x, 1 << 20, &out) } else { Ok(()) }
            });
            match &read {
                Err(error) if is_lost => assert!(matches!(error.root(), Error::Memory { .. }), "its own: {error}"),
                Err(error) => assert!(error.to_string().contains("its work was skipped after"), "{error}"),
                Ok(_) => {}
            }
            read.map(drop)
        });
    }
}

#[test]
fn a_rank_that_panics_in_its_forward_is_lost_at_once() {
    for num_ranks in SIZES {
        lose(num_ranks, "a forward that panics", |lane, lost| {
            let is_lost = lane.runner.rank() == lost;
            sum_after(lane, |_| if is_lost { panic!("asked for") } else { Ok(()) }).map(drop)
        });
    }
}

/// A live batch that makes a break fail.
struct Faulty {
    panics: bool,
    fails: bool,
}

impl LiveBatch for Faulty {}

#[eager_on_graph]
fn faulty(cx: &mut Eager<'_, Faulty>, x: &Tensor) -> Result<Tensor> {
    assert!(!cx.live().panics, "asked for");
    if cx.live().fails {
        return Err(Error::other("asked for"));
    }
    all_reduce(cx, x)
}

const SOUND: Faulty = Faulty { panics: false, fails: false };

#[test]
fn a_rank_that_panics_or_fails_in_a_break_of_a_replay_is_lost_at_once() {
    for panics in [true, false] {
        for mode in [ReplayMode::Healed, ReplayMode::Chain] {
            lose(2, "a break", move |lane, lost| {
                let x = input(lane, 2)?;
                let mut graph = bcg_runtime::BreakableCudaGraph::new("faulty");
                lane.runner.set_replay_mode(mode);
                graph.capture(&mut lane.runner, &SOUND, move |cx: &mut Context<'_, Faulty>| {
                    let y = all_reduce(cx, &x)?;
                    faulty(cx, &y)
                })?;
                let is_lost = lane.runner.rank() == lost;
                let live = Faulty { panics: panics && is_lost, fails: !panics && is_lost };
                let output = graph.replay(&mut lane.runner, &live)?;
                lane.runner.read::<f32>(&output).map(drop)
            });
        }
    }
}

#[test]
fn a_rank_that_panics_in_a_break_of_a_capture_fails_it_on_all_and_the_world_goes_on() {
    let mut ranks = lanes(&devices(2, 0), LONG);
    let results = each(&mut ranks, |lane| {
        let x = input(lane, 2)?;
        let live = Faulty { panics: lane.runner.rank() == 1, fails: false };
        let mut graph = bcg_runtime::BreakableCudaGraph::new("faulty");
        let output = graph.capture(&mut lane.runner, &live, move |cx: &mut Context<'_, Faulty>| faulty(cx, &x))?;
        lane.runner.read::<f32>(&output)
    });
    let [Err(Error::Ranks { message, .. }), Err(own)] = &results[..] else { panic!("{results:?}") };
    assert!(message.contains("asked for") && matches!(own.root(), Error::Panic { .. }), "{message}; {own}");
    all_equal(&mut ranks, |lane| capture(lane, 1.0, 4));
}

#[test]
fn a_rank_that_is_dropped_is_lost() {
    let devices = devices(3, 0);
    let before = live_objects(&devices);
    let world = world(&devices, SHORT);
    let mut runners: Vec<Runner> = world
        .communicators(CommunicatorOptions::default())
        .expect("communicators")
        .into_iter()
        .map(|communicator| Runner::in_world(communicator, options()).expect("a runner"))
        .collect();
    let dropped = runners.pop();
    let sum = |runner: &mut Runner| -> Result<()> {
        let x = runner.device().tensor(&[1, 2], &[1.0f32, 2.0])?;
        let sum = runner.eager(&(), |cx| all_reduce(cx, &x))?;
        runner.read::<f32>(&sum).map(drop)
    };
    bounded(|| {
        std::thread::scope(|scope| {
            let others: Vec<_> = runners.iter_mut().map(|runner| scope.spawn(move || sum(runner))).collect();
            drop(dropped);
            for other in others {
                assert_lost(&other.join().expect("no panic").expect_err("a rank is missing"), 2);
            }
        });
    });
    drop((runners, world));
    assert_as_before(&devices, &before, "a dropped rank");
}

/// Checks that ranks that are given different work end with an error.
fn refuse_plans(f: impl Fn(&mut Lane) -> Result<()> + Send + Sync + 'static) {
    let devices = devices(2, 0);
    let before = live_objects(&devices);
    let mut ranks = lanes(&devices, SHORT);
    all_equal(&mut ranks, |lane| capture(lane, 2.0, 2));
    let results = bounded(|| each(&mut ranks, f));
    assert!(results.iter().any(Result::is_err));
    assert!(matches!(ranks.world().lost(), Some(Error::RankLost { .. })));
    for result in results {
        if let Err(error) = result {
            assert!(matches!(error.root(), Error::RankLost { .. }), "{error}");
        }
    }
    drop(ranks);
    assert_as_before(&devices, &before, "different plans");
}

#[test]
fn a_plan_that_only_one_rank_was_given_is_an_error() {
    refuse_plans(|lane| if lane.runner.rank() == 0 { run_eagerly(lane, 1.0, 2).map(drop) } else { Ok(()) });
    refuse_plans(|lane| if lane.runner.rank() == 0 { replay(lane, ReplayMode::Healed, 1.0).map(drop) } else { Ok(()) });
    refuse_plans(|lane| if lane.runner.rank() == 0 { capture(lane, 1.0, 2).map(drop) } else { Ok(()) });
    refuse_plans(|lane| if lane.runner.rank() == 0 { lane.runner.release_memory() } else { Ok(()) });
}

#[test]
fn different_plans_are_an_error() {
    refuse_plans(|lane| match lane.runner.rank() {
        0 => run_eagerly(lane, 1.0, 2).map(drop),
        _ => replay(lane, ReplayMode::Chain, 1.0).map(drop),
    });
    refuse_plans(|lane| match lane.runner.rank() {
        0 => replay(lane, ReplayMode::Healed, 1.0).map(drop),
        _ => capture(lane, 1.0, 2).map(drop),
    });
    // Other sizes, and one collective more.
    refuse_plans(|lane| run_eagerly(lane, 1.0, 2 << (8 * lane.runner.rank())).map(drop));
    refuse_plans(|lane| {
        let (x, more) = (input(lane, 2)?, lane.runner.rank() == 1);
        let sum = lane.runner.eager(&(), |cx| {
            let sum = all_reduce(cx, &x)?;
            if more { all_reduce(cx, &sum) } else { Ok(sum) }
        })?;
        lane.runner.read::<f32>(&sum).map(drop)
    });
}

#[test]
fn a_rank_that_waits_on_the_host_is_told_at_once_that_others_lost_the_world() {
    let mut ranks = lanes(&devices(3, 0), LONG);
    let results = bounded(|| {
        each(&mut ranks, |lane| {
            let (rank, x) = (lane.runner.rank(), input(lane, 3)?);
            let sum = lane.runner.eager(&(), |cx| match rank {
                0 => all_reduce(cx, &x),
                1 => send_receive(cx, &x, 1),
                _ => Ok(x.clone()),
            })?;
            if rank == 2 {
                // Nobody comes to this forward.
                return lane.runner.eager(&(), |_| Ok(()));
            }
            lane.runner.read::<f32>(&sum).map(drop)
        })
    });
    for error in results.into_iter().map(|result| result.expect_err("a lost world")) {
        assert!(matches!(error.root(), Error::RankLost { .. }), "{error}");
        assert!(error.to_string().contains("all_reduce") && error.to_string().contains("send_receive"), "{error}");
    }
}

#[test]
fn a_panic_outside_of_forwards_ends_the_world() {
    let devices = devices(4, 0);
    let before = live_objects(&devices);
    let mut ranks: RankThreads<Lane> = lanes(&devices, LONG);
    let error = bounded(|| {
        ranks.run(|lane| {
            assert!(lane.runner.rank() != 2, "asked for");
            run_eagerly(lane, 1.0, 4)
        })
    });
    assert!(matches!(error.expect_err("a panic").root(), Error::Panic { .. }));
    assert_lost(&ranks.world().lost().expect("a lost world"), 2);
    drop(ranks);
    assert_as_before(&devices, &before, "a panic");
}

#[test]
fn a_program_that_loses_its_world_says_why() {
    let ranks = lanes(&devices(2, 0), LONG);
    let error = ranks.world().lose(1, &Error::other("the engine stops"));
    assert_lost(&error, 1);
    assert!(error.to_string().contains("the engine stops"), "{error}");
    let again = ranks.world().lose(0, &Error::other("too late")).to_string();
    assert_eq!(again, error.to_string(), "what came first counts");
}

#[test]
fn a_rank_that_does_not_end_its_part_of_a_step_is_lost() {
    let mut options = WorldOptions::default();
    options.timeout = Duration::from_millis(200);
    let world = World::new(vec![Device::host(), Device::host()], options).expect("a world");
    let mut ranks = RankThreads::start(&world, vec![0, 1]).expect("threads");
    let part = |rank: &mut u64| {
        sleep(Duration::from_millis(800 * *rank));
        Ok(())
    };
    let error = ranks.run(part).expect_err("rank 1 takes too long").to_string();
    assert!(error.starts_with("rank 1 is lost: it did not end its part of a step within 200ms"), "{error}");
    assert!(world.lost().is_some());
}
