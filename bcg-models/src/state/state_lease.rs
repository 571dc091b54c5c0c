//! The two state slots of one sequence, and which of them holds its state.
//!
//! A step reads the slot that holds the state and writes the other one; when the step succeeded, they change places. A
//! state stands for all tokens before it and cannot be turned back: a step that goes on anywhere else than where the
//! last one ended, or at token 0, is refused.

use std::sync::atomic::{AtomicUsize, Ordering};

/// The slots 2 n and 2 n + 1, which belong to one sequence.
#[derive(Debug)]
pub struct StateLease {
    pair: u32,
    /// Twice the tokens that the state stands for, plus which slot of the two holds it.
    held: AtomicUsize,
}

impl StateLease {
    /// The lease of pair `pair`, whose state stands for no token.
    pub(super) fn new(pair: u32) -> Self {
        Self { pair, held: AtomicUsize::new(0) }
    }

    pub(super) fn pair(&self) -> u32 {
        self.pair
    }

    /// The tokens that the state stands for.
    pub fn num_tokens(&self) -> usize {
        self.held.load(Ordering::Relaxed) / 2
    }

    /// The slot that a step after `past_len` tokens reads, none for the first tokens, and the slot that it writes.
    pub fn slots(&self, past_len: usize) -> (Option<u32>, u32) {
        let current = (self.held.load(Ordering::Relaxed) % 2) as u32;
        ((past_len > 0).then_some(2 * self.pair + current), 2 * self.pair + 1 - current)
    }

    /// Notes that a step succeeded: the slot that it wrote stands for `num_tokens` tokens.
    pub fn commit(&self, num_tokens: usize) {
        let current = self.held.load(Ordering::Relaxed) % 2;
        self.held.store(2 * num_tokens + 1 - current, Ordering::Relaxed);
    }

    /// Lets the state, whatever it holds, stand for `num_tokens` tokens: for those who time steps after a made-up past.
    pub fn assume(&self, num_tokens: usize) {
        let current = self.held.load(Ordering::Relaxed) % 2;
        self.held.store(2 * num_tokens + current, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_never_writes_the_slot_that_it_reads() {
        let lease = StateLease::new(3);
        assert_eq!((lease.slots(0), lease.num_tokens()), ((None, 7), 0));
        lease.commit(5);
        assert_eq!((lease.slots(5), lease.num_tokens()), ((Some(7), 6), 5));
        assert_eq!(lease.slots(0), (None, 6), "a sequence may begin again");
        lease.commit(6);
        assert_eq!((lease.slots(6), lease.num_tokens()), ((Some(6), 7), 6));
        lease.assume(100);
        assert_eq!((lease.slots(100), lease.num_tokens()), ((Some(6), 7), 100));
    }
}
