//! The address space of one host device: fake addresses, each access checked.
//!
//! Owns every allocation and reservation. Invariants:
//! - an address is never given out twice, so a freed one stays recognisable; allocations lie a gap apart, and those of
//!   two devices in different ranges, so a foreign pointer is seen as such;
//! - fresh memory is 0xFF bytes; mapping a range again makes it fresh again.
//!
//! `memory.rs` allocates and gives out views, `queue.rs` runs copies and fills. An address is never dereferenced.

use std::collections::{BTreeMap, VecDeque};
use std::ptr::NonNull;
use std::sync::{Arc, MutexGuard, PoisonError};

use super::backing::{Backing, CHUNK_BYTES, SHARED_TURN, SharedBacking};
use crate::{DevicePtr, Error, MemoryInfo, Result};

/// How much address space one device has: 32 TiB.
const DEVICE_SPAN: u64 = 1 << 45;
/// The least distance between two allocations, in bytes.
const GAP_BYTES: u64 = 1 << 20;
/// Device memory of one node of an executable graph, in bytes: about what CUDA's driver takes.
const NODE_BYTES: usize = 1 << 10;
/// How many freed ranges are remembered for messages.
const FREED_MAX: usize = 1024;

#[derive(Debug)]
enum Kind {
    Device,
    Pinned,
    /// Memory of this device or of another one, which both reach; the owner's counts.
    Shared {
        backing: Arc<SharedBacking>,
        is_own: bool,
    },
    /// Mapped ranges, offset → bytes; all below `prefix` is mapped.
    Reserved {
        mapped: BTreeMap<usize, usize>,
        prefix: usize,
    },
}

#[derive(Debug)]
struct Region {
    bytes: usize,
    kind: Kind,
    /// `None` while no part of a reservation is mapped, and for shared memory.
    backing: Option<Backing>,
}

impl Region {
    fn covers(&self, offset: usize, bytes: usize) -> bool {
        let Kind::Reserved { mapped, prefix } = &self.kind else { return true };
        let end = offset + bytes;
        end <= *prefix || covered_until(mapped, offset) >= end
    }

    fn describe(&self, base: u64) -> String {
        let what = match self.kind {
            Kind::Device => "an allocation",
            Kind::Pinned => "a pinned allocation",
            Kind::Shared { .. } => "a shared allocation",
            Kind::Reserved { .. } => "a reservation",
        };
        format!("{what} of {} bytes at {base:#x}", self.bytes)
    }
}

/// Returns the end of the mapped memory that begins at or before `offset` and goes on without a gap.
fn covered_until(mapped: &BTreeMap<usize, usize>, offset: usize) -> usize {
    let mut end = offset;
    let first = mapped.range(..=offset).next_back().map_or(offset, |(start, _)| *start);
    for (start, bytes) in mapped.range(first..) {
        if *start > end {
            break;
        }
        end = end.max(start + bytes);
    }
    end
}

#[derive(Debug)]
pub(super) struct Memory {
    device: String,
    base: u64,
    next: u64,
    regions: BTreeMap<u64, Region>,
    freed: VecDeque<(u64, usize)>,
    total_bytes: usize,
    used_bytes: usize,
    num_shared: usize,
}

impl Memory {
    pub(super) fn new(device: &str, instance: u64, total_bytes: usize) -> Self {
        let base = (1 + instance % (1 << 18)) * DEVICE_SPAN;
        Self {
            device: device.to_owned(),
            base,
            next: base,
            regions: BTreeMap::new(),
            freed: VecDeque::new(),
            total_bytes,
            used_bytes: 0,
            num_shared: 0,
        }
    }

    pub(super) fn info(&self) -> MemoryInfo {
        MemoryInfo { free_bytes: self.total_bytes - self.used_bytes, total_bytes: self.total_bytes }
    }

    pub(super) fn out_of_memory(&self, requested_bytes: usize) -> Error {
        let free_bytes = self.total_bytes - self.used_bytes;
        Error::OutOfMemory { device: self.device.clone(), requested_bytes, free_bytes }
    }

    pub(super) fn alloc(&mut self, bytes: usize) -> Result<DevicePtr> {
        self.claim(bytes)?;
        let backing = Backing::new(bytes);
        if backing.is_none() {
            self.used_bytes -= bytes;
            return Err(self.out_of_memory(bytes));
        }
        self.place(Region { bytes, kind: Kind::Device, backing })
    }

    /// Pinned memory is the host's, so it does not count against the device.
    pub(super) fn alloc_pinned(&mut self, bytes: usize) -> Result<DevicePtr> {
        let backing = Some(Backing::new(bytes).ok_or_else(|| self.out_of_memory(bytes))?);
        self.place(Region { bytes, kind: Kind::Pinned, backing })
    }

    /// Allocates memory that other devices reach too, once they have adopted it.
    pub(super) fn alloc_shared(&mut self, bytes: usize) -> Result<(DevicePtr, Arc<SharedBacking>)> {
        self.claim(bytes)?;
        let Some(backing) = SharedBacking::new(bytes).map(Arc::new) else {
            self.used_bytes -= bytes;
            return Err(self.out_of_memory(bytes));
        };
        let kind = Kind::Shared { backing: Arc::clone(&backing), is_own: true };
        let ptr = self.place(Region { bytes, kind, backing: None })?;
        self.num_shared += 1;
        Ok((ptr, backing))
    }

    /// Makes memory of another device reachable here, at its address.
    pub(super) fn adopt(&mut self, ptr: DevicePtr, bytes: usize, backing: &Arc<SharedBacking>) {
        let kind = Kind::Shared { backing: Arc::clone(backing), is_own: false };
        self.regions.insert(ptr.0, Region { bytes, kind, backing: None });
        self.num_shared += 1;
    }

    /// Takes this thread's turn to use memory that devices share, if this one has any. Whoever runs work, reads or writes
    /// holds it until it is done.
    pub(super) fn turn(&self) -> Option<MutexGuard<'static, ()>> {
        (self.num_shared > 0).then(|| SHARED_TURN.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn reserve(&mut self, bytes: usize) -> Result<DevicePtr> {
        let kind = Kind::Reserved { mapped: BTreeMap::new(), prefix: 0 };
        self.place(Region { bytes, kind, backing: None })
    }

    /// Removes an allocation or reservation.
    pub(super) fn remove(&mut self, ptr: DevicePtr) {
        let Some(region) = self.regions.remove(&ptr.0) else {
            tracing::error!(device = self.device, address = format!("{:#x}", ptr.0), "freed what is not allocated");
            return;
        };
        match &region.kind {
            Kind::Device => self.used_bytes -= region.bytes,
            Kind::Pinned => {}
            Kind::Shared { is_own, .. } => {
                self.num_shared -= 1;
                self.used_bytes -= if *is_own { region.bytes } else { 0 };
            }
            Kind::Reserved { mapped, .. } => self.used_bytes -= mapped.values().sum::<usize>(),
        }
        if self.freed.len() == FREED_MAX {
            self.freed.pop_front();
        }
        self.freed.push_back((ptr.0, region.bytes));
    }

    pub(super) fn map(&mut self, base: DevicePtr, offset: usize, bytes: usize) -> Result<()> {
        let valid = bytes > 0 && offset.is_multiple_of(CHUNK_BYTES) && bytes.is_multiple_of(CHUNK_BYTES);
        let invalid = || Error::driver("cuMemMap", 1, "CUDA_ERROR_INVALID_VALUE");
        let region = self.regions.get(&base.0).ok_or_else(invalid)?;
        let Kind::Reserved { mapped, .. } = &region.kind else { return Err(invalid()) };
        let taken = mapped.range(..offset + bytes).next_back().is_some_and(|(start, len)| start + len > offset);
        if !valid || taken || offset + bytes > region.bytes {
            return Err(invalid());
        }
        let (reserved, end) = (region.bytes, offset + bytes);
        let grown = match &region.backing {
            Some(backing) if backing.bytes() >= end => None,
            Some(backing) => Some(backing.grown(end.max(2 * backing.bytes()).min(reserved))),
            None => Some(Backing::new(end)),
        };
        if grown.as_ref().is_some_and(Option::is_none) {
            return Err(self.out_of_memory(bytes));
        }
        self.claim(bytes)?;
        let region = self.regions.get_mut(&base.0).expect("found above");
        region.backing = grown.unwrap_or_else(|| region.backing.take());
        let Kind::Reserved { mapped, prefix } = &mut region.kind else { unreachable!("checked above") };
        mapped.insert(offset, bytes);
        *prefix = covered_until(mapped, 0);
        Ok(())
    }

    pub(super) fn unmap(&mut self, base: DevicePtr, offset: usize, bytes: usize) {
        let region = self.regions.get_mut(&base.0);
        let Some(Region { kind: Kind::Reserved { mapped, prefix }, backing, .. }) = region else {
            tracing::error!(device = self.device, "unmapped what is not reserved");
            return;
        };
        if mapped.get(&offset) != Some(&bytes) {
            tracing::error!(device = self.device, offset, bytes, "unmapped what no one call of map mapped");
            return;
        }
        mapped.remove(&offset);
        *prefix = covered_until(mapped, 0);
        self.used_bytes -= bytes;
        match backing {
            Some(backing) if !mapped.is_empty() => backing.forget(offset, bytes),
            _ => *backing = None,
        }
    }

    pub(super) fn is_pinned(&self, ptr: DevicePtr) -> bool {
        let region = self.regions.range(..=ptr.0).next_back();
        region.is_some_and(|(base, region)| matches!(region.kind, Kind::Pinned) && ptr.0 - base < region.bytes as u64)
    }

    /// Takes the memory of an executable graph. Nothing can be read or written there.
    pub(super) fn claim_exec(&mut self, num_nodes: usize) -> Result<()> {
        self.claim(num_nodes * NODE_BYTES)
    }

    /// Gives the memory of an executable graph back.
    pub(super) fn free_exec(&mut self, num_nodes: usize) {
        self.used_bytes -= num_nodes * NODE_BYTES;
    }

    fn claim(&mut self, bytes: usize) -> Result<()> {
        if bytes > self.total_bytes - self.used_bytes {
            return Err(self.out_of_memory(bytes));
        }
        self.used_bytes += bytes;
        Ok(())
    }

    fn place(&mut self, region: Region) -> Result<DevicePtr> {
        let at = self.next;
        let end = at.checked_add(region.bytes as u64).and_then(|end| end.checked_add(GAP_BYTES));
        let next = end.and_then(|end| end.checked_next_multiple_of(GAP_BYTES));
        let Some(next) = next.filter(|next| *next <= self.base + DEVICE_SPAN) else {
            if let Kind::Device | Kind::Shared { .. } = region.kind {
                self.used_bytes -= region.bytes;
            }
            return Err(self.out_of_memory(region.bytes));
        };
        self.next = next;
        self.regions.insert(at, region);
        Ok(DevicePtr(at))
    }

    /// Returns the host memory behind `[ptr, ptr + bytes)`, all of it accessible; `who` is named if it is not.
    pub(super) fn resolve(&self, who: &str, ptr: DevicePtr, bytes: usize) -> Result<NonNull<u8>> {
        if let Some((base, region)) = self.regions.range(..=ptr.0).next_back() {
            let offset = (ptr.0 - base) as usize;
            let inside = offset.checked_add(bytes).is_some_and(|end| end <= region.bytes);
            if inside && region.covers(offset, bytes) {
                let backing = match &region.kind {
                    Kind::Shared { backing, .. } => backing.get(),
                    _ => region.backing.as_ref().expect("mapped memory has a backing"),
                };
                return Ok(backing.touch(offset, bytes));
            }
        }
        Err(self.access_error(who, ptr, bytes))
    }

    #[cold]
    pub(super) fn access_error(&self, who: &str, ptr: DevicePtr, bytes: usize) -> Error {
        let message = format!("{bytes} bytes at {:#x} of {}: {}", ptr.0, self.device, self.explain(ptr, bytes));
        Error::Memory { kernel: who.to_owned(), message }
    }

    fn explain(&self, ptr: DevicePtr, bytes: usize) -> String {
        if ptr.is_null() {
            return "the null address".to_owned();
        }
        let is_own = ptr.0 >= self.base && ptr.0 < self.base + DEVICE_SPAN;
        if !is_own && !self.is_adopted(ptr) {
            return "not an address of this device, but of another or of none".to_owned();
        }
        let inside = |base: u64, len: usize| ptr.0 >= base && ptr.0 - base < len as u64;
        if let Some((base, len)) = self.freed.iter().find(|(base, len)| inside(*base, *len)) {
            return format!("freed: it was in an allocation of {len} bytes at {base:#x}");
        }
        let below = self.regions.range(..=ptr.0).next_back();
        match below {
            Some((base, region)) if inside(*base, region.bytes) => {
                let (offset, what) = ((ptr.0 - base) as usize, region.describe(*base));
                match offset.saturating_add(bytes).checked_sub(region.bytes) {
                    Some(over) if over > 0 => format!("{over} bytes too many for {what}, at offset {offset}"),
                    _ => format!("not mapped throughout, in {what}, at offset {offset}"),
                }
            }
            Some((base, region)) => {
                let behind = ptr.0 - base - region.bytes as u64;
                format!(
                    "in no allocation; the nearest below is {what}, whose end is {behind} bytes away",
                    what = region.describe(*base)
                )
            }
            None => "in no allocation, and none lies below".to_owned(),
        }
    }

    /// Tells whether an address lies in memory of another device that this one reaches.
    fn is_adopted(&self, ptr: DevicePtr) -> bool {
        let region = self.regions.range(..=ptr.0).next_back();
        region.is_some_and(|(base, region)| {
            matches!(region.kind, Kind::Shared { is_own: false, .. }) && ptr.0 - base < region.bytes as u64
        })
    }

    /// Copies `bytes` within the device, as if through a buffer.
    pub(super) fn copy(&self, who: &str, dst: DevicePtr, src: DevicePtr, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let from = self.resolve(who, src, bytes)?;
        let to = self.resolve(who, dst, bytes)?;
        // SAFETY: `resolve` returned `bytes` initialised bytes for both, valid while `self` is borrowed; `copy_to`
        // allows overlap, and other views of these bytes are cells on this thread.
        unsafe { from.copy_to(to, bytes) };
        Ok(())
    }

    /// Copies host bytes to the device.
    pub(super) fn write(&self, who: &str, dst: DevicePtr, data: &[u8]) -> Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let to = self.resolve(who, dst, data.len())?;
        // SAFETY: `resolve` returned `data.len()` bytes; `data` is a plain slice, so it lies outside every backing, of
        // which only cells are given out.
        unsafe { to.as_ptr().copy_from_nonoverlapping(data.as_ptr(), data.len()) };
        Ok(())
    }

    /// Copies device bytes to the host.
    pub(super) fn read(&self, who: &str, dst: &mut [u8], src: DevicePtr) -> Result<()> {
        if dst.is_empty() {
            return Ok(());
        }
        let from = self.resolve(who, src, dst.len())?;
        // SAFETY: as in `write`, in the other direction.
        unsafe { from.as_ptr().copy_to_nonoverlapping(dst.as_mut_ptr(), dst.len()) };
        Ok(())
    }

    /// Writes `pattern` over `[dst, dst + bytes)` again and again.
    pub(super) fn fill(&self, who: &str, dst: DevicePtr, pattern: [u8; 4], bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let to = self.resolve(who, dst, bytes)?;
        // SAFETY: `resolve` returned `bytes` initialised bytes; whatever views them are cells on this thread, since
        // `self` holds cells and so is not `Sync`.
        unsafe {
            to.write_bytes(pattern[0], bytes);
            if pattern != [pattern[0]; 4] {
                (0..bytes).for_each(|at| to.add(at).write(pattern[at % 4]));
            }
        }
        Ok(())
    }
}
