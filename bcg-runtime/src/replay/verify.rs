//! Verification: a replay and an eager run of the same forward, compared bit for bit.
//!
//! Both runs copy the tensors that enter each break, and the outputs, to the host. The first that differs names the
//! segment that computed it.

use crate::arena::FrozenTensor;
use crate::bridge::output_tensors;
use crate::graph::{Captured, Recording};
use crate::tensor::read_bytes;
use crate::{CaptureStream, Error, Freeze, LiveBatch, Result, Runner};

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
    pub(crate) fn snapshot_args(
        &mut self,
        stream: &mut CaptureStream,
        place: String,
        args: &[FrozenTensor],
    ) -> Result<()> {
        let bridges: Vec<FrozenTensor> = args.iter().filter(|arg| arg.is_in_arena()).cloned().collect();
        self.snapshot(stream, place, &bridges)
    }

    /// Copies `tensors` to the host, after the work enqueued so far.
    fn snapshot(&mut self, stream: &mut CaptureStream, place: String, tensors: &[FrozenTensor]) -> Result<()> {
        let tensors = tensors
            .iter()
            .map(|tensor| {
                let mut bytes = vec![0; tensor.size_bytes()];
                let size = tensor.dtype.size_bytes();
                let (row_bytes, pitch) = (tensor.shape.row_elements() * size, tensor.row_stride * size);
                read_bytes(stream.main().as_ref(), &mut bytes, tensor.ptr, row_bytes, pitch)?;
                Ok(bytes)
            })
            .collect::<Result<_>>()?;
        self.places.push(Snapshot { place, tensors });
        Ok(())
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

/// Replays, runs eagerly, compares; returns the output of the eager run.
pub(crate) fn replay<L: LiveBatch, O: Freeze>(
    name: &str,
    captured: &Captured<L, O>,
    recording: &Recording<L, O>,
    runner: &mut Runner,
    live: &L,
) -> Result<O> {
    let replayed = probed(runner, |runner| super::chain::replay(recording, runner.stream_mut(), live))?.0;
    let (eager, output) = probed(runner, |runner| runner.eager(live, &captured.forward))?;
    match replayed.first_difference(&eager) {
        None => Ok(output),
        Some((place, detail)) => Err(Error::Mismatch { graph: name.to_owned(), place, detail }),
    }
}

fn probed<O: Freeze>(runner: &mut Runner, run: impl FnOnce(&mut Runner) -> Result<O>) -> Result<(Probe, O)> {
    runner.stream_mut().probe = Some(Probe::default());
    let output = run(runner);
    let stream = runner.stream_mut();
    let mut probe = stream.probe.take().unwrap_or_default();
    let output = output?;
    let tensors = output_tensors(stream, &output)?;
    probe.snapshot(stream, "the output".to_owned(), &tensors)?;
    Ok((probe, output))
}
