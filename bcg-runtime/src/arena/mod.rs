//! Graph memory: one arena for all sizes and all segments of a runner (laws L9 and L10).
//!
//! The arena owns a range of reserved addresses. A *forward* (an eager run, a capture or a replay) starts with all of
//! it free; blocks are handed out lowest address first, and a block is free again as soon as its last handle drops,
//! since everything that reads it was enqueued before. Across forwards everything overlaps.
//!
//! Invariants:
//! - A block belongs to one forward. Handles of earlier forwards are inert: they read as stale and free nothing.
//! - While side streams are open, freed blocks are kept back until they are joined, at claimed addresses too.
//! - At replay, the extent of the captured forward is taken as a whole. The allocations of a break are served in the
//!   order of their claims at the claimed addresses (law L3); one that does not fit lies above that extent.
//! - Inside a segment the arena does not grow (law L7).
//!
//! A [`Tensor`](crate::Tensor) keeps its block; [`OpStream`](crate::OpStream) begins forwards and takes blocks. The
//! arena never enqueues work.

mod log;
mod ranges;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::BlockLog;
use ranges::{ALIGNMENT, FreeRanges};

pub use log::{BlockLifetime, Moment};

use crate::device::Reservation;
use crate::{Device, DevicePtr, Error, Result};

/// The arena grows by at least this much at a time.
const GROWTH_BYTES: usize = 32 << 20;

/// What an arena holds, in bytes; see [`Runner::arena_stats`](crate::Runner::arena_stats).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ArenaStats {
    /// Bytes of reserved addresses.
    pub reserved_bytes: usize,
    /// Bytes of these addresses that have memory.
    pub mapped_bytes: usize,
    /// Bytes of the blocks that the running forward holds.
    pub in_use_bytes: usize,
    /// Where the highest block of that forward ends, in bytes from the arena's base.
    pub extent_bytes: usize,
}

/// One allocation that a break made at capture: its replays have a claim on the same memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    offset: usize,
    bytes: usize,
}

/// A shared handle to an arena.
#[derive(Clone)]
pub(crate) struct Arena(Arc<Shared>);

struct Shared {
    device: Device,
    base: DevicePtr,
    /// The forward that runs now; changed under the lock, read by many.
    forward: AtomicU64,
    state: Mutex<State>,
}

struct State {
    reservation: Reservation,
    free: FreeRanges,
    blocks: Vec<Block>,
    unused_slots: Vec<u32>,
    extent: usize,
    in_use: usize,
    /// Bytes mapped when the memory was released; `None` while it is there.
    released: Option<usize>,
    may_grow: bool,
    keep_back: bool,
    kept_back: Vec<(usize, usize)>,
    /// Blocks at claimed addresses that are kept back in the same way.
    claimed_kept_back: Vec<(usize, usize)>,
    serving: Serving,
    /// The blocks of the capture that is open, if one is.
    log: Option<BlockLog>,
}

/// How allocations are served.
#[derive(Debug, Default)]
enum Serving {
    /// They come from the free ranges.
    #[default]
    Free,
    /// They come from the free ranges, and each becomes a claim: a break of a capture runs.
    Claiming(Vec<Claim>),
    /// They come from the claims: a break of a replay runs.
    Claimed { claims: Arc<[Claim]>, next: usize },
}

#[derive(Clone, Copy, Debug)]
struct Block {
    offset: usize,
    bytes: usize,
    handles: u32,
    /// Served at a claimed address, so not part of the free ranges.
    is_claimed: bool,
}

impl Arena {
    pub(crate) fn new(device: &Device, bytes: usize, bytes_max: usize) -> Result<Self> {
        let mut reservation = Reservation::new(device, bytes_max.max(bytes).max(1))?;
        if bytes > 0 {
            reservation.grow(bytes)?;
        }
        let base = reservation.base();
        let mut free = FreeRanges::default();
        free.reset(0, reservation.mapped_bytes());
        let state = State {
            reservation,
            free,
            blocks: Vec::new(),
            unused_slots: Vec::new(),
            extent: 0,
            in_use: 0,
            released: None,
            may_grow: true,
            keep_back: false,
            kept_back: Vec::new(),
            claimed_kept_back: Vec::new(),
            serving: Serving::Free,
            log: None,
        };
        Ok(Self(Arc::new(Shared {
            device: device.clone(),
            base,
            forward: AtomicU64::new(0),
            state: Mutex::new(state),
        })))
    }

    /// Begins a forward: every block of earlier ones is stale, and all but the first `extent` bytes are free.
    pub(crate) fn begin_forward(&self, extent: usize) -> Result<()> {
        let mut state = self.0.lock();
        state.check_there()?;
        self.0.begin_forward(&mut state, extent);
        Ok(())
    }

    /// Takes a block of at least `bytes` and returns where it begins.
    pub(crate) fn alloc(&self, bytes: usize) -> Result<(DevicePtr, ArenaBlock)> {
        let bytes = bytes.max(1).next_multiple_of(ALIGNMENT);
        let mut state = self.0.lock();
        state.check_there()?; // a tail may come after a release
        let (offset, is_claimed) = match state.serve_claim(bytes) {
            Some(offset) => (offset, true),
            None => (state.take_free(bytes)?, false),
        };
        let slot = state.add_block(Block { offset, bytes, handles: 1, is_claimed });
        drop(state);
        let block = ArenaBlock { arena: self.clone(), forward: self.0.forward(), slot };
        Ok((self.0.base.offset_bytes(offset), block))
    }

    /// Checks that a block may be used in the forward that runs now.
    pub(crate) fn check(&self, block: &ArenaBlock) -> Result<()> {
        if !self.is(&block.arena) {
            return Err(Error::foreign(&format!("{:?}", block.arena), &format!("{self:?}")));
        }
        let current = self.0.forward();
        if block.forward == current { Ok(()) } else { Err(Error::Stale { tensor: block.forward, current }) }
    }

    /// Returns a handle to memory that the running replay keeps: dropping it frees nothing, but while it is there, no
    /// claimed allocation is served in its place.
    pub(crate) fn bridge(&self, ptr: DevicePtr, bytes: usize) -> ArenaBlock {
        let mut state = self.0.lock();
        let offset = (ptr.as_u64() - self.0.base.as_u64()) as usize;
        let slot = state.add_block(Block { offset, bytes, handles: 1, is_claimed: true });
        ArenaBlock { arena: self.clone(), forward: self.0.forward(), slot }
    }

    pub(crate) fn set_may_grow(&self, may_grow: bool) {
        self.0.lock().may_grow = may_grow;
    }

    /// Keeps freed blocks back while side streams may still read them; gives them back when that ends.
    pub(crate) fn set_keep_back(&self, keep_back: bool) {
        let mut state = self.0.lock();
        state.keep_back = keep_back;
        if !keep_back {
            state.claimed_kept_back.clear();
            while let Some((offset, bytes)) = state.kept_back.pop() {
                state.free.free(offset, bytes);
            }
        }
    }

    /// Begins to log the blocks of a capture.
    pub(crate) fn begin_log(&self) {
        self.0.lock().log = Some(BlockLog::default());
    }

    /// Says which step of the graph is captured now.
    pub(crate) fn log_step(&self, step: usize) {
        if let Some(log) = &mut self.0.lock().log {
            log.begin_step(step);
        }
    }

    /// Ends the log of a capture of `num_steps` steps.
    pub(crate) fn end_log(&self, num_steps: usize) -> Vec<BlockLifetime> {
        self.0.lock().log.take().map_or_else(Vec::new, |log| log.end(num_steps))
    }

    /// Begins a break of a capture, each of whose allocations becomes a claim.
    pub(crate) fn begin_claims(&self) {
        self.0.lock().serving = Serving::Claiming(Vec::new());
    }

    /// Ends it and returns the claims, in order.
    pub(crate) fn end_claims(&self) -> Arc<[Claim]> {
        match std::mem::take(&mut self.0.lock().serving) {
            Serving::Claiming(claims) => claims.into(),
            Serving::Free | Serving::Claimed { .. } => Arc::new([]),
        }
    }

    /// Begins a break of a replay, whose allocations are served by these claims.
    pub(crate) fn serve_claims(&self, claims: &Arc<[Claim]>) {
        self.0.lock().serving = Serving::Claimed { claims: Arc::clone(claims), next: 0 };
    }

    /// Serves from the free ranges again.
    pub(crate) fn end_serving(&self) {
        self.0.lock().serving = Serving::Free;
    }

    /// Tells whether an address lies in one of the claimed blocks.
    pub(crate) fn holds(&self, claims: &[Claim], ptr: DevicePtr) -> bool {
        let offset = ptr.as_u64().wrapping_sub(self.0.base.as_u64());
        claims.iter().any(|block| (block.offset as u64..(block.offset + block.bytes) as u64).contains(&offset))
    }

    pub(crate) fn stats(&self) -> ArenaStats {
        let state = self.0.lock();
        ArenaStats {
            reserved_bytes: state.reservation.reserved_bytes(),
            mapped_bytes: state.reservation.mapped_bytes(),
            in_use_bytes: state.in_use,
            extent_bytes: state.extent,
        }
    }

    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Returns where the arena's memory begins.
    pub(crate) fn base(&self) -> DevicePtr {
        self.0.base
    }

    /// Gives the physical memory back, which makes every block stale. The addresses, and so all graphs, stay.
    pub(crate) fn release(&self) {
        let mut state = self.0.lock();
        if state.released.is_none() {
            state.released = Some(state.reservation.mapped_bytes());
            state.reservation.unmap_all();
            self.0.begin_forward(&mut state, 0);
        }
    }

    /// Gives the addresses memory again. Nothing changes if there is too little.
    pub(crate) fn restore(&self) -> Result<()> {
        let mut state = self.0.lock();
        if let Some(bytes) = state.released {
            if bytes > 0 {
                state.reservation.grow(bytes)?;
            }
            state.released = None;
            self.0.begin_forward(&mut state, 0);
        }
        Ok(())
    }
}

impl Shared {
    /// Returns the forward that runs now. The lock orders it with all else, where that matters.
    fn forward(&self) -> u64 {
        self.forward.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin_forward(&self, state: &mut State, extent: usize) {
        self.forward.fetch_add(1, Ordering::Relaxed);
        state.blocks.clear();
        state.unused_slots.clear();
        state.kept_back.clear();
        state.claimed_kept_back.clear();
        state.keep_back = false;
        state.may_grow = true;
        state.serving = Serving::Free;
        state.log = None;
        state.extent = extent;
        state.in_use = extent;
        let mapped = state.reservation.mapped_bytes();
        state.free.reset(extent, mapped);
    }
}

impl State {
    fn check_there(&self) -> Result<()> {
        if self.released.is_none() {
            return Ok(());
        }
        let message = "the arena's memory is released; call Runner::restore_memory first".to_owned();
        Err(Error::Option { option: "Runner::release_memory", message })
    }

    /// Serves the next claimed address, if it fits and nothing that this break still uses lies there: a break that
    /// allocates otherwise than at capture may come to an address earlier than its capture did.
    fn serve_claim(&mut self, bytes: usize) -> Option<usize> {
        let Serving::Claimed { claims, next } = &mut self.serving else { return None };
        let claim = *claims.get(*next)?;
        *next += 1;
        let overlaps = |offset: usize, len: usize| offset < claim.offset + bytes && claim.offset < offset + len;
        let is_taken = self.blocks.iter().any(|b| b.handles > 0 && b.is_claimed && overlaps(b.offset, b.bytes))
            || self.claimed_kept_back.iter().any(|&(offset, len)| overlaps(offset, len));
        (bytes <= claim.bytes && !is_taken).then_some(claim.offset)
    }

    fn take_free(&mut self, bytes: usize) -> Result<usize> {
        let offset = match self.free.alloc(bytes) {
            Some(offset) => offset,
            None => {
                self.grow(bytes)?;
                self.free.alloc(bytes).expect("the arena grew by what was missing")
            }
        };
        self.extent = self.extent.max(offset + bytes);
        self.in_use += bytes;
        if let Serving::Claiming(claims) = &mut self.serving {
            claims.push(Claim { offset, bytes });
        }
        if let Some(log) = &mut self.log {
            log.taken(offset, bytes);
        }
        Ok(offset)
    }

    fn grow(&mut self, bytes: usize) -> Result<()> {
        if !self.may_grow {
            return Err(Error::ArenaFull {
                requested_bytes: bytes,
                in_use_bytes: self.in_use,
                limit_bytes: self.reservation.mapped_bytes(),
                hint: "; the arena cannot grow inside a segment: run the forward eagerly once before its capture, or \
                       raise RunnerOptions::arena_bytes",
            });
        }
        let missing = self.free.missing(bytes);
        let left = self.reservation.reserved_bytes() - self.reservation.mapped_bytes();
        self.reservation.grow(missing.max(GROWTH_BYTES.min(left)))?;
        self.free.extend(self.reservation.mapped_bytes());
        Ok(())
    }

    fn add_block(&mut self, block: Block) -> u32 {
        if let Some(slot) = self.unused_slots.pop() {
            self.blocks[slot as usize] = block;
            return slot;
        }
        self.blocks.push(block);
        self.blocks.len() as u32 - 1
    }

    fn drop_handle(&mut self, slot: u32) {
        let block = &mut self.blocks[slot as usize];
        block.handles -= 1;
        if block.handles > 0 {
            return;
        }
        let Block { offset, bytes, is_claimed, .. } = *block;
        self.unused_slots.push(slot);
        if is_claimed {
            if self.keep_back {
                self.claimed_kept_back.push((offset, bytes));
            }
            return;
        }
        self.in_use -= bytes;
        if let Some(log) = &mut self.log {
            log.freed(offset);
        }
        if self.keep_back {
            self.kept_back.push((offset, bytes));
        } else {
            self.free.free(offset, bytes);
        }
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the arena at {:#x} of {}", self.0.base.as_u64(), self.0.device.name())
    }
}

/// A handle to a block of one forward.
pub(crate) struct ArenaBlock {
    arena: Arena,
    forward: u64,
    slot: u32,
}

impl Clone for ArenaBlock {
    fn clone(&self) -> Self {
        let mut state = self.arena.0.lock();
        if self.arena.0.forward() == self.forward {
            state.blocks[self.slot as usize].handles += 1;
        }
        drop(state);
        Self { arena: self.arena.clone(), forward: self.forward, slot: self.slot }
    }
}

impl Drop for ArenaBlock {
    fn drop(&mut self) {
        let mut state = self.arena.0.lock();
        if self.arena.0.forward() == self.forward {
            state.drop_handle(self.slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::Shape;
    use crate::{DType, Tensor};

    fn shape(bytes: usize) -> Shape {
        Shape::new("test", &[bytes]).unwrap()
    }

    fn arena(bytes: usize) -> Arena {
        let arena = Arena::new(&Device::host(), bytes, 1 << 30).unwrap();
        arena.begin_forward(0).unwrap();
        arena
    }

    #[test]
    fn a_block_is_reused_as_soon_as_its_last_handle_drops() {
        let arena = arena(1 << 20);
        let a = Tensor::in_arena(&arena, shape(1000), DType::U8).unwrap();
        let at = a.ptr;
        let view = a.rows(10..20).unwrap();
        drop(a);
        assert_ne!(Tensor::in_arena(&arena, shape(1000), DType::U8).unwrap().ptr, at, "a view holds the block");
        drop(view);
        assert_eq!(Tensor::in_arena(&arena, shape(1000), DType::U8).unwrap().ptr, at);
    }

    #[test]
    fn handles_of_an_earlier_forward_are_inert() {
        let arena = arena(1 << 20);
        let old = Tensor::in_arena(&arena, shape(100), DType::U8).unwrap();
        arena.begin_forward(0).unwrap();
        let new = Tensor::in_arena(&arena, shape(100), DType::U8).unwrap();
        assert_eq!(new.ptr, old.ptr);
        drop(old.clone());
        drop(old);
        assert_ne!(
            Tensor::in_arena(&arena, shape(100), DType::U8).unwrap().ptr,
            new.ptr,
            "the old handle freed nothing"
        );
    }

    #[test]
    fn growth_inside_a_segment_is_refused_and_changes_nothing() {
        let arena = arena(1 << 20);
        arena.set_may_grow(false);
        let before = arena.stats();
        let refused = Tensor::in_arena(&arena, shape(8 << 20), DType::U8);
        assert!(matches!(refused, Err(Error::ArenaFull { .. })));
        assert_eq!(arena.stats(), before);
        arena.set_may_grow(true);
        Tensor::in_arena(&arena, shape(8 << 20), DType::U8).unwrap();
    }

    #[test]
    fn claimed_blocks_return_at_their_addresses_and_misfits_lie_above_the_extent() {
        let arena = arena(1 << 20);
        arena.begin_claims();
        let places: Vec<_> =
            [512, 256, 256].map(|bytes| Tensor::in_arena(&arena, shape(bytes), DType::U8).unwrap()).into();
        let claims = arena.end_claims();
        let extent = arena.stats().extent_bytes;
        arena.begin_forward(extent).unwrap();
        arena.serve_claims(&claims);
        let first = Tensor::in_arena(&arena, shape(300), DType::U8).unwrap();
        let too_big = Tensor::in_arena(&arena, shape(1000), DType::U8).unwrap();
        let third = Tensor::in_arena(&arena, shape(256), DType::U8).unwrap();
        arena.end_serving();
        assert_eq!((first.ptr, third.ptr), (places[0].ptr, places[2].ptr));
        assert!(too_big.ptr >= arena.base().offset_bytes(extent));
    }

    #[test]
    fn a_released_arena_gives_out_nothing_until_it_is_restored() {
        let arena = arena(1 << 20);
        let old = Tensor::in_arena(&arena, shape(100), DType::U8).unwrap();
        let mapped = arena.stats().mapped_bytes;
        arena.release();
        assert!(matches!(Tensor::in_arena(&arena, shape(1), DType::U8), Err(Error::Option { .. })));
        assert!(matches!(arena.begin_forward(0), Err(Error::Option { .. })));
        arena.0.device.host_control().unwrap().fail_calls_named("cuMemMap", 1);
        assert!(matches!(arena.restore(), Err(Error::OutOfMemory { .. })));
        assert!(matches!(arena.begin_forward(0), Err(Error::Option { .. })), "it is released as before");
        arena.restore().unwrap();
        assert_eq!(
            arena.stats(),
            ArenaStats { mapped_bytes: mapped, in_use_bytes: 0, extent_bytes: 0, ..arena.stats() }
        );
        assert_eq!(Tensor::in_arena(&arena, shape(100), DType::U8).unwrap().ptr, old.ptr);
    }

    #[test]
    fn blocks_freed_while_side_streams_run_are_kept_back() {
        let arena = arena(1 << 20);
        let a = Tensor::in_arena(&arena, shape(100), DType::U8).unwrap();
        let at = a.ptr;
        arena.set_keep_back(true);
        drop(a);
        assert_ne!(Tensor::in_arena(&arena, shape(100), DType::U8).unwrap().ptr, at);
        arena.set_keep_back(false);
        assert_eq!(Tensor::in_arena(&arena, shape(100), DType::U8).unwrap().ptr, at);
    }
}
