//! Verification: a replay and an eager run of the same forward, compared bit for bit.
//!
//! Both runs copy the tensors that enter each break, and the outputs, to the host. The first that differs names the
//! segment that computed it.

use super::tape::Tape;
use super::{ReplayPath, chain, heal};
use crate::capture::bridge::output_tensors;
use crate::capture::context::Forward;
use crate::stream::probe::Probe;
use crate::{Error, Freeze, LiveBatch, Result, Runner};

/// Replays, runs eagerly, compares; returns the output of the eager run, and how the replay went. A healed replay has
/// no place to look into before its end: if its output differs, a chain of the same steps tells where.
pub(crate) fn replay<L: LiveBatch, O: Freeze>(
    name: &str,
    forward: &Forward<L, O>,
    tape: &mut Tape<L, O>,
    runner: &mut Runner,
    live: &L,
) -> Result<(O, ReplayPath)> {
    let reason = super::chain_reason(tape, runner.stream_mut());
    let (replayed, path) = match reason {
        Some(reason) => (chained(tape, runner, live)?, ReplayPath::Chain(reason)),
        None => {
            let (output, path) = heal::replay(tape, runner.stream_mut(), live)?;
            (snapshot_output(Probe::default(), runner, &output)?, path)
        }
    };
    let (eager, output) = probed(runner, |runner| runner.eager(live, forward))?;
    let ranks = runner.stream_mut().ranks().cloned();
    let differs = replayed.output() != eager.output();
    // What one rank looks into, all do: a chain of one alone would wait for the others.
    let differs = match &ranks {
        Some(ranks) if reason.is_none() => ranks.max("a verified replay", usize::from(differs))? > 0,
        _ => differs,
    };
    let difference = match reason {
        Some(_) => replayed.first_difference(&eager),
        None if !differs => None,
        None => {
            let detail = "a chain of the same steps gives what the eager run gives".to_owned();
            let of_chain = chained(tape, runner, live)?.first_difference(&eager);
            let of_healed =
                || (replayed.output() != eager.output()).then(|| ("the output of a healed replay".to_owned(), detail));
            of_chain.or_else(of_healed)
        }
    };
    let compared = match difference {
        None => Ok((output, path)),
        Some((place, detail)) => Err(Error::Mismatch { graph: name.to_owned(), place, detail }),
    };
    match &ranks {
        Some(ranks) => ranks.agree("a verified replay", compared, |_| 0),
        None => compared,
    }
}

fn chained<L: LiveBatch, O: Freeze>(tape: &Tape<L, O>, runner: &mut Runner, live: &L) -> Result<Probe> {
    Ok(probed(runner, |runner| chain::replay(tape, runner.stream_mut(), live))?.0)
}

fn probed<O: Freeze>(runner: &mut Runner, run: impl FnOnce(&mut Runner) -> Result<O>) -> Result<(Probe, O)> {
    runner.stream_mut().probe = Some(Probe::default());
    let output = run(runner);
    let probe = runner.stream_mut().probe.take().unwrap_or_default();
    let output = output?;
    Ok((snapshot_output(probe, runner, &output)?, output))
}

fn snapshot_output<O: Freeze>(mut probe: Probe, runner: &mut Runner, output: &O) -> Result<Probe> {
    let stream = runner.stream_mut();
    let tensors = output_tensors(stream, output)?;
    probe.snapshot(stream.main(), "the output".to_owned(), &tensors)?;
    Ok(probe)
}
