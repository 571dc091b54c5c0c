//! Inputs on their way from the host to the device, while the device works on something else.
//!
//! [`Runner::upload`] takes pageable memory, and the driver may wait with it until the stream gets there. A [`Staging`]
//! has page-locked memory of its own: the copy is enqueued and the call returns. Its slots take turns, so that the
//! inputs of a few forwards can be on their way at once.
//!
//! Invariant: a slot is written only when the copies that read it last have run.

use std::sync::Arc;

use crate::device::{Event, PinnedBuffer};
use crate::{Device, Error, Result, Runner, Tensor};

/// Uploads that can be on their way at once, unless more are asked for: two of a step, of two steps.
const SLOTS: usize = 4;

/// Parts begin at multiples of this many bytes.
const PART_ALIGNMENT: usize = 16;

/// Page-locked memory through which inputs go to the device.
///
/// # Example
/// ```
/// use bcg_runtime::{DType, Device, Runner, RunnerOptions, Staging};
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let (ids, scale) = (device.zeros(&[2], DType::I32)?, device.zeros(&[1], DType::F32)?);
/// let mut staging = Staging::new(&device, 64)?;
/// let values = [7, 8];
/// staging.upload(&mut runner, &[(&ids, bytemuck::cast_slice(&values)), (&scale, bytemuck::bytes_of(&0.5f32))])?;
/// assert_eq!(runner.read::<i32>(&ids)?, [7, 8]);
/// assert_eq!(runner.read::<f32>(&scale)?, [0.5]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Debug)]
pub struct Staging {
    slots: Vec<Slot>,
    turn: usize,
    bytes: usize,
}

#[derive(Debug)]
struct Slot {
    buffer: Arc<PinnedBuffer>,
    /// An event after the copies that read the buffer, if it could be recorded.
    sent: Event,
    has_sent: bool,
}

impl Staging {
    /// Makes one whose uploads have up to `bytes` each, every tensor rounded up to 16 bytes.
    ///
    /// # Errors
    /// The driver's, if it has no more such memory.
    pub fn new(device: &Device, bytes: usize) -> Result<Self> {
        Self::with_slots(device, bytes, SLOTS)
    }

    /// As [`Staging::new`], for so many uploads on their way at once, at least one.
    ///
    /// # Errors
    /// As [`Staging::new`].
    pub fn with_slots(device: &Device, bytes: usize, num_slots: usize) -> Result<Self> {
        let slot = |_| {
            let buffer = Arc::new(PinnedBuffer::new(device, bytes)?);
            Ok(Slot { buffer, sent: Event::new(device)?, has_sent: true })
        };
        Ok(Self { slots: (0..num_slots.max(1)).map(slot).collect::<Result<_>>()?, turn: 0, bytes })
    }

    /// The bytes that an upload may have.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Enqueues copies of bytes, in row-major order, into contiguous tensors: inputs of the coming forward. The bytes
    /// may be reused at once. Waits only if as many uploads are on their way as there are slots.
    ///
    /// # Errors
    /// [`Error::Shape`] for a row-sliced tensor, if a length differs, or if the bytes do not fit; those of
    /// [`OpStream::addr`](crate::OpStream::addr); the driver's.
    pub fn upload(&mut self, runner: &mut Runner, parts: &[(&Tensor, &[u8])]) -> Result<()> {
        let num_slots = self.slots.len();
        let slot = &mut self.slots[self.turn % num_slots];
        self.turn += 1;
        if std::mem::take(&mut slot.has_sent) {
            slot.sent.synchronize()?;
        } else {
            runner.device().synchronize()?;
        }
        let sent = slot.send(runner, parts, self.bytes);
        // After a failure too: the copies enqueued before it read the buffer.
        slot.sent.record(runner.stream_mut().main()).map(|()| slot.has_sent = true).and(sent)
    }
}

impl Slot {
    /// Enqueues the copies through this slot, which has room for `bytes_max`.
    fn send(&self, runner: &mut Runner, parts: &[(&Tensor, &[u8])], bytes_max: usize) -> Result<()> {
        const OP: &str = "Staging::upload";
        let mut begin = 0;
        for &(tensor, bytes) in parts {
            if !tensor.is_contiguous() || bytes.len() != tensor.size_bytes() {
                let expected = format!("{} bytes for a contiguous tensor", tensor.size_bytes());
                return Err(Error::shape(OP, expected, format!("{} bytes for {tensor:?}", bytes.len())));
            }
            if begin + bytes.len() > bytes_max {
                let expected = format!("at most {bytes_max} bytes");
                return Err(Error::shape(OP, expected, format!("{} bytes", begin + bytes.len())));
            }
            self.buffer.write_bytes_at(begin, bytes)?;
            runner.stream_mut().copy_from_pinned_at(tensor, &self.buffer, begin)?;
            begin = (begin + bytes.len()).next_multiple_of(PART_ALIGNMENT);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, RunnerOptions};

    #[test]
    fn many_uploads_arrive_in_order_though_nobody_waits() {
        let device = Device::host();
        let mut runner = Runner::new(&device, RunnerOptions::default()).expect("a runner");
        let rows: Vec<Tensor> = (0..20).map(|_| device.zeros(&[3], DType::I32).expect("a tensor")).collect();
        let input = device.zeros(&[3], DType::I32).expect("a tensor");
        let mut staging = Staging::new(&device, 12).expect("a staging");
        for (i, row) in (0..).zip(&rows) {
            let values = [i, i + 1, i + 2];
            staging.upload(&mut runner, &[(&input, bytemuck::cast_slice(&values))]).expect("enqueued");
            runner.eager(&(), |cx| cx.copy(row, &input)).expect("a forward");
        }
        for (i, row) in (0..).zip(&rows) {
            assert_eq!(runner.read::<i32>(row).expect("read"), [i, i + 1, i + 2]);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_and_the_next_upload_goes_on() {
        let device = Device::host();
        let mut runner = Runner::new(&device, RunnerOptions::default()).expect("a runner");
        let matrix = device.zeros(&[2, 4], DType::I32).expect("a tensor");
        let mut staging = Staging::new(&device, 32).expect("a staging");
        let bytes = [1u8; 32];
        let sliced = matrix.columns(0..2).expect("columns");
        assert!(matches!(staging.upload(&mut runner, &[(&sliced, &bytes[..16])]), Err(Error::Shape { .. })));
        assert!(matches!(staging.upload(&mut runner, &[(&matrix, &bytes[..16])]), Err(Error::Shape { .. })));
        let twice = [(&matrix, &bytes[..]), (&matrix, &bytes[..])];
        assert!(matches!(staging.upload(&mut runner, &twice), Err(Error::Shape { .. })));
        staging.upload(&mut runner, &twice[..1]).expect("one fits");
        assert_eq!(runner.read::<i32>(&matrix).expect("read"), [0x0101_0101; 8]);
    }

    #[test]
    fn what_was_enqueued_before_a_failure_keeps_its_bytes() {
        let device = Device::host();
        let control = device.host_control().expect("a host device");
        let mut runner = Runner::new(&device, RunnerOptions::default()).expect("a runner");
        let [first, second, later] = [(); 3].map(|()| device.zeros(&[4], DType::U8).expect("a tensor"));
        for call in ["a wrong length", "cuMemcpyAsync", "cuEventRecord"] {
            let mut staging = Staging::new(&device, 32).expect("a staging");
            // The second part fails, or the event after both.
            let wrong = if call == "a wrong length" { &[2u8; 3][..] } else { &[2; 4] };
            let n = if call == "cuMemcpyAsync" { 2 } else { 1 };
            control.inject(&format!("fail:{call}:{n}")).expect("a fault");
            staging.upload(&mut runner, &[(&first, &[1; 4]), (&second, wrong)]).expect_err(call);
            control.clear_faults();
            (0..SLOTS).for_each(|_| staging.upload(&mut runner, &[(&later, &[9; 4])]).expect("enqueued"));
            assert_eq!(runner.read::<u8>(&first).expect("read"), [1; 4], "{call}: the buffer was written too early");
        }
    }
}
