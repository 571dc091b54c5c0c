//! A sequence: tokens, and how far the KV cache holds them.

use std::fmt;
use std::sync::Arc;

use bcg_models::batch::Push;
use bcg_models::state::StateLease;

use super::ClientId;
use super::prefix_cache::SequencePages;
use super::roles::{DecodePlace, Destination};
use super::scheduler::ClientIdx;

/// Identity of a sequence; a later sequence has a greater one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

impl fmt::Display for SequenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Which steps take a sequence along.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Lane {
    /// Those of everybody.
    #[default]
    Open,
    /// Those of the sequences that are tried after a step failed.
    Trial,
    /// None, until it is tried.
    Bench,
}

/// Room for tokens of the answer that a sequence gets at once.
const ANSWER_TOKENS: usize = 256;

/// Tokens that the host knows: until the first of the answer, the prompt may be shared with other answers to it.
#[derive(Debug)]
enum Tokens {
    Shared(Arc<[u32]>),
    Own(Vec<u32>),
}

/// Prompt and answer of one request, as the scheduler sees them.
///
/// The host is behind the device: a step may run a token that an earlier step chose and nobody has read yet, but no token
/// after that.
///
/// Invariants: `launched <= len()`; its pages hold at least `launched` tokens; a waiting sequence has no pages.
#[derive(Debug)]
pub struct Sequence {
    /// Its identity.
    pub id: SequenceId,
    pub(super) client: ClientId,
    /// Where the scheduler knows its client.
    pub(super) client_idx: ClientIdx,
    /// Orders the waiting sequences of one client, greater ones first.
    pub(super) priority: i32,
    /// Whether it only asks if the engine works: then its turn comes before all others.
    pub(super) is_probe: bool,
    tokens: Tokens,
    pub(super) num_prompt: usize,
    /// Prompt and answer together have no more tokens.
    pub(super) max_len: usize,
    /// The tokens up to which its scheduler runs it: all, or in the prefill role those up to the first of the answer.
    pub(super) runs_to: usize,
    /// Whether the host must know a token before the next step can be prepared: for a grammar, or penalties.
    pub(super) waits_for_tokens: bool,
    /// Whether no step takes it along for now, because what its next token may be is not known yet.
    pub(super) is_held: bool,
    pub(super) lane: Lane,
    /// Tokens that the KV cache holds after the steps that were launched.
    pub(super) launched: usize,
    /// Tokens after `tokens` that launched steps choose and the host has not read.
    pub(super) unread: usize,
    /// The step that chooses, or chose, its newest token, by the number of its launch, and its row there.
    pub(super) chosen: Option<(u64, usize)>,
    /// Steps with it that were launched and are not collected.
    pub(super) under_way: usize,
    /// Tokens of the prompt that the prefix cache held when it first ran.
    pub(super) num_cached: Option<usize>,
    /// `None` while it waits.
    pub(super) pages: Option<SequencePages>,
    /// In the prefill role, where it will decode, while it runs and until it moves.
    pub(super) destination: Option<Arc<Destination>>,
    /// Tokens that launched steps pushed there.
    pub(super) pushed: usize,
    /// In the decode role, its place there.
    pub(super) place: Option<DecodePlace>,
}

impl Sequence {
    /// Makes a sequence of the default client that has not run yet and ends at `max_tokens` generated tokens.
    ///
    /// # Panics
    /// If `prompt` is empty.
    pub fn new(id: SequenceId, prompt: impl Into<Arc<[u32]>>, max_tokens: usize, waits_for_tokens: bool) -> Self {
        let prompt = prompt.into();
        assert!(!prompt.is_empty(), "a sequence has at least one token");
        let num_prompt = prompt.len();
        Self {
            id,
            client: ClientId::default(),
            client_idx: ClientIdx::default(),
            priority: 0,
            is_probe: false,
            tokens: Tokens::Shared(prompt),
            num_prompt,
            max_len: num_prompt.saturating_add(max_tokens),
            runs_to: num_prompt.saturating_add(max_tokens),
            waits_for_tokens,
            is_held: false,
            lane: Lane::Open,
            launched: 0,
            unread: 0,
            chosen: None,
            under_way: 0,
            num_cached: None,
            pages: None,
            destination: None,
            pushed: 0,
            place: None,
        }
    }

    /// Says whose it is, and its priority among the sequences of that client.
    #[must_use]
    pub fn of(self, client: ClientId, priority: i32) -> Self {
        Self { client, priority, ..self }
    }

    /// Lets it take its turn before all others, because it only asks if the engine works.
    #[must_use]
    pub fn as_probe(self) -> Self {
        Self { is_probe: true, ..self }
    }

    /// Returns prompt and generated tokens, as far as the host knows them.
    pub fn tokens(&self) -> &[u32] {
        match &self.tokens {
            Tokens::Shared(prompt) => prompt,
            Tokens::Own(tokens) => tokens,
        }
    }

    /// Appends a token of the answer.
    pub(super) fn push(&mut self, token: u32) {
        match &mut self.tokens {
            Tokens::Shared(prompt) => {
                let mut tokens = Vec::with_capacity(prompt.len() + ANSWER_TOKENS);
                tokens.extend_from_slice(prompt);
                tokens.push(token);
                self.tokens = Tokens::Own(tokens);
            }
            Tokens::Own(tokens) => tokens.push(token),
        }
    }

    /// Returns the tokens of the answer that the host knows.
    pub fn generated(&self) -> &[u32] {
        &self.tokens()[self.num_prompt..]
    }

    /// Returns how many tokens the answer has, with those that the host has not read.
    pub fn num_generated(&self) -> usize {
        self.len() - self.num_prompt
    }

    /// Returns how many tokens of the prompt came from the prefix cache.
    pub fn num_cached(&self) -> usize {
        self.num_cached.unwrap_or(0)
    }

    /// Returns the number of its tokens, with those that the host has not read.
    pub fn len(&self) -> usize {
        self.tokens().len() + self.unread
    }

    /// Whether it has no tokens, which never happens.
    pub fn is_empty(&self) -> bool {
        self.tokens().is_empty()
    }

    /// Returns its state, for a model that has one.
    pub fn state(&self) -> Option<&StateLease> {
        self.pages.as_ref().and_then(SequencePages::state)
    }

    /// Returns the pages that hold its keys and values, in order.
    pub fn pages(&self) -> &[u32] {
        self.pages.as_ref().map_or(&[], SequencePages::pages)
    }

    /// Returns how many tokens must run before the next token is chosen.
    pub(super) fn pending(&self) -> usize {
        self.len() - self.launched
    }

    /// Whether it decodes in steps of this lane: its prompt has run, and it is neither at its end nor held.
    pub(super) fn is_decoding(&self, lane: Lane) -> bool {
        self.lane == lane && self.len() < self.max_len && !self.is_held && self.pending() <= 1
    }

    /// Whether a step of this lane could take it along: it is not at its end, it is not held, and what the host must know is
    /// known.
    pub(super) fn is_ready(&self, lane: Lane) -> bool {
        let unread_max = usize::from(!self.waits_for_tokens);
        self.lane == lane && self.len() < self.runs_to && !self.is_held && self.unread <= unread_max
    }

    /// In the prefill role, where the rows of its next step go.
    pub(super) fn goes_to(&self, ends_prompt: bool) -> Option<Push<'_>> {
        self.destination.as_ref().map(|destination| destination.push(self.pushed, ends_prompt))
    }

    /// Whether it goes on elsewhere when its scheduler is done with it.
    pub(super) fn moves(&self) -> bool {
        self.runs_to < self.max_len
    }

    /// Gives its pages up, to be computed again.
    pub(super) fn rewind(&mut self) -> Option<SequencePages> {
        (self.launched, self.chosen, self.pushed) = (0, None, 0);
        self.pages.take()
    }
}
