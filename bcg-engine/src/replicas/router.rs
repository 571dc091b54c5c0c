//! Which replica a submission goes to.
//!
//! The rule, for replicas that can serve:
//! 1. The *load* of a replica is what it has to do, counted in prompt tokens: of each answer that waits or runs the tokens of
//!    its prompt that no cache holds, until its first token comes, and [`ANSWER_TOKEN_COST`] for each token that it may
//!    have, of at most [`ANSWER_TOKENS_MAX`] tokens, until it ends.
//! 2. Loads up to a quarter above the least one count as equal; of a higher one the rest is its *excess*.
//! 3. The submission goes where excess and prompt tokens that are not cached there are least together; then where the load
//!    is least; then to the replica that was chosen least recently.
//!
//! So a prompt goes where its prefix is, unless that replica is so busy that the others would have computed the prefix anew
//! before it comes to it. A prefix that many share is then computed a second time, and both replicas have it. To weigh
//! cached tokens against load is Preble's idea (Srivatsa et al., 2024) and NVIDIA Dynamo's; to spare the cache while loads
//! differ little is that of SGLang's router, whose bounds are half as much again, and 64 requests.
//!
//! All prompts of a submission, and all answers to them, go to one replica.

use std::hash::RandomState;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::GenerationRequest;
use super::super::Prompt;
use super::record::{BlockName, PrefixRecord, block_names};

/// Prompt tokens that take the time of one token of an answer. Qwen3-8B on an H200 takes 0.023 ms for a token of a long
/// prompt, and 0.06 to 0.11 ms for a token of an answer among 64 to 256 of them.
const ANSWER_TOKEN_COST: usize = 4;

/// Tokens of an answer that count, at most. How long it gets is not known: `max_tokens` is an upper bound, which most
/// clients leave high.
const ANSWER_TOKENS_MAX: usize = 128;

/// The part of the least load by which loads may differ and still count as equal.
const EQUAL_LOAD_PART: usize = 4;

/// What a replica has to do.
#[derive(Debug, Default)]
pub(crate) struct Load {
    /// In prompt tokens.
    tokens: AtomicUsize,
    /// Answers that wait or run.
    answers: AtomicUsize,
}

impl Load {
    pub(crate) fn tokens(&self) -> usize {
        self.tokens.load(Ordering::Relaxed)
    }

    pub(crate) fn answers(&self) -> usize {
        self.answers.load(Ordering::Relaxed)
    }
}

/// The part of a replica's load that is one answer's; dropping it takes the part back.
#[derive(Debug)]
pub(crate) struct Ticket {
    load: Arc<Load>,
    prompt_tokens: usize,
    answer_tokens: usize,
}

impl Ticket {
    fn new(load: &Arc<Load>, prompt_tokens: usize, answer_tokens: usize) -> Self {
        load.tokens.fetch_add(prompt_tokens + answer_tokens, Ordering::Relaxed);
        load.answers.fetch_add(1, Ordering::Relaxed);
        Self { load: Arc::clone(load), prompt_tokens, answer_tokens }
    }

    /// The first token is there: its prompt is computed.
    pub(crate) fn begin(&mut self) {
        self.load.tokens.fetch_sub(std::mem::take(&mut self.prompt_tokens), Ordering::Relaxed);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.load.tokens.fetch_sub(self.prompt_tokens + self.answer_tokens, Ordering::Relaxed);
        self.load.answers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A request as a router sees it.
#[derive(Debug)]
pub(crate) struct Asked {
    blocks: Vec<BlockName>,
    prompt_tokens: usize,
    /// The load of one answer, without its prompt.
    answer_tokens: usize,
}

/// Whether a replica may be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Standing {
    /// It serves.
    Serves,
    /// It does not serve now, and may again: it is chosen where none serves.
    Ill,
    /// It was tried, and takes nothing.
    Refused,
}

/// A replica as a router sees it.
#[derive(Debug)]
struct Lane {
    load: Arc<Load>,
    record: PrefixRecord,
    /// When it was chosen last, counted in submissions.
    chosen: u64,
}

/// Chooses replicas.
#[derive(Debug)]
pub(crate) struct Router {
    lanes: Vec<Lane>,
    names: RandomState,
    clock: u64,
}

impl Router {
    /// Makes a router for replicas with prefix caches of these many tokens, and returns their loads.
    pub(crate) fn new(cache_tokens: &[usize]) -> (Self, Vec<Arc<Load>>) {
        let lane = |&tokens: &usize| Lane { load: Arc::default(), record: PrefixRecord::new(tokens), chosen: 0 };
        let lanes: Vec<Lane> = cache_tokens.iter().map(lane).collect();
        let loads = lanes.iter().map(|lane| Arc::clone(&lane.load)).collect();
        (Self { lanes, names: RandomState::new(), clock: 0 }, loads)
    }

    /// How blocks of prompts are named, so that this can be done before the router is locked.
    pub(crate) fn names(&self) -> RandomState {
        self.names.clone()
    }

    /// Chooses the replica for a submission with `n` answers to each request, and counts its load, a ticket for each answer.
    /// `None` if no replica is left.
    pub(crate) fn route(&mut self, asked: &[Asked], n: usize, standings: &[Standing]) -> Option<(usize, Vec<Ticket>)> {
        // What an ill replica held is lost, or will be.
        self.lanes
            .iter_mut()
            .zip(standings)
            .filter(|(_, standing)| **standing != Standing::Serves)
            .for_each(|(lane, _)| lane.record.clear());
        let best = standings.iter().copied().min().filter(|best| *best != Standing::Refused)?;
        let open = || self.lanes.iter().enumerate().filter(|(index, _)| standings[*index] == best);
        let least = open().map(|(_, lane)| lane.load.tokens()).min()?;
        let (index, _) = open().min_by_key(|(_, lane)| {
            let load = lane.load.tokens();
            let excess = load.saturating_sub(least + least / EQUAL_LOAD_PART);
            let new: usize = asked.iter().map(|asked| lane.new_tokens(asked) * n).sum();
            (excess.saturating_add(new), load, lane.chosen)
        })?;
        self.clock += 1;
        let lane = &mut self.lanes[index];
        lane.chosen = self.clock;
        let tickets = asked.iter().flat_map(|asked| {
            let new = lane.new_tokens(asked);
            std::iter::repeat_n((new, asked.answer_tokens), n)
        });
        let tickets = tickets.map(|(new, answer)| Ticket::new(&lane.load, new, answer)).collect();
        asked.iter().for_each(|asked| lane.record.note(&asked.blocks));
        Some((index, tickets))
    }

    /// Returns how many blocks it remembers, of all replicas.
    #[cfg(test)]
    pub(crate) fn num_remembered(&self) -> usize {
        self.lanes.iter().map(|lane| lane.record.len()).sum()
    }

    /// Forgets what the prefix caches hold.
    pub(crate) fn forget(&mut self) {
        self.lanes.iter_mut().for_each(|lane| lane.record.clear());
    }
}

impl Lane {
    /// Tokens of a prompt that this replica would have to compute.
    fn new_tokens(&self, asked: &Asked) -> usize {
        asked.prompt_tokens - self.record.cached_tokens(&asked.blocks, asked.prompt_tokens)
    }
}

impl Asked {
    /// Describes a request whose prompt is token ids.
    pub(crate) fn new(names: &RandomState, request: &GenerationRequest) -> Self {
        let prompt = match &request.prompt {
            Prompt::Tokens(tokens) => tokens.as_slice(),
            Prompt::Text(_) | Prompt::Chat { .. } => &[],
        };
        let answer = request.max_tokens.unwrap_or(ANSWER_TOKENS_MAX).min(ANSWER_TOKENS_MAX);
        Self {
            blocks: block_names(names, prompt),
            prompt_tokens: prompt.len(),
            answer_tokens: answer * ANSWER_TOKEN_COST,
        }
    }
}
