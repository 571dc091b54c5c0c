//! Values on their way from the device to the host, while the host does something else.
//!
//! [`Eager::read`](crate::Eager::read) waits for all work that was enqueued. A [`Readback`] waits for its own copy
//! only: the work of the next forward can be enqueued in between, so that the device has something to do while the host
//! reads.
//!
//! Invariant: host code reads the page-locked memory only after the event of the copy that wrote it last.

use std::ops::Range;

use crate::device::{Event, PinnedBuffer};
use crate::{DType, Device, Element, Error, Result, Runner, Tensor};

/// Parts begin at multiples of this many bytes.
const PART_ALIGNMENT: usize = 16;

/// Page-locked memory that tensors are copied into, and the point at which that is done.
///
/// # Example
/// ```
/// use bcg_runtime::{Device, Readback, Runner, RunnerOptions};
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let (ids, sums) = (device.tensor(&[2], &[7, 8])?, device.tensor(&[1], &[0.5f32])?);
/// let mut readback = Readback::new(&device, 64)?;
/// runner.read_back(&[&ids, &sums], &mut readback)?;
/// // The next forward may be enqueued here.
/// assert_eq!(readback.read::<i32>(0)?, [7, 8]);
/// assert_eq!(readback.read::<f32>(1)?, [0.5]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Debug)]
pub struct Readback {
    buffer: PinnedBuffer,
    copied: Event,
    parts: Vec<(DType, Range<usize>)>,
}

impl Readback {
    /// Makes one with room for `bytes`, each tensor rounded up to 16 bytes.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(device: &Device, bytes: usize) -> Result<Self> {
        Ok(Self { buffer: PinnedBuffer::new(device, bytes)?, copied: Event::new(device)?, parts: Vec::new() })
    }

    /// Waits for the latest [`Runner::read_back`] and returns the values of its tensor number `part`, in row-major
    /// order.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no such part or `T` is not its dtype; the first error of the work waited for.
    pub fn read<T: Element>(&self, part: usize) -> Result<Vec<T>> {
        self.copied.synchronize()?;
        let Some((dtype, bytes)) = self.parts.get(part) else {
            let expected = format!("a part below {}", self.parts.len());
            return Err(Error::shape("Readback::read", expected, part.to_string()));
        };
        if *dtype != T::DTYPE {
            return Err(Error::shape("Readback::read", dtype.to_string(), T::DTYPE.to_string()));
        }
        let mut values = vec![T::zeroed(); bytes.len() / dtype.size_bytes()];
        self.buffer.read_bytes_at(bytes.start, bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }
}

impl Runner {
    /// Enqueues copies of tensors to the host, after the work enqueued so far, and does not wait for them. What
    /// `readback` held is overwritten.
    ///
    /// # Errors
    /// [`Error::Shape`] for a row-sliced tensor, or if the tensors do not fit; those of
    /// [`OpStream::addr`](crate::OpStream::addr); the driver's.
    pub fn read_back(&mut self, tensors: &[&Tensor], readback: &mut Readback) -> Result<()> {
        readback.parts.clear();
        let mut begin = 0;
        for tensor in tensors {
            let bytes = begin..begin + tensor.size_bytes();
            if !tensor.is_contiguous() || bytes.end > readback.buffer.len_bytes() {
                let expected = format!("contiguous tensors of at most {} bytes", readback.buffer.len_bytes());
                return Err(Error::shape("Runner::read_back", expected, format!("{tensor:?}")));
            }
            begin = bytes.end.next_multiple_of(PART_ALIGNMENT);
            self.stream_mut().copy_to_pinned(tensor, &readback.buffer, bytes.start)?;
            readback.parts.push((tensor.dtype(), bytes));
        }
        readback.copied.record(self.stream_mut().main())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RunnerOptions;

    fn runner() -> (Device, Runner) {
        let device = Device::host();
        let runner = Runner::new(&device, RunnerOptions::default()).expect("a runner");
        (device, runner)
    }

    #[test]
    fn values_are_those_of_the_forward_that_was_read_back_not_of_the_next() {
        let (device, mut runner) = runner();
        let tensor = device.tensor(&[3], &[1, 2, 3]).expect("a tensor");
        let mut readbacks = [0, 1].map(|_| Readback::new(&device, 64).expect("a readback"));
        runner.read_back(&[&tensor], &mut readbacks[0]).expect("enqueued");
        runner.upload(&tensor, &[4, 5, 6]).expect("uploaded");
        runner.read_back(&[&tensor], &mut readbacks[1]).expect("enqueued");
        assert_eq!(readbacks[1].read::<i32>(0).expect("read"), [4, 5, 6]);
        assert_eq!(readbacks[0].read::<i32>(0).expect("read"), [1, 2, 3]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (device, mut runner) = runner();
        let tensor = device.tensor(&[4], &[1, 2, 3, 4]).expect("a tensor");
        let mut readback = Readback::new(&device, 16).expect("a readback");
        assert!(matches!(runner.read_back(&[&tensor, &tensor], &mut readback), Err(Error::Shape { .. })));
        runner.read_back(&[&tensor], &mut readback).expect("one fits");
        assert!(matches!(readback.read::<f32>(0), Err(Error::Shape { .. })), "another dtype");
        assert!(matches!(readback.read::<i32>(1), Err(Error::Shape { .. })), "no such part");
        assert_eq!(readback.read::<i32>(0).expect("read"), [1, 2, 3, 4]);
    }

    #[test]
    fn an_error_of_the_device_is_the_readers() {
        let (device, mut runner) = runner();
        let tensor = device.tensor(&[1], &[1]).expect("a tensor");
        let mut readback = Readback::new(&device, 16).expect("a readback");
        runner.read_back(&[&tensor], &mut readback).expect("enqueued");
        device.host_control().expect("a host device").fail_calls_named("cuEventSynchronize", 1);
        readback.read::<i32>(0).expect_err("the wait fails");
    }
}
