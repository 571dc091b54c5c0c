//! Each driver call of one rank fails once: every rank ends, and nothing leaks.

use std::time::Duration;

use bcg_runtime::{Device, Error, RankThreads, ReplayMode, Result};

use crate::fixture::{
    LONG, Lane, assert_as_before, bounded, capture, devices, live_objects, replay, run_eagerly, try_lanes,
};

/// How long ranks wait for one that met a fault and does not come. On a loaded machine one that met none may be late as well,
/// which is told in the same way.
const BRIEF: Duration = Duration::from_millis(100);

/// Everything that a world does, from its first call to its last.
fn scenario(devices: &[Device], timeout: Duration) -> Result<()> {
    let mut ranks: RankThreads<Lane> = try_lanes(devices, timeout)?;
    let rows = devices.len();
    ranks.run(move |lane| {
        let eager = run_eagerly(lane, 2.0, rows)?;
        let captured = capture(lane, 2.0, rows)?;
        let healed = replay(lane, ReplayMode::Healed, 2.0)?;
        let chained = replay(lane, ReplayMode::Chain, 2.0)?;
        lane.runner.release_memory()?;
        lane.runner.restore_memory()?;
        let woken = replay(lane, ReplayMode::Healed, 2.0)?;
        for (what, got) in [("capture", captured), ("healed", healed), ("chain", chained), ("woken", woken)] {
            if got != eager {
                return Err(Error::other(format!("{what} differs from eager")));
            }
        }
        Ok(())
    })?;
    Ok(())
}

#[test]
fn each_call_of_one_rank_fails_once() {
    for faulty in [1, 0] {
        let calls = {
            let devices = devices(2, 0);
            let control = devices[faulty].host_control().expect("a host device").clone();
            let mark = control.num_calls();
            scenario(&devices, LONG).expect("a run without faults");
            control.calls_since(mark)
        };
        assert!(calls.len() > 50, "{calls:?}");
        for (index, call) in calls.iter().enumerate() {
            let what = format!("call {index} of rank {faulty}, {call}");
            let devices = devices(2, index as u64);
            let before = live_objects(&devices);
            devices[faulty].host_control().expect("a host device").fail_call(index as u64 + 1);
            match bounded(|| scenario(&devices, BRIEF)) {
                // Some work is optional: a graph that cannot be merged is replayed as a chain.
                Ok(()) => eprintln!("{what}: no error"),
                Err(error) => assert!(is_injected(&error), "{what}: {error}"),
            }
            devices[faulty].host_control().expect("a host device").clear_faults(); // one that nobody met
            assert_as_before(&devices, &before, &what);
        }
    }
}

#[test]
fn a_rank_whose_device_is_lost_ends_all_ranks() {
    let num_calls = {
        let devices = devices(2, 0);
        scenario(&devices, LONG).expect("a run without faults");
        devices[1].host_control().expect("a host device").num_calls()
    };
    for call in (1..=num_calls).step_by(7) {
        let devices = devices(2, call);
        let before = live_objects(&devices);
        devices[1].host_control().expect("a host device").inject(&format!("lost:any:{call}")).expect("a fault");
        let error = bounded(|| scenario(&devices, BRIEF)).expect_err("a lost device");
        let is_named = matches!(error.root(), Error::RankLost { .. } | Error::Ranks { .. });
        assert!(error.is_context_lost() || is_named, "call {call}: {error}");
        assert_eq!(live_objects(&devices), before, "call {call}: something leaked");
        assert_as_before(&devices[..1], &before[..1], "the device that is not lost");
    }
}

/// Tells whether an error is the injected one, or says that the rank is lost that met it.
fn is_injected(error: &Error) -> bool {
    matches!(
        error.root(),
        Error::Driver { code: 999, .. } | Error::OutOfMemory { .. } | Error::RankLost { .. } | Error::Ranks { .. }
    )
}
