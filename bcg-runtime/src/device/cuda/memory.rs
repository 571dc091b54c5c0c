//! Device memory, pinned memory, and reserved addresses whose memory comes and goes.
//!
//! - Allocations are plain (`cuMemAlloc`), never stream-ordered: peers can read them, and no capture holds them.
//! - A mapping owns its memory: the driver's handle is released as soon as it is mapped, and the memory lives until it
//!   is unmapped. So there is no list of handles to keep, and none to leak.
//! - Allocating is refused while this thread captures. Frees are put off until no capture is open, because they
//!   wait for the context, which spoils every capture in it. Mapping is legal at any time: it touches no stream.

use super::super::traits::MemoryBackend;
use super::sys::OUT_OF_MEMORY;
use super::{CudaBackend, PutOff};
use crate::{DevicePtr, Error, MemoryInfo, Result};

impl CudaBackend {
    /// Turns the driver's code for it into [`Error::OutOfMemory`].
    pub(super) fn out_of_memory(&self, error: Error, requested_bytes: usize) -> Error {
        match error {
            Error::Driver { code: OUT_OF_MEMORY, .. } => {
                let free_bytes = self.driver.memory_info().map_or(0, |(free, _)| free);
                Error::OutOfMemory { device: self.name.clone(), requested_bytes, free_bytes }
            }
            error => error,
        }
    }

    fn refuse_allocation(&self) -> Result<()> {
        let what = "allocating; allocate before the capture, or from the arena (OpStream::empty)";
        self.refuse_while_this_thread_captures(&mut self.gate(), what)
    }

    fn free_or_put_off(&self, memory: PutOff) {
        // The gate stays locked during the free: no capture can begin while the driver waits for the context.
        let mut gate = self.gate();
        if gate.captures.is_empty() {
            self.release(&memory);
        } else {
            gate.put_off.push(memory);
        }
    }
}

impl MemoryBackend for CudaBackend {
    fn memory_info(&self) -> Result<MemoryInfo> {
        let _relaxed = self.enter()?;
        let (free_bytes, total_bytes) = self.driver.memory_info()?;
        Ok(MemoryInfo { free_bytes, total_bytes })
    }

    fn alloc(&self, bytes: usize) -> Result<DevicePtr> {
        self.refuse_allocation()?;
        self.bind_again()?;
        self.driver.alloc(bytes).map(DevicePtr).map_err(|error| self.out_of_memory(error, bytes))
    }

    fn free(&self, ptr: DevicePtr) {
        self.free_or_put_off(PutOff { context: self.context, ptr: ptr.0, is_pinned: false });
    }

    fn alloc_pinned(&self, bytes: usize) -> Result<DevicePtr> {
        self.refuse_allocation()?;
        self.bind_again()?;
        // One address for host and device: that is unified addressing, which every 64-bit driver has.
        self.driver.alloc_pinned(bytes).map(DevicePtr)
    }

    fn free_pinned(&self, ptr: DevicePtr) {
        self.free_or_put_off(PutOff { context: self.context, ptr: ptr.0, is_pinned: true });
    }

    fn write_pinned(&self, ptr: DevicePtr, data: &[u8]) -> Result<()> {
        let dst: *mut u8 = std::ptr::with_exposed_provenance_mut(ptr.0 as usize);
        // SAFETY: `ptr` lies in a live allocation of `alloc_pinned`, whose address was exposed there, and
        // `PinnedBuffer::write_bytes_at` compared the end of `data` with its size just before; by its contract no other
        // thread reads or writes there now. No Rust reference to that memory is ever made (`sys.rs` and this line are all
        // that touch it), so `data` cannot overlap it.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), dst, data.len()) };
        Ok(())
    }

    fn read_pinned(&self, ptr: DevicePtr, into: &mut [u8]) -> Result<()> {
        let src: *const u8 = std::ptr::with_exposed_provenance(ptr.0 as usize);
        // SAFETY: `ptr` lies in a live allocation of `alloc_pinned`, whose address was exposed there, and
        // `PinnedBuffer::read_bytes_at` compared the end of `into` with its size just before; nothing writes it now, by
        // the contract of that function and of `traits`. No Rust reference to that memory is ever made, so `into` cannot overlap it.
        unsafe { std::ptr::copy_nonoverlapping(src, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    fn reserve(&self, bytes: usize) -> Result<DevicePtr> {
        let _relaxed = self.enter()?;
        self.driver.reserve(bytes).map(DevicePtr).map_err(|error| self.out_of_memory(error, bytes))
    }

    fn map(&self, base: DevicePtr, offset: usize, bytes: usize) -> Result<()> {
        let _relaxed = self.enter()?;
        let ptr = base.offset_bytes(offset).0;
        let memory = self.driver.create_memory(self.device, bytes).map_err(|error| self.out_of_memory(error, bytes))?;
        let mapped = self.driver.map(ptr, bytes, memory);
        // From here on the mapping, if there is one, is what keeps the memory.
        let released = self.driver.release_memory(memory);
        mapped?;
        let usable = released.and_then(|()| self.driver.set_access(ptr, bytes, self.device));
        if usable.is_err() {
            // Nothing has used the mapping yet, so there is nothing to wait for.
            self.enter_and_log(|driver| driver.unmap(ptr, bytes));
        }
        usable
    }

    fn unmap(&self, base: DevicePtr, offset: usize, bytes: usize) {
        let ptr = base.offset_bytes(offset).0;
        let gate = self.gate();
        self.enter_and_log(|driver| {
            // An error here is that of earlier work; that work has ended, so the memory is unused either way.
            if let Err(error) = self.wait_for_all(&gate) {
                tracing::warn!(device = %self.name, %error, "waiting before an unmap failed; going on");
            }
            driver.unmap(ptr, bytes)
        });
    }

    fn unreserve(&self, base: DevicePtr, bytes: usize) {
        self.enter_and_log(|driver| driver.unreserve(base.0, bytes));
    }

    fn map_granularity(&self) -> usize {
        self.granularity
    }
}
