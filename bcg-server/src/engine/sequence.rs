//! A sequence: tokens, and how many of them the KV cache holds.

use std::fmt;

use bcg_models::state::{PageLease, StateLease};

/// Identity of a sequence; a later sequence has a greater one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

impl fmt::Display for SequenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Prompt and answer of one request, as the scheduler sees them.
///
/// Invariants: `computed < tokens.len()`; its pages hold at least `computed` tokens; a waiting sequence has no pages.
#[derive(Debug)]
pub struct Sequence {
    /// Its identity.
    pub id: SequenceId,
    pub(super) tokens: Vec<u32>,
    pub(super) num_prompt: usize,
    pub(super) computed: usize,
    /// `None` while it waits.
    pub(super) lease: Option<PageLease>,
}

impl Sequence {
    /// Makes a sequence that has not run yet.
    ///
    /// # Panics
    /// If `prompt` is empty.
    pub fn new(id: SequenceId, prompt: Vec<u32>) -> Self {
        assert!(!prompt.is_empty(), "a sequence has at least one token");
        let num_prompt = prompt.len();
        Self { id, tokens: prompt, num_prompt, computed: 0, lease: None }
    }

    /// Returns prompt and generated tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Returns how many tokens were generated.
    pub fn num_generated(&self) -> usize {
        self.tokens.len() - self.num_prompt
    }

    /// Returns how many tokens the KV cache holds.
    pub fn computed(&self) -> usize {
        self.computed
    }

    /// Returns its state, for a model that has one.
    pub fn state(&self) -> Option<&StateLease> {
        self.lease.as_ref().and_then(PageLease::state)
    }

    /// Returns the pages that hold its keys and values, in order.
    pub fn pages(&self) -> &[u32] {
        self.lease.as_ref().map_or(&[], PageLease::pages)
    }

    /// Returns how many tokens must run before the next token is known.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether only the newest token has to run.
    pub fn is_decoding(&self) -> bool {
        self.pending() == 1 && self.computed > 0
    }
}
