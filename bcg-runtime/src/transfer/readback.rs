//! Values on their way from the device to the host, while the host does something else.
//!
//! [`Eager::read`](crate::Eager::read) waits for all work that was enqueued. A [`Readback`] waits for its own copy
//! only: the work of the next forward can be enqueued in between, so that the device has something to do while the host
//! reads.
//!
//! Invariant: host code reads the page-locked memory only after the event of the copy that wrote it last. If that copy was
//! not enqueued, or failed, nothing is read until the next one.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::device::{Event, PinnedBuffer};
use crate::world::communicator::Told;
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
    /// The latest copies were not enqueued, or did not run: the memory holds nothing, or what was read back before.
    has_failed: AtomicBool,
    /// What the kernels of the rank that read back say of the others.
    told: Option<Arc<Told>>,
}

impl Readback {
    /// Makes one with room for `bytes`, each tensor rounded up to 16 bytes.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(device: &Device, bytes: usize) -> Result<Self> {
        let (buffer, copied) = (PinnedBuffer::new(device, bytes)?, Event::new(device)?);
        Ok(Self { buffer, copied, parts: Vec::new(), has_failed: AtomicBool::new(false), told: None })
    }

    /// Waits for the latest [`Runner::read_back`] and returns the values of its tensor number `part`, in row-major
    /// order.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no such part or `T` is not its dtype; the first error of the work waited for.
    /// [`Error::RankLost`] if a rank was lost meanwhile. [`Error::Other`] after the latest [`Runner::read_back`], or the wait for it, has failed.
    pub fn read<T: Element>(&self, part: usize) -> Result<Vec<T>> {
        if self.has_failed.load(Ordering::Relaxed) {
            let what =
                "Readback::read: the latest Runner::read_back failed, so there is nothing to read; read back again";
            return Err(Error::other(what));
        }
        let waited = self.copied.synchronize().and_then(|()| self.told.as_ref().map_or(Ok(()), |told| told.check()));
        waited.inspect_err(|_| self.has_failed.store(true, Ordering::Relaxed))?;
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
    /// [`OpStream::addr`](crate::OpStream::addr); the driver's. There is nothing to read from `readback` then.
    pub fn read_back(&mut self, tensors: &[&Tensor], readback: &mut Readback) -> Result<()> {
        *readback.has_failed.get_mut() = true;
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
        readback.copied.record(self.stream_mut().main())?;
        readback.told = self.stream_mut().told().cloned();
        *readback.has_failed.get_mut() = false;
        Ok(())
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
        let error = readback.read::<i32>(0).expect_err("nobody knows whether the copy has run").to_string();
        assert!(error.ends_with("read back again"), "{error}");
        runner.read_back(&[&tensor], &mut readback).expect("enqueued");
        assert_eq!(readback.read::<i32>(0).expect("read"), [1]);
    }

    #[test]
    fn nothing_is_read_after_a_read_back_that_failed() {
        let (device, mut runner) = runner();
        let (old, new) =
            (device.tensor(&[2], &[1, 2]).expect("a tensor"), device.tensor(&[2], &[3, 4]).expect("a tensor"));
        let rows = device.tensor(&[2, 2], &[5, 6, 7, 8]).expect("a tensor");
        let column = rows.columns(0..1).expect("a column");
        let control = device.host_control().expect("a host device");
        for call in ["a column", "cuMemcpyDtoHAsync", "cuEventRecord"] {
            let mut readback = Readback::new(&device, 32).expect("a readback");
            runner.read_back(&[&old, &old], &mut readback).expect("enqueued");
            control.fail_calls_named(call, 1);
            let second = if call == "a column" { &column } else { &new };
            runner.read_back(&[&new, second], &mut readback).expect_err(call);
            control.clear_faults();
            for part in [0, 1] {
                let error = readback.read::<i32>(part).expect_err("neither old values nor unwritten ones").to_string();
                assert!(error.ends_with("read back again"), "{call}: {error}");
            }
            runner.read_back(&[&new], &mut readback).expect("enqueued");
            assert_eq!(readback.read::<i32>(0).expect("read"), [3, 4], "{call}");
        }
    }

    #[test]
    fn nothing_is_read_after_work_that_failed() {
        let (device, mut runner) = runner();
        let tensor = device.tensor(&[1], &[1]).expect("a tensor");
        let mut readback = Readback::new(&device, 32).expect("a readback");
        runner.read_back(&[&tensor, &tensor], &mut readback).expect("enqueued");
        readback.read::<i32>(1).expect("read");
        // A flip outside of the memory fails the copy.
        device.host_control().expect("a host device").inject("flip:copy to pinned:1:800000000").expect("a fault");
        runner.read_back(&[&tensor, &tensor], &mut readback).expect("enqueued");
        readback.read::<i32>(0).expect_err("the copy failed");
        readback.read::<i32>(1).expect_err("the device says so once, and this part is no better");
    }
}
