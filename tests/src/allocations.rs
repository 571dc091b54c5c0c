//! Counts what the host allocates, thread by thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static NUM_ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The allocator of the system, which counts: a test program makes it its global allocator.
#[derive(Debug)]
pub struct CountingAllocator;

/// Returns how many allocations this thread made so far, growth included.
pub fn num_allocations() -> u64 {
    NUM_ALLOCATIONS.get()
}

fn count() {
    // A thread that is ending has no counter any more, and nobody asks for it.
    let _ = NUM_ALLOCATIONS.try_with(|num| num.set(num.get() + 1));
}

// SAFETY: each method passes its arguments on to `System` unchanged, so `System`'s contract holds; counting touches only a
// constant-initialised thread-local, which allocates nothing.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps `GlobalAlloc::alloc`'s contract, which is `System`'s.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: `ptr` came from `System` by `alloc` or `realloc` above, with this layout.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: `ptr` came from `System` by `alloc` or `realloc`, with this layout; `new_size` is the caller's.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}
