//! Verification: a replay and an eager run of the same forward, compared bit for bit.
//!
//! Both runs copy the tensors that enter each break, and the outputs, to the host. The first that differs names the
//! segment that computed it.

use super::{ReplayPath, chain, heal};
use crate::arena::FrozenTensor;
use crate::bridge::output_tensors;
use crate::graph::{Forward, Recording};
use crate::tensor::read_bytes;
use crate::{Error, Freeze, LiveBatch, OpStream, Result, Runner};

/// The tensors seen at each break of one run.
#[derive(Debug, Default)]
pub(crate) struct Probe {
    places: Vec<Snapshot>,
}

#[derive(Debug)]
struct Snapshot {
    place: String,
    tensors: Vec<Vec<u8>>,
}

impl Probe {
    /// Copies the bridges among a break's arguments to the host, after the work enqueued so far.
    ///
    /// Persistent tensors are left out: a KV cache is large, and what is wrong in it shows in the next bridge.
    pub(crate) fn snapshot_args(&mut self, stream: &mut OpStream, place: String, args: &[FrozenTensor]) -> Result<()> {
        let bridges: Vec<FrozenTensor> = args.iter().filter(|arg| arg.is_in_arena()).cloned().collect();
        self.snapshot(stream, place, &bridges)
    }

    /// Copies `tensors` to the host, after the work enqueued so far.
    fn snapshot(&mut self, stream: &mut OpStream, place: String, tensors: &[FrozenTensor]) -> Result<()> {
        let tensors = tensors
            .iter()
            .map(|tensor| {
                let mut bytes = vec![0; tensor.size_bytes()];
                let size = tensor.dtype.size_bytes();
                let (row_bytes, pitch) = (tensor.shape.row_elements() * size, tensor.row_stride * size);
                read_bytes(stream.main().stream_ref(), &mut bytes, tensor.ptr, row_bytes, pitch)?;
                Ok(bytes)
            })
            .collect::<Result<_>>()?;
        self.places.push(Snapshot { place, tensors });
        Ok(())
    }

    /// Returns the tensors seen last.
    fn output(&self) -> Option<&[Vec<u8>]> {
        self.places.last().map(|last| &*last.tensors)
    }

    /// Returns the first difference: the place, and what differs.
    fn first_difference(&self, eager: &Self) -> Option<(String, String)> {
        for (index, pair) in self.places.iter().zip(&eager.places).enumerate() {
            let (replayed, expected) = pair;
            if replayed.place != expected.place {
                return Some((replayed.place.clone(), format!("the eager run came to {} instead", expected.place)));
            }
            for (number, (a, b)) in replayed.tensors.iter().zip(&expected.tensors).enumerate() {
                if a != b {
                    let differing = a.iter().zip(b).filter(|(a, b)| a != b).count();
                    let place = format!("segment {index}, before {}", replayed.place);
                    return Some((place, format!("tensor {number}: {differing} of {} bytes differ", b.len())));
                }
            }
        }
        (self.places.len() != eager.places.len()).then(|| {
            let place = "the number of breaks".to_owned();
            (place, format!("{} at replay, {} in the eager run", self.places.len(), eager.places.len()))
        })
    }
}

/// Replays, runs eagerly, compares; returns the output of the eager run, and how the replay went. A healed replay has no
/// place to look into before its end: if its output differs, a chain of the same steps tells where.
pub(crate) fn replay<L: LiveBatch, O: Freeze>(
    name: &str,
    forward: &Forward<L, O>,
    recording: &mut Recording<L, O>,
    runner: &mut Runner,
    live: &L,
) -> Result<(O, ReplayPath)> {
    let reason = super::chain_reason(recording, runner.stream_mut());
    let (replayed, path) = match reason {
        Some(reason) => (chained(recording, runner, live)?, ReplayPath::Chain(reason)),
        None => {
            let (output, path) = heal::replay(recording, runner.stream_mut(), live)?;
            (snapshot_output(Probe::default(), runner, &output)?, path)
        }
    };
    let (eager, output) = probed(runner, |runner| runner.eager(live, forward))?;
    let difference = match reason {
        Some(_) => replayed.first_difference(&eager),
        None if replayed.output() == eager.output() => None,
        None => {
            let detail = "a chain of the same steps gives what the eager run gives".to_owned();
            let of_chain = chained(recording, runner, live)?.first_difference(&eager);
            Some(of_chain.unwrap_or(("the output of a healed replay".to_owned(), detail)))
        }
    };
    match difference {
        None => Ok((output, path)),
        Some((place, detail)) => Err(Error::Mismatch { graph: name.to_owned(), place, detail }),
    }
}

fn chained<L: LiveBatch, O: Freeze>(recording: &Recording<L, O>, runner: &mut Runner, live: &L) -> Result<Probe> {
    Ok(probed(runner, |runner| chain::replay(recording, runner.stream_mut(), live))?.0)
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
    probe.snapshot(stream, "the output".to_owned(), &tensors)?;
    Ok(probe)
}
