//! What a verification sees of a run: the tensors that enter each break, copied to the host.

use crate::Result;
use crate::device::Stream;
use crate::frozen::FrozenTensor;
use crate::tensor::read_bytes;

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
    pub(crate) fn snapshot_args(&mut self, stream: &Stream, place: String, args: &[FrozenTensor]) -> Result<()> {
        let bridges: Vec<FrozenTensor> = args.iter().filter(|arg| arg.is_in_arena()).cloned().collect();
        self.snapshot(stream, place, &bridges)
    }

    /// Copies `tensors` to the host, after the work enqueued so far.
    pub(crate) fn snapshot(&mut self, stream: &Stream, place: String, tensors: &[FrozenTensor]) -> Result<()> {
        let tensors = tensors
            .iter()
            .map(|tensor| {
                let mut bytes = vec![0; tensor.size_bytes()];
                let size = tensor.dtype.size_bytes();
                let (row_bytes, pitch) = (tensor.shape.row_elements() * size, tensor.row_stride * size);
                read_bytes(stream.stream_ref(), &mut bytes, tensor.ptr, row_bytes, pitch)?;
                Ok(bytes)
            })
            .collect::<Result<_>>()?;
        self.places.push(Snapshot { place, tensors });
        Ok(())
    }

    /// Returns the tensors seen last.
    pub(crate) fn output(&self) -> Option<&[Vec<u8>]> {
        self.places.last().map(|last| &*last.tensors)
    }

    /// Returns the first difference: the place, and what differs.
    pub(crate) fn first_difference(&self, eager: &Self) -> Option<(String, String)> {
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
