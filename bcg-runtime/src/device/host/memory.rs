//! Memory of the host device: the driver's calls.
//!
//! Invariants: what frees memory first runs all work that was enqueued before. While the calling thread captures, CUDA
//! forbids the calls that allocate, so they are refused and spoil the capture; what cannot be refused (free, unmap)
//! happens when the thread's last capture ends.

use std::sync::MutexGuard;

use super::backing::CHUNK_BYTES;
use super::{HostBackend, State};
use crate::device::traits::MemoryBackend;
use crate::{DevicePtr, Error, MemoryInfo, Result};

/// Something that gives memory back.
#[derive(Clone, Copy, Debug)]
pub(super) enum Release {
    Remove(DevicePtr),
    Unmap { base: DevicePtr, offset: usize, bytes: usize },
}

impl HostBackend {
    /// Gives memory back after all enqueued work, or at the end of this thread's captures.
    fn release(&self, what: Release) {
        let mut state = self.lock();
        if state.capture_of_this_thread().is_some() {
            state.deferred.push((std::thread::current().id(), what));
        } else {
            self.run_all(state).release_now(what);
        }
    }

    /// Gives the memory back for which the end of a capture was waited, after all enqueued work.
    pub(super) fn release_due(&self, mut state: MutexGuard<'_, State>) {
        let due = std::mem::take(&mut state.due);
        if !due.is_empty() {
            let mut state = self.run_all(state);
            due.into_iter().for_each(|what| state.release_now(what));
        }
    }
}

impl State {
    fn release_now(&mut self, what: Release) {
        match what {
            Release::Remove(ptr) => self.memory.remove(ptr),
            Release::Unmap { base, offset, bytes } => self.memory.unmap(base, offset, bytes),
        }
    }

    pub(super) fn refuse_while_capturing(&mut self, call: &'static str) -> Result<()> {
        match self.capture_of_this_thread() {
            Some(capture) => {
                let what = format!("{call}; allocate before the capture, or take memory of the arena");
                Err(self.forbid(capture, what))
            }
            None => Ok(()),
        }
    }
}

impl MemoryBackend for HostBackend {
    fn memory_info(&self) -> Result<MemoryInfo> {
        Ok(self.enter("cuMemGetInfo")?.memory.info())
    }

    fn alloc(&self, bytes: usize) -> Result<DevicePtr> {
        let mut state = self.enter_alloc("cuMemAlloc", bytes)?;
        state.refuse_while_capturing("cuMemAlloc")?;
        state.memory.alloc(bytes)
    }

    fn free(&self, ptr: DevicePtr) {
        self.release(Release::Remove(ptr));
    }

    fn alloc_pinned(&self, bytes: usize) -> Result<DevicePtr> {
        let mut state = self.enter_alloc("cuMemHostAlloc", bytes)?;
        state.refuse_while_capturing("cuMemHostAlloc")?;
        state.memory.alloc_pinned(bytes)
    }

    fn free_pinned(&self, ptr: DevicePtr) {
        self.release(Release::Remove(ptr));
    }

    fn write_pinned(&self, ptr: DevicePtr, data: &[u8]) -> Result<()> {
        let state = self.lock();
        if !data.is_empty() && !state.memory.is_pinned(ptr) {
            let message = format!("{:#x} is not pinned memory", ptr.0);
            return Err(Error::Memory { kernel: "write_pinned".to_owned(), message });
        }
        state.memory.write("write_pinned", ptr, data)
    }

    fn read_pinned(&self, ptr: DevicePtr, into: &mut [u8]) -> Result<()> {
        self.lock().memory.read("read_pinned", into, ptr)
    }

    fn reserve(&self, bytes: usize) -> Result<DevicePtr> {
        let mut state = self.enter_alloc("cuMemAddressReserve", bytes)?;
        state.refuse_while_capturing("cuMemAddressReserve")?;
        state.memory.reserve(bytes)
    }

    fn map(&self, base: DevicePtr, offset: usize, bytes: usize) -> Result<()> {
        let mut state = self.enter_alloc("cuMemMap", bytes)?;
        state.refuse_while_capturing("cuMemMap")?;
        state.memory.map(base, offset, bytes)
    }

    fn unmap(&self, base: DevicePtr, offset: usize, bytes: usize) {
        self.release(Release::Unmap { base, offset, bytes });
    }

    fn unreserve(&self, base: DevicePtr, _bytes: usize) {
        self.release(Release::Remove(base));
    }

    fn map_granularity(&self) -> usize {
        CHUNK_BYTES
    }
}

#[cfg(test)]
mod tests {
    use std::fmt;

    use super::super::testing::Rig;
    use super::super::{HostMemory, HostOptions};
    use super::*;
    use crate::device::traits::StreamBackend;
    use crate::op::{Op, RowCopy};

    fn message(result: Result<impl fmt::Debug>) -> String {
        match result.unwrap_err() {
            Error::Memory { kernel, message } => format!("{kernel}: {message}"),
            other => panic!("not a memory error: {other}"),
        }
    }

    #[test]
    fn fresh_memory_is_nan_in_every_float_type() {
        let rig = Rig::new();
        let (stream, ptr) = (rig.stream("main"), rig.backend.alloc(200_000).unwrap());
        assert!(rig.read::<f32>(stream, ptr, 50_000).unwrap().iter().all(|v| v.is_nan()));
        assert!(rig.read::<half::bf16>(stream, ptr, 8).unwrap().iter().all(|v| v.is_nan()));
        assert!(rig.read::<half::f16>(stream, ptr, 8).unwrap().iter().all(|v| v.is_nan()));
    }

    #[test]
    fn an_access_outside_names_the_copy_the_address_and_the_nearest_allocation() {
        let rig = Rig::new();
        let (stream, ptr) = (rig.stream("main"), rig.backend.alloc(64).unwrap());
        let said = message(rig.read::<u8>(stream, ptr.offset_bytes(60), 8));
        let address = format!("copy to host: 8 bytes at {:#x} of host:0", ptr.0 + 60);
        assert!(said.starts_with(&address), "{said}");
        assert!(
            said.ends_with(&format!("4 bytes too many for an allocation of 64 bytes at {:#x}, at offset 60", ptr.0))
        );
        let said = message(rig.read::<u8>(stream, ptr.offset_bytes(100), 8));
        assert!(said.contains("in no allocation; the nearest below is an allocation of 64 bytes"), "{said}");
    }

    #[test]
    fn freed_memory_and_the_null_address_are_told_apart() {
        let rig = Rig::new();
        let (stream, ptr) = (rig.stream("main"), rig.backend.alloc(64).unwrap());
        rig.backend.free(ptr);
        assert!(message(rig.read::<u8>(stream, ptr, 8)).contains("freed"));
        assert!(message(rig.read::<u8>(stream, DevicePtr::NULL, 8)).contains("null"));
    }

    #[test]
    fn a_pointer_of_another_device_is_foreign() {
        let (rig, other) = (Rig::new(), Rig::new());
        let ptr = other.backend.alloc(64).unwrap();
        assert!(message(rig.read::<u8>(rig.stream("main"), ptr, 8)).contains("not an address of this device"));
    }

    #[test]
    fn freeing_waits_for_the_work_enqueued_before() {
        let rig = Rig::new();
        let (stream, log) = (rig.stream("main"), rig.log());
        let scratch = rig.backend.alloc(4).unwrap();
        rig.backend.enqueue(stream, &Op::Fill { dst: scratch, byte: 1, bytes: 4 }).unwrap();
        rig.append(stream, log, 7).unwrap();
        rig.backend.free(scratch);
        assert_eq!(rig.control.num_pending(), 0);
        assert_eq!(rig.read_log(log), [7]);
    }

    #[test]
    fn memory_is_bounded_and_comes_back_when_freed() {
        let rig = Rig::with(HostOptions { memory_bytes: 1 << 20, ..HostOptions::default() });
        let ptr = rig.backend.alloc(1 << 19).unwrap();
        assert!(matches!(
            rig.backend.alloc((1 << 19) + 1),
            Err(Error::OutOfMemory { requested_bytes: 524_289, free_bytes: 524_288, .. })
        ));
        rig.backend.free(ptr);
        assert_eq!(rig.backend.memory_info().unwrap(), MemoryInfo { free_bytes: 1 << 20, total_bytes: 1 << 20 });
    }

    #[test]
    fn a_huge_untouched_allocation_is_cheap() {
        let rig = Rig::with(HostOptions { memory_bytes: 1 << 36, ..HostOptions::default() });
        let ptr = rig.backend.alloc(1 << 32).unwrap();
        let last = rig.read::<u8>(rig.stream("main"), ptr.offset_bytes((1 << 32) - 1), 1).unwrap();
        assert_eq!(last, [0xFF]);
    }

    #[test]
    fn a_reservation_keeps_its_addresses_and_loses_its_contents_when_unmapped() {
        let rig = Rig::new();
        let (stream, unit) = (rig.stream("main"), rig.backend.map_granularity());
        let base = rig.backend.reserve(4 * unit).unwrap();
        assert!(message(rig.read::<u8>(stream, base, 1)).contains("not mapped"));
        rig.backend.map(base, 0, unit).unwrap();
        rig.backend.map(base, unit, 2 * unit).unwrap();
        let across = base.offset_bytes(unit - 2);
        rig.backend.enqueue(stream, &Op::Fill { dst: across, byte: 5, bytes: 4 }).unwrap();
        assert_eq!(rig.read::<u8>(stream, across, 5).unwrap(), [5, 5, 5, 5, 0xFF]);
        assert!(message(rig.read::<u8>(stream, base.offset_bytes(3 * unit - 1), 2)).contains("not mapped"));
        rig.backend.unmap(base, unit, 2 * unit);
        assert!(message(rig.read::<u8>(stream, across, 4)).contains("not mapped"));
        assert_eq!(rig.read::<u8>(stream, across, 2).unwrap(), [5, 5]);
        rig.backend.map(base, unit, 2 * unit).unwrap();
        assert_eq!(rig.read::<u8>(stream, across, 4).unwrap(), [5, 5, 0xFF, 0xFF]);
        rig.backend.unmap(base, unit, 2 * unit);
        rig.backend.unmap(base, 0, unit);
        rig.backend.unreserve(base, 4 * unit);
        assert!(message(rig.read::<u8>(stream, base, 1)).contains("freed"));
    }

    #[test]
    fn mapping_what_is_mapped_or_outside_is_refused() {
        let rig = Rig::new();
        let unit = rig.backend.map_granularity();
        let base = rig.backend.reserve(2 * unit).unwrap();
        rig.backend.map(base, 0, unit).unwrap();
        for (offset, bytes) in [(0, unit), (unit, 2 * unit), (unit, 100), (0, 2 * unit)] {
            assert!(matches!(rig.backend.map(base, offset, bytes), Err(Error::Driver { code: 1, .. })));
        }
        rig.backend.map(base, unit, unit).unwrap();
    }

    #[test]
    fn a_view_is_bounds_checked_and_aligned() {
        let rig = Rig::new();
        let ptr = rig.backend.alloc(16).unwrap();
        let state = rig.backend.lock();
        let memory = HostMemory::new(&state.memory, "k");
        memory.store(ptr, &[1.0f32, 2.0, 3.0, 4.0]).unwrap();
        memory.view::<f32>(ptr, 4).unwrap()[1].set(9.0);
        assert_eq!(memory.load::<f32>(ptr.offset_bytes(4), 2).unwrap(), [9.0, 3.0]);
        assert!(memory.view::<f32>(DevicePtr::NULL, 0).unwrap().is_empty());
        assert!(message(memory.view::<f32>(ptr.offset_bytes(2), 1)).contains("not aligned for f32"));
        assert!(message(memory.view::<f32>(ptr, 5)).starts_with("k: 20 bytes at"));
        assert!(message(memory.load::<i64>(ptr, usize::MAX)).contains("too many"));
    }

    #[test]
    fn pinned_memory_is_written_at_once_and_read_when_the_copy_runs() {
        let rig = Rig::new();
        let (stream, dst) = (rig.stream("main"), rig.backend.alloc(4).unwrap());
        let pinned = rig.backend.alloc_pinned(4).unwrap();
        rig.backend.write_pinned(pinned, &[1; 4]).unwrap();
        rig.backend.enqueue(stream, &Op::CopyFromPinned { dst, src: pinned, bytes: 4 }).unwrap();
        rig.backend.write_pinned(pinned, &[2; 4]).unwrap();
        assert_eq!(rig.read::<u8>(stream, dst, 4).unwrap(), [2; 4]);
        assert!(
            message(rig.backend.enqueue(stream, &Op::CopyFromPinned { dst: pinned, src: dst, bytes: 4 }))
                .contains("not pinned")
        );
        assert!(message(rig.backend.write_pinned(dst, &[1])).contains("not pinned"));
    }

    #[test]
    fn overlapping_copies_are_refused_and_rows_may_interleave() {
        let rig = Rig::new();
        let (stream, ptr) = (rig.stream("main"), rig.backend.alloc(64).unwrap());
        rig.backend.copy_from_host(stream, ptr, &(0..64).collect::<Vec<u8>>()).unwrap();
        rig.copy(stream, ptr.offset_bytes(4), ptr, 8).unwrap();
        assert!(message(rig.backend.synchronize_stream(stream)).contains("overlap"));
        let copy = |shift: usize, row_bytes| RowCopy {
            dst: ptr.offset_bytes(shift),
            dst_pitch: 8,
            src: ptr,
            src_pitch: 8,
            row_bytes,
            rows: 3,
        };
        rig.backend.enqueue(stream, &Op::Copy(copy(4, 4))).unwrap();
        let data = rig.read::<u8>(stream, ptr, 24).unwrap();
        assert_eq!(data[..16], [0, 1, 2, 3, 0, 1, 2, 3, 8, 9, 10, 11, 8, 9, 10, 11]);
        rig.backend.enqueue(stream, &Op::Copy(copy(4, 5))).unwrap();
        assert!(message(rig.backend.synchronize_stream(stream)).contains("overlap"));
        assert!(matches!(rig.backend.enqueue(stream, &Op::Copy(copy(4, 9))), Err(Error::Driver { code: 1, .. })));
    }
}
