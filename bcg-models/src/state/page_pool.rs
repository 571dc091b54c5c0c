//! Who owns which page of the KV cache and, for models with state-space layers, which state slots.
//!
//! Invariants, checked by [`PagePool::check`]: a page or a pair of slots is either free or in exactly one lease; a
//! lease that drops gives them back. They are handed out lowest first, so that a run is reproducible.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::StateLease;
use crate::error::{Error, Result};

/// The allocator of KV pages and state slots. Cheap to clone: all clones share the pages.
///
/// # Example
/// ```
/// use bcg_models::state::PagePool;
/// let pool = PagePool::new(4, 16);
/// let mut lease = pool.lease(pool.pages_for(17))?;
/// assert_eq!(lease.pages(), [0, 1]);
/// assert!(pool.lease(3).is_err());
/// lease.grow(2)?;
/// assert_eq!(pool.num_free(), 0);
/// drop(lease);
/// assert_eq!(pool.num_free(), 4);
/// # Ok::<(), bcg_models::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct PagePool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    num_pages: usize,
    page_size: usize,
    /// Pairs of state slots; 0 for a model without states.
    num_states: usize,
    free: Mutex<Free>,
}

#[derive(Debug, Clone, Default)]
struct Free {
    pages: BTreeSet<u32>,
    states: BTreeSet<u32>,
    /// Of these, what was given back while steps were under way that may still use it, and how many were launched then.
    recent_pages: BTreeMap<u32, u64>,
    recent_states: BTreeMap<u32, u64>,
    /// Steps that were launched, and those that have ended, if the owner says.
    launched: u64,
    ended: u64,
}

impl Free {
    fn take_page(&mut self) -> Option<u32> {
        let page = self.pages.pop_first()?;
        self.recent_pages.remove(&page);
        Some(page)
    }

    fn take_state(&mut self) -> Option<u32> {
        let pair = self.states.pop_first()?;
        self.recent_states.remove(&pair);
        Some(pair)
    }

    fn give_back(&mut self, pages: impl Iterator<Item = u32>, state: Option<u32>) {
        for page in pages {
            self.pages.insert(page);
            if self.ended < self.launched {
                self.recent_pages.insert(page, self.launched);
            }
        }
        if let Some(pair) = state {
            self.states.insert(pair);
            if self.ended < self.launched {
                self.recent_states.insert(pair, self.launched);
            }
        }
    }
}

impl Shared {
    fn free(&self) -> MutexGuard<'_, Free> {
        // A panic cannot leave the sets half changed: every critical section is one call or plain removals.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PagePool {
    /// Makes a pool of `num_pages` free pages of `page_size` tokens, for a model without states.
    ///
    /// # Panics
    /// If `page_size` is zero, or there are more pages than an `i32` of a page table can name.
    pub fn new(num_pages: usize, page_size: usize) -> Self {
        Self::with_states(num_pages, page_size, 0)
    }

    /// Makes a pool that also has the states of `num_states` sequences, a pair of slots each: every lease then has one.
    ///
    /// # Panics
    /// As [`new`](Self::new).
    pub fn with_states(num_pages: usize, page_size: usize, num_states: usize) -> Self {
        assert!(page_size > 0, "a page holds at least one token");
        let numbers = |count: usize| (0..i32::try_from(count).expect("numbers fit an i32").cast_unsigned()).collect();
        let free = Free { pages: numbers(num_pages), states: numbers(num_states), ..Free::default() };
        let free = Mutex::new(free);
        Self { shared: Arc::new(Shared { num_pages, page_size, num_states, free }) }
    }

    /// Takes `count` pages and, where there are states, a pair of slots.
    ///
    /// # Errors
    /// [`Error::OutOfPages`], [`Error::OutOfStates`]; nothing was taken then.
    pub fn lease(&self, count: usize) -> Result<PageLease> {
        let mut lease = PageLease { shared: Arc::clone(&self.shared), pages: Vec::new(), state: None };
        if self.shared.num_states > 0 {
            let pair = self.shared.free().take_state();
            let pair = pair.ok_or(Error::OutOfStates { total: self.shared.num_states })?;
            lease.state = Some(StateLease::new(pair));
        }
        lease.grow(count)?;
        Ok(lease)
    }

    /// As [`lease`](Self::lease), for one whose work is not ordered behind the steps of the pool's owner: takes nothing that
    /// was given back while steps were under way that have not ended since. `None` if there is too little; nothing was taken
    /// then.
    pub fn lease_settled(&self, count: usize) -> Option<PageLease> {
        let mut free = self.shared.free();
        let settled = |free: &BTreeSet<u32>, recent: &BTreeMap<u32, u64>, count: usize| -> Vec<u32> {
            free.iter().copied().filter(|number| !recent.contains_key(number)).take(count).collect()
        };
        let pages = settled(&free.pages, &free.recent_pages, count);
        let state = settled(&free.states, &free.recent_states, 1).first().copied();
        if pages.len() < count || (self.shared.num_states > 0 && state.is_none()) {
            return None;
        }
        for page in &pages {
            free.pages.remove(page);
        }
        if let Some(pair) = &state {
            free.states.remove(pair);
        }
        Some(PageLease { shared: Arc::clone(&self.shared), pages, state: state.map(StateLease::new) })
    }

    /// Notes that the pool's owner launches its step of this number; numbers grow.
    pub fn launching(&self, number: u64) {
        self.shared.free().launched = number;
    }

    /// Notes that the step of this number has ended, and all before it.
    pub fn ended(&self, number: u64) {
        let mut free = self.shared.free();
        free.ended = number;
        free.recent_pages.retain(|_, launched| *launched > number);
        free.recent_states.retain(|_, launched| *launched > number);
    }

    /// Pages that `tokens` tokens need.
    pub fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.shared.page_size)
    }

    /// Tokens that a page holds.
    pub fn page_size(&self) -> usize {
        self.shared.page_size
    }

    /// Pages in all.
    pub fn num_pages(&self) -> usize {
        self.shared.num_pages
    }

    /// Pages that nobody holds.
    pub fn num_free(&self) -> usize {
        self.shared.free().pages.len()
    }

    /// Checks that every page and every state is free or in exactly one of `leases`, which must be all there are.
    ///
    /// # Panics
    /// If one is lost or has two owners.
    pub fn check<'a>(&self, leases: impl IntoIterator<Item = &'a PageLease>) {
        let mut seen = self.shared.free().clone();
        for lease in leases {
            assert!(Arc::ptr_eq(&lease.shared, &self.shared), "a lease of another pool");
            for &page in &lease.pages {
                assert!(seen.pages.insert(page), "page {page} has two owners");
            }
            if let Some(state) = &lease.state {
                assert!(seen.states.insert(state.pair()), "state {} has two owners", state.pair());
            }
        }
        assert_eq!(seen.pages.len(), self.num_pages(), "every page is free or leased");
        assert_eq!(seen.states.len(), self.shared.num_states, "every state is free or leased");
    }
}

/// Pages and state of one sequence, given back when this drops.
#[derive(Debug)]
pub struct PageLease {
    shared: Arc<Shared>,
    pages: Vec<u32>,
    state: Option<StateLease>,
}

impl PageLease {
    /// The pages, in the order of the sequence's tokens.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// The state, for a model that has one.
    pub fn state(&self) -> Option<&StateLease> {
        self.state.as_ref()
    }

    /// Takes `count` more pages, which follow those held.
    ///
    /// # Errors
    /// [`Error::OutOfPages`]; nothing was taken then.
    pub fn grow(&mut self, count: usize) -> Result<()> {
        let mut free = self.shared.free();
        if free.pages.len() < count {
            return Err(Error::OutOfPages { wanted: count, free: free.pages.len(), total: self.shared.num_pages });
        }
        self.pages.extend((0..count).filter_map(|_| free.take_page()));
        Ok(())
    }

    /// Moves the page at the front to a lease of its own, which has no state; `None` if there is no page.
    pub fn split_first(&mut self) -> Option<Self> {
        if self.pages.is_empty() {
            return None;
        }
        Some(Self { shared: Arc::clone(&self.shared), pages: vec![self.pages.remove(0)], state: None })
    }

    /// Takes as many pages as are missing until `tokens` tokens fit.
    ///
    /// # Errors
    /// As [`grow`](Self::grow).
    pub fn reserve_tokens(&mut self, tokens: usize) -> Result<()> {
        self.grow(tokens.div_ceil(self.shared.page_size).saturating_sub(self.pages.len()))
    }
}

impl Drop for PageLease {
    fn drop(&mut self) {
        let mut free = self.shared.free();
        free.give_back(self.pages.drain(..), self.state.take().map(|state| state.pair()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_lease_takes_nothing() {
        let pool = PagePool::new(3, 16);
        let mut lease = pool.lease(2).expect("two of three");
        let error = lease.grow(2).expect_err("one is left").to_string();
        assert_eq!(error, "KV cache is full: 2 page(s) wanted, 1 of 3 free");
        assert_eq!((lease.pages().len(), pool.num_free()), (2, 1));
    }

    #[test]
    fn each_lease_has_a_state_of_its_own_while_there_are_any() {
        let pool = PagePool::with_states(4, 16, 2);
        let leases = [pool.lease(1).expect("the first"), pool.lease(0).expect("the second")];
        pool.check(&leases);
        let error = pool.lease(1).expect_err("none is left").to_string();
        assert_eq!(error, "all 2 state slots are taken; raise max_running_requests, or wait until a sequence ends");
        assert_eq!(pool.num_free(), 3, "nothing was taken");
        drop(leases);
        pool.lease(5).expect_err("too many pages");
        pool.check(&[]);
        assert!(PagePool::new(4, 16).lease(1).expect("a page").state().is_none());
    }

    #[test]
    fn what_a_step_may_still_use_is_given_to_its_owner_only() {
        let pool = PagePool::with_states(3, 16, 2);
        let lease = pool.lease(2).expect("two of three");
        pool.launching(1);
        pool.launching(2);
        drop(lease);
        assert!(pool.lease_settled(2).is_none(), "one page was never used");
        let settled = pool.lease_settled(1).expect("that one");
        assert_eq!((settled.pages(), settled.state().map(StateLease::pair)), (&[2][..], Some(1)));
        pool.ended(1);
        assert!(pool.lease_settled(0).is_none(), "no state");
        let own = pool.lease(1).expect("the owner's steps follow each other");
        assert_eq!(own.pages(), [0]);
        drop(own);
        pool.ended(2);
        drop(settled);
        let all = pool.lease_settled(3).expect("nothing is under way");
        pool.check([&all]);
    }

    #[test]
    fn a_page_that_is_split_off_is_given_back_on_its_own() {
        let pool = PagePool::with_states(3, 16, 1);
        let mut lease = pool.lease(2).expect("two of three");
        let first = lease.split_first().expect("a page");
        assert_eq!((first.pages(), lease.pages(), first.state().is_none()), (&[0][..], &[1][..], true));
        pool.check([&first, &lease]);
        drop(lease);
        assert_eq!(pool.num_free(), 2);
        drop(first);
        pool.check(&[]);
        assert!(pool.lease(0).expect("no page").split_first().is_none());
    }

    #[test]
    fn tokens_are_rounded_up_to_pages() {
        let pool = PagePool::new(8, 16);
        let mut lease = pool.lease(0).expect("no page");
        for (tokens, pages) in [(1, 1), (16, 1), (17, 2), (5, 2), (64, 4)] {
            lease.reserve_tokens(tokens).expect("enough pages");
            assert_eq!(lease.pages().len(), pages, "{tokens} tokens");
        }
    }

    #[test]
    fn no_page_is_ever_owned_twice_or_lost() {
        let pool = PagePool::with_states(20, 4, 6);
        let mut leases: Vec<PageLease> = Vec::new();
        let mut state = 1_u64;
        for _ in 0..2000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (choice, amount) = ((state >> 33) % 4, (state >> 40) as usize % 6);
            match choice {
                0 => leases.extend(pool.lease(amount).ok()),
                1 if !leases.is_empty() => drop(leases.swap_remove(amount % leases.len())),
                _ => {
                    if let Some(lease) = leases.last_mut() {
                        let _ = lease.grow(amount);
                    }
                }
            }
            pool.check(&leases);
        }
        leases.clear();
        assert_eq!(pool.num_free(), 20);
    }
}
