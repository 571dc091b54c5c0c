//! The host memory behind one allocation of the host device.
//!
//! Owns raw memory that starts as 0xFF bytes, which is NaN in every float type. Pages are committed and filled only
//! when they are first touched, so a large KV cache costs host memory only where it is used.
//!
//! Invariants: `start` points to `bytes` initialised bytes, aligned to [`ALIGN`], until the drop; a chunk marked as
//! filled holds 0xFF or what was written since, another one is filled before anybody gets a pointer into it.
//! Called by `memory.rs` only, under the device's lock, and for memory that devices share under one lock of all of them.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::Cell;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Mutex;

/// Alignment of every backing. Larger would make the system's zeroed allocation touch each page.
pub(super) const ALIGN: usize = 16;

/// The unit in which memory is filled, and in which a reservation is mapped, in bytes.
pub(super) const CHUNK_BYTES: usize = 64 << 10;

/// What fresh memory holds.
const FRESH: u8 = 0xFF;

pub(super) struct Backing {
    start: NonNull<u8>,
    bytes: usize,
    filled: Vec<Cell<bool>>,
    num_fresh: Cell<usize>,
}

// SAFETY: `start` is the only pointer to the memory that outlives a borrow of `self`: `touch` gives out others that its
// callers in `memory.rs` bind to such a borrow. So moving the owner to another thread moves the memory with it.
unsafe impl Send for Backing {}

/// The memory of an allocation that several host devices reach, each under its own lock.
///
/// Whoever calls [`Backing::touch`] on it, and uses what that returns, holds [`SHARED_TURN`] meanwhile.
#[derive(Debug)]
pub(super) struct SharedBacking(Backing);

// SAFETY: the cells of the backing and the bytes behind it are used by one thread at a time: `Memory::resolve`, the only
// caller of `get`, runs under `SHARED_TURN` for a device that has shared memory, until what it returned is not used any
// more (`Memory::turn` says who takes it).
unsafe impl Sync for SharedBacking {}

/// The turn of a thread to use memory that host devices share. The last lock that is taken: none is under it.
pub(super) static SHARED_TURN: Mutex<()> = Mutex::new(());

impl SharedBacking {
    pub(super) fn new(bytes: usize) -> Option<Self> {
        Backing::new(bytes).map(Self)
    }

    pub(super) fn get(&self) -> &Backing {
        debug_assert!(SHARED_TURN.try_lock().is_err(), "memory that devices share is used by one thread at a time");
        &self.0
    }
}

impl Backing {
    /// Makes `bytes` (> 0) of fresh memory, or nothing if the host has too little.
    pub(super) fn new(bytes: usize) -> Option<Self> {
        assert!(bytes > 0, "a backing holds memory");
        let layout = Layout::from_size_align(bytes, ALIGN).ok()?;
        // SAFETY: the layout's size is not zero, by the assertion above.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        let num_chunks = bytes.div_ceil(CHUNK_BYTES);
        Some(Self { start, bytes, filled: vec![Cell::new(false); num_chunks], num_fresh: Cell::new(num_chunks) })
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns a pointer to `len` initialised bytes at `offset`.
    ///
    /// # Panics
    /// If the range is not inside the backing.
    pub(super) fn touch(&self, offset: usize, len: usize) -> NonNull<u8> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.bytes), "a checked range");
        if self.num_fresh.get() > 0 && len > 0 {
            self.fill(offset, len);
        }
        // SAFETY: `offset <= bytes` by the assertion above, so the result is inside the allocation or at its end.
        unsafe { self.start.add(offset) }
    }

    /// Makes the chunks of a range fresh again; both ends are multiples of the chunk, or the end of the backing.
    pub(super) fn forget(&self, offset: usize, len: usize) {
        for chunk in &self.filled[offset / CHUNK_BYTES..(offset + len).div_ceil(CHUNK_BYTES)] {
            if chunk.replace(false) {
                self.num_fresh.set(self.num_fresh.get() + 1);
            }
        }
    }

    /// Makes a larger backing that begins with the contents of this one, or nothing if the host has too little.
    pub(super) fn grown(&self, bytes: usize) -> Option<Self> {
        assert!(bytes >= self.bytes, "a backing grows");
        let larger = Self::new(bytes)?;
        for (idx, _) in self.filled.iter().enumerate().filter(|(_, filled)| filled.get()) {
            let offset = idx * CHUNK_BYTES;
            let len = CHUNK_BYTES.min(self.bytes - offset);
            let (from, to) = (self.touch(offset, len), larger.touch(offset, len));
            // SAFETY: `touch` returned `len` initialised bytes in each of two different allocations.
            unsafe { to.copy_from_nonoverlapping(from, len) };
        }
        Some(larger)
    }

    fn fill(&self, offset: usize, len: usize) {
        for idx in offset / CHUNK_BYTES..(offset + len).div_ceil(CHUNK_BYTES) {
            if self.filled[idx].replace(true) {
                continue;
            }
            self.num_fresh.set(self.num_fresh.get() - 1);
            let at = idx * CHUNK_BYTES;
            // SAFETY: `at` is below `bytes`, since `filled` has one entry for each started chunk; the length is cut at
            // the end. No view covers these bytes: a view comes from `touch`, which filled its chunks before.
            unsafe { self.start.add(at).write_bytes(FRESH, CHUNK_BYTES.min(self.bytes - at)) };
        }
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        let layout = Layout::from_size_align(self.bytes, ALIGN).expect("the layout of `new`");
        // SAFETY: `new` allocated `start` with this very layout, and only this drop gives it back.
        unsafe { dealloc(self.start.as_ptr(), layout) };
    }
}

impl fmt::Debug for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Backing({} bytes, {} chunks fresh)", self.bytes, self.num_fresh.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn byte(backing: &Backing, offset: usize) -> u8 {
        // SAFETY: `touch` returns one initialised byte.
        unsafe { backing.touch(offset, 1).read() }
    }

    #[test]
    fn growing_keeps_what_was_written_and_adds_fresh_bytes() {
        let small = Backing::new(CHUNK_BYTES + 10).unwrap();
        // SAFETY: `touch` returns one byte that nobody else uses.
        unsafe { small.touch(CHUNK_BYTES + 9, 1).write(7) };
        let large = small.grown(4 * CHUNK_BYTES).unwrap();
        assert_eq!([CHUNK_BYTES + 9, CHUNK_BYTES + 10, 3 * CHUNK_BYTES].map(|at| byte(&large, at)), [7, 0xFF, 0xFF]);
    }

    #[test]
    fn a_forgotten_chunk_is_fresh_again() {
        let backing = Backing::new(2 * CHUNK_BYTES).unwrap();
        // SAFETY: `touch` returns bytes that nobody else uses.
        unsafe { backing.touch(0, 2 * CHUNK_BYTES).write_bytes(1, 2 * CHUNK_BYTES) };
        backing.forget(0, CHUNK_BYTES);
        assert_eq!((byte(&backing, 0), byte(&backing, CHUNK_BYTES)), (0xFF, 1));
    }
}
