//! The slots of recurrent states that the sequences of a batch read and write, as the ops on states take them.

use bcg_runtime::{DType, DevicePtr, Error, Freeze, HostMemory, KernelArgs, OpStream, Result, Tensor};

use crate::check::Check;

/// The state slots of a batch's sequences, which state-space layers read and write.
#[derive(Debug, Clone, Freeze)]
pub struct StateSlots {
    /// `[B]` i32: the slot that holds a sequence's state; −1 for one that begins, and behind the last sequence.
    pub read: Tensor,
    /// `[B]` i32: the slot that its new state goes to, another than the one it reads; −1 where none is kept.
    pub write: Tensor,
}

/// Two `[B]` i32 arrays, as kernels take them.
#[repr(C)]
#[derive(Clone, Copy, Debug, KernelArgs)]
pub(super) struct StateSlotsArgs {
    #[points_to(const i32)]
    read: DevicePtr,
    #[points_to(const i32)]
    write: DevicePtr,
}

/// Refuses slots that are not one for each sequence.
pub(super) fn check_slots(check: Check, slots: &StateSlots, sequences: usize) -> Result<()> {
    check.dense("slots.read", &slots.read, &[sequences], DType::I32)?;
    check.dense("slots.write", &slots.write, &[sequences], DType::I32)
}

impl StateSlotsArgs {
    pub(super) fn new(cx: &mut OpStream, slots: &StateSlots) -> Result<Self> {
        Ok(Self { read: cx.addr(&slots.read)?, write: cx.addr(&slots.write)? })
    }

    /// Loads the slots that each sequence reads and writes, on the host device.
    ///
    /// # Errors
    /// [`Error::Shape`] if a sequence with rows writes a slot that another one reads or writes: on CUDA, which of them
    /// comes first is open.
    pub(super) fn load(
        &self,
        memory: &HostMemory<'_>,
        starts: &[i32],
        num_slots: usize,
    ) -> Result<Vec<(Option<usize>, Option<usize>)>> {
        let sequences = starts.len() - 1;
        let slot = |slot: i32| usize::try_from(slot).ok().filter(|slot| *slot < num_slots);
        let read = memory.load::<i32>(self.read, sequences)?;
        let write = memory.load::<i32>(self.write, sequences)?;
        let slots: Vec<_> = read.iter().zip(&write).map(|(read, write)| (slot(*read), slot(*write))).collect();
        let with_rows = || slots.iter().enumerate().filter(|(b, _)| starts[*b] < starts[b + 1]);
        for (b, (_, written)) in with_rows().filter(|(_, (_, write))| write.is_some()) {
            if with_rows().any(|(other, (read, write))| other != b && (read == written || write == written)) {
                let expected = "slots that no other sequence reads or writes, where a sequence writes";
                return Err(Error::shape("StateSlots", expected, format!("read {read:?}, write {write:?}")));
            }
        }
        Ok(slots)
    }
}
