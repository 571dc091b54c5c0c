//! Room in the decode role for a sequence that the prefill role runs: taken before its prompt begins, so that what is
//! pushed has a place, and a sequence that moves can run at once.
//!
//! One thread, that of the prefill role, takes room; the decode role gives it back. Nothing waits in a circle: only running
//! sequences have room; they are prefilled whatever others do, move, and run until they end or are preempted for want of
//! pages. While a preempted one waits for pages no room is taken, so all pages come back to it in the end.
//!
//! The two roles' work is not ordered on their devices. So a page that one of them gives up is the other's only once the
//! steps that may still write it have ended: [`PagePool::lease_settled`] for what the decode role gives up, and the steps
//! under way of the prefill role hold a handle of each destination that they push to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bcg_models::batch::Push;
use bcg_models::state::{PageLease, PagePool};

/// What the decode role has room for. All clones share it.
#[derive(Debug, Clone)]
pub struct DecodeRoom {
    pool: PagePool,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Places that are free among those that run.
    places: AtomicUsize,
    num_places: usize,
    /// Whether a sequence that ran there waits for pages.
    is_short: AtomicBool,
    /// Whether the prefill role asked for room in vain.
    is_wanted: AtomicBool,
}

/// The place of a sequence among those that run in the decode role; given back when it drops.
#[derive(Debug)]
pub struct DecodePlace(Arc<Shared>);

impl Drop for DecodePlace {
    fn drop(&mut self) {
        self.0.places.fetch_add(1, Ordering::SeqCst);
    }
}

/// Where a sequence will decode: pages and a state slot, and a place.
#[derive(Debug)]
pub struct Destination {
    pub(crate) lease: PageLease,
    pub(crate) place: DecodePlace,
}

impl Destination {
    /// Where a step's rows go, from token `from` on, and the state, if the step ends the prompt.
    pub(crate) fn push(&self, from: usize, ends_prompt: bool) -> Push<'_> {
        let state = self.lease.state().filter(|_| ends_prompt).map(|state| state.slots(0).1);
        Push { pages: self.lease.pages(), from, state }
    }
}

impl DecodeRoom {
    /// The room of a decode role with these pages, where so many sequences can run.
    pub fn new(pool: PagePool, num_places: usize) -> Self {
        let (is_short, is_wanted) = (AtomicBool::new(false), AtomicBool::new(false));
        let shared = Shared { places: AtomicUsize::new(num_places), num_places, is_short, is_wanted };
        Self { pool, shared: Arc::new(shared) }
    }

    /// Takes room for a sequence of `tokens` tokens; `None` if there is none yet.
    pub(crate) fn take(&self, tokens: usize) -> Option<Arc<Destination>> {
        self.try_take(tokens).or_else(|| {
            self.shared.is_wanted.store(true, Ordering::SeqCst);
            // What came back before that is seen now, and what comes back later is told.
            self.try_take(tokens)
        })
    }

    fn try_take(&self, tokens: usize) -> Option<Arc<Destination>> {
        let shared = &self.shared;
        let free = shared.places.load(Ordering::SeqCst);
        let pages = self.pool.pages_for(tokens);
        // One page for each of the others, which would soon take those of the newest.
        let has_room = free > 0 && self.pool.num_free() >= pages + (shared.num_places - free);
        if shared.is_short.load(Ordering::SeqCst) || !has_room {
            return None;
        }
        let lease = self.pool.lease_settled(pages)?;
        shared.places.fetch_sub(1, Ordering::SeqCst);
        Some(Arc::new(Destination { lease, place: DecodePlace(Arc::clone(shared)) }))
    }

    /// Notes that the decode role launches its step of this number.
    pub(crate) fn launching(&self, number: u64) {
        self.pool.launching(number);
    }

    /// Notes that its steps up to this number have ended.
    pub(crate) fn ended(&self, number: u64) {
        self.pool.ended(number);
    }

    /// Says whether a sequence of the decode role waits for pages, and returns whether the prefill role waits for room.
    pub(crate) fn update(&self, is_short: bool) -> bool {
        self.shared.is_short.store(is_short, Ordering::SeqCst);
        !is_short && self.shared.is_wanted.swap(false, Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_pages_and_a_place_and_leaves_a_page_to_each_of_the_others() {
        let room = DecodeRoom::new(PagePool::new(8, 4), 3);
        let first = room.take(16).expect("four of eight pages");
        assert!(room.take(16).is_none(), "a page stays for the first");
        assert!(room.update(false) && !room.update(false), "it was wanted");
        let second = room.take(12).expect("three of four pages");
        assert!(room.take(1).is_none(), "two pages would have to stay");
        drop(first);
        let others = [(); 2].map(|()| room.take(1).expect("two places are free"));
        assert!(room.take(1).is_none(), "no place");
        drop((second, others));
        assert!(room.take(32).is_some(), "all pages");
    }

    #[test]
    fn nobody_gets_room_while_a_preempted_sequence_waits() {
        let room = DecodeRoom::new(PagePool::new(8, 4), 3);
        assert!(!room.update(true));
        assert!(room.take(1).is_none());
        assert!(!room.update(true), "still short");
        assert!(room.update(false), "now there may be room");
        assert!(room.take(1).is_some());
    }

    #[test]
    fn a_state_goes_where_the_decode_role_reads_it() {
        let room = DecodeRoom::new(PagePool::with_states(8, 4, 3), 3);
        let destination = room.take(5).expect("room");
        assert_eq!(destination.push(2, false).state, None);
        let push = destination.push(2, true);
        assert_eq!((push.pages, push.from, push.state), (&[0, 1][..], 2, Some(1)));
        let state = destination.lease.state().expect("a state");
        state.commit(4);
        assert_eq!(state.slots(4).0, Some(1));
    }
}
