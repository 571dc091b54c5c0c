//! Continuous batching as a pure rule: which sequences run next, on which pages.
//!
//! A step takes the newest token of every running sequence, then fills its budget of tokens with prompts: those that are
//! under way first, then waiting ones in order of arrival. A long prompt is prefilled in chunks, beside the decodes of
//! others. When pages run out, the newest sequence gives its pages back and is computed again later, from what the prefix
//! cache still has of it.
//!
//! Steps overlap: the next one is planned while the last one runs, so a sequence's newest token may be known to the device
//! only. [`Scheduler::launch`] notes that a plan was enqueued, [`Scheduler::collect`] what it chose.
//!
//! Invariants, checked by [`Scheduler::check`]:
//! - no page is written by two sequences, and none is lost (kept by [`PrefixCache`]);
//! - the oldest running sequence never gives its pages back, so it always advances, unless it is held, and every one ends;
//! - a step has at most `chunked_prefill_size` tokens, and at most `max_running_requests` sequences run;
//! - a running sequence that is ready decodes in every step: the tokens of prompts never hold it up.
//!
//! Called by [`super::worker`] only. It never sees text, channels or devices.

use std::collections::VecDeque;

use super::prefix_cache::PrefixCache;
use super::sequence::{Sequence, SequenceId};

/// The bounds of a scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that run together at most.
    pub max_running_requests: usize,
    /// Tokens in one step at most; no fewer than `max_running_requests`, so that all can decode.
    pub chunked_prefill_size: usize,
    /// Tokens in one sequence at most.
    pub context_length: usize,
}

/// What kind of step runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PlanKind {
    /// Prompts, or parts of them.
    Prefill,
    /// Prompts beside newest tokens.
    Mixed,
    /// The newest token of each running sequence.
    Decode,
}

impl PlanKind {
    /// Returns the kind's name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Mixed => "mixed",
            Self::Decode => "decode",
        }
    }
}

/// One sequence's part of a step: its next `num_tokens` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepEntry {
    /// Whose tokens.
    pub id: SequenceId,
    /// Tokens that the KV cache holds before.
    pub past_len: usize,
    /// How many, the one that the step before chooses included.
    pub num_tokens: usize,
    /// The row of the step before that chooses the last of them, if the host has not read it.
    pub chosen_row: Option<usize>,
    /// Whether its last token runs, so that the sampled token counts.
    pub samples: bool,
}

/// What runs next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepPlan {
    /// One entry for each sequence of the step.
    pub entries: Vec<StepEntry>,
    /// Sequences that left the queue for this step, including those that come back from a preemption.
    pub admitted: Vec<SequenceId>,
    /// Sequences that gave their pages back.
    pub preempted: Vec<SequenceId>,
}

impl StepPlan {
    /// Returns the number of tokens in the step.
    pub fn num_tokens(&self) -> usize {
        self.entries.iter().map(|entry| entry.num_tokens).sum()
    }

    /// Returns what kind of step it is.
    pub fn kind(&self) -> PlanKind {
        let decodes = self.entries.iter().filter(|entry| entry.num_tokens == 1).count();
        match decodes {
            0 => PlanKind::Prefill,
            all if all == self.entries.len() => PlanKind::Decode,
            _ => PlanKind::Mixed,
        }
    }
}

/// Waiting and running sequences, and the pages they share.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    cache: PrefixCache,
}

impl Scheduler {
    /// Makes a scheduler that hands out the pages of `cache`.
    ///
    /// # Panics
    /// If a limit is zero, a step cannot hold the newest tokens of all running sequences, or the cache cannot hold one
    /// sequence of the full context: then a sequence could wait for ever.
    pub fn new(limits: Limits, cache: PrefixCache) -> Self {
        let pool = cache.pool();
        assert!(limits.max_running_requests > 0, "at least one sequence runs");
        assert!(
            limits.chunked_prefill_size >= limits.max_running_requests,
            "a step holds the newest token of every sequence"
        );
        assert!(pool.pages_for(limits.context_length) <= pool.num_pages(), "the cache holds one full sequence");
        Self { limits, waiting: VecDeque::new(), running: Vec::new(), cache }
    }

    /// Returns the bounds.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Returns the pages.
    pub fn cache(&self) -> &PrefixCache {
        &self.cache
    }

    /// Empties the prefix cache of what no sequence uses, and returns how many pages that were.
    pub fn flush_cache(&mut self) -> usize {
        self.cache.flush()
    }

    /// Queues a sequence after all others. It ends at the end of the context at the latest.
    ///
    /// # Panics
    /// If it leaves no room for one generated token, or is not newer than those that are known.
    pub fn add(&mut self, mut sequence: Sequence) {
        assert!(sequence.tokens.len() < self.limits.context_length, "the context has room for one more token");
        let newest = self.waiting.back().into_iter().chain(self.running.last()).map(|known| known.id).max();
        assert!(newest < Some(sequence.id), "sequences arrive in order");
        sequence.max_len = sequence.max_len.min(self.limits.context_length);
        self.waiting.push_back(sequence);
    }

    /// Returns how many sequences wait.
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Returns how many sequences run.
    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Returns how many pages sequences use.
    pub fn num_used_pages(&self) -> usize {
        self.cache.pool().num_pages() - self.cache.num_available()
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Returns a running sequence.
    pub fn running(&self, id: SequenceId) -> Option<&Sequence> {
        self.position(id).map(|at| &self.running[at])
    }

    /// Leaves a sequence out of all plans until it is released, or releases it. Steps that were launched with it go on.
    /// `false` if it is not known.
    pub fn set_held(&mut self, id: SequenceId, is_held: bool) -> bool {
        let sequence = match self.position(id) {
            Some(at) => Some(&mut self.running[at]),
            None => self.waiting.iter_mut().find(|sequence| sequence.id == id),
        };
        sequence.map(|sequence| sequence.is_held = is_held).is_some()
    }

    /// Decides what runs next and reserves its pages; `None` when there is nothing to do before the last step is collected.
    pub fn plan(&mut self) -> Option<StepPlan> {
        let preempted = self.make_room();
        let mut budget = self.limits.chunked_prefill_size;
        let mut entries = Vec::new();
        for is_decode in [true, false] {
            for sequence in self.running.iter().filter(|sequence| sequence.is_ready()) {
                if budget > 0 && (sequence.pending() == 1) == is_decode {
                    entries.push(take_chunk(sequence, &mut budget));
                }
            }
        }
        // Who gave way would only come back to give way again.
        let admitted = if preempted.is_empty() { self.admit(&mut budget, &mut entries) } else { Vec::new() };
        if entries.is_empty() && preempted.is_empty() {
            return None;
        }
        Some(StepPlan { entries, admitted, preempted })
    }

    /// Reserves the pages of the next tokens, the oldest sequence first, and returns who had to give way.
    fn make_room(&mut self) -> Vec<SequenceId> {
        let mut preempted = Vec::new();
        let mut at = 0;
        while at < self.running.len() {
            let sequence = &mut self.running[at];
            let (ready, len) = (sequence.is_ready(), sequence.len());
            let has_room = match &mut sequence.pages {
                Some(pages) if ready => self.cache.reserve(pages, len),
                _ => true,
            };
            if has_room {
                at += 1;
            } else {
                // The newest gives way, even if it is the one that asks; the loop then ends.
                preempted.extend(self.preempt_newest());
            }
        }
        preempted
    }

    fn preempt_newest(&mut self) -> Option<SequenceId> {
        let mut sequence = self.running.pop()?;
        if let Some(pages) = sequence.rewind() {
            self.cache.release(pages);
        }
        let id = sequence.id;
        let at = self.waiting.partition_point(|waiting| waiting.id < id);
        self.waiting.insert(at, sequence);
        Some(id)
    }

    /// Lets waiting sequences run, in order of arrival, as long as tokens and pages are left.
    fn admit(&mut self, budget: &mut usize, entries: &mut Vec<StepEntry>) -> Vec<SequenceId> {
        let mut admitted = Vec::new();
        while *budget > 0 && self.running.len() < self.limits.max_running_requests {
            // One that is held lets those behind it pass.
            let Some(at) = self.waiting.iter().position(|sequence| !sequence.is_held) else { break };
            let sequence = &mut self.waiting[at];
            if sequence.unread > 0 {
                break;
            }
            // One token more than it has: a prefill that is preempted at its first decode step is wasted.
            let Some(pages) = self.cache.claim(&sequence.tokens, sequence.tokens.len() + 1) else { break };
            // And one page for each of the others, which would soon take those of the newest.
            if self.cache.num_available() < self.running.len() {
                self.cache.release(pages);
                break;
            }
            let cached = pages.num_shared_tokens(&self.cache);
            sequence.launched = cached;
            sequence.num_cached.get_or_insert(cached.min(sequence.num_prompt));
            sequence.pages = Some(pages);
            entries.push(take_chunk(sequence, budget));
            admitted.push(sequence.id);
            let id = sequence.id;
            let at_running = self.running.partition_point(|running| running.id < id);
            if let Some(sequence) = self.waiting.remove(at) {
                self.running.insert(at_running, sequence);
            }
        }
        admitted
    }

    /// Notes that a plan was enqueued.
    pub fn launch(&mut self, plan: &StepPlan) {
        // Rows name the step launched last, and that is now this one.
        self.running.iter_mut().for_each(|sequence| sequence.row = None);
        for (row, entry) in plan.entries.iter().enumerate() {
            let Some(at) = self.position(entry.id) else { continue };
            let sequence = &mut self.running[at];
            sequence.launched += entry.num_tokens;
            if entry.samples {
                sequence.unread += 1;
                sequence.row = Some(row);
            }
        }
    }

    /// Records that a step ran: `tokens[i]` was chosen for `plan.entries[i]`. What it computed can be shared from now on.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn collect(&mut self, plan: &StepPlan, tokens: &[u32]) {
        assert_eq!(plan.entries.len(), tokens.len(), "one token for each entry of the step");
        for (entry, &token) in plan.entries.iter().zip(tokens) {
            let at = self.position(entry.id);
            let sequence = match at {
                Some(at) => &mut self.running[at],
                // Preempted since: its tokens stay true.
                None => match self.waiting.iter_mut().find(|sequence| sequence.id == entry.id) {
                    Some(sequence) => sequence,
                    None => continue,
                },
            };
            if entry.samples {
                sequence.unread -= 1;
                sequence.tokens.push(token);
            }
            if let Some(pages) = &mut sequence.pages {
                self.cache.publish(pages, &sequence.tokens[..entry.past_len + entry.num_tokens]);
            }
        }
    }

    /// Forgets a sequence, waiting or running, and frees its pages.
    pub fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let mut sequence = match self.position(id) {
            Some(at) => self.running.remove(at),
            None => {
                let at = self.waiting.iter().position(|sequence| sequence.id == id)?;
                self.waiting.remove(at)?
            }
        };
        if let Some(pages) = sequence.rewind() {
            self.cache.release(pages);
        }
        Some(sequence)
    }

    /// Takes all waiting sequences out, for a scheduler that takes this one's place. Tokens that nobody has read are lost, and
    /// chosen again.
    pub fn take_waiting(&mut self) -> Vec<Sequence> {
        let mut waiting: Vec<Sequence> = self.waiting.drain(..).collect();
        waiting.iter_mut().for_each(|sequence| sequence.unread = 0);
        waiting
    }

    fn position(&self, id: SequenceId) -> Option<usize> {
        self.running.binary_search_by_key(&id, |sequence| sequence.id).ok()
    }

    /// Checks the invariants named at the top of this module.
    ///
    /// # Panics
    /// Says which invariant is broken, and by whom.
    pub fn check(&self) {
        for (what, ids) in [
            ("running", self.running.iter().map(|sequence| sequence.id).collect::<Vec<_>>()),
            ("waiting", self.waiting.iter().map(|sequence| sequence.id).collect()),
        ] {
            assert!(ids.is_sorted_by(|a, b| a < b), "{what} sequences out of order: {ids:?}");
        }
        assert!(self.running.len() <= self.limits.max_running_requests, "{} sequences run", self.running.len());
        for sequence in &self.running {
            let (id, len) = (sequence.id, sequence.len());
            assert!(sequence.launched <= len, "sequence {id} went too far");
            assert!(len <= sequence.max_len, "sequence {id} has {len} tokens");
            let room = sequence.pages().len() * self.cache.pool().page_size();
            assert!(sequence.launched <= room, "sequence {id} computed more than its pages hold");
        }
        for sequence in &self.waiting {
            assert!(sequence.pages.is_none(), "sequence {} waits with pages", sequence.id);
            assert_eq!(sequence.launched, 0, "sequence {} waits with computed tokens", sequence.id);
        }
        self.cache.check(self.running.iter().filter_map(|sequence| sequence.pages.as_ref()));
    }
}

fn take_chunk(sequence: &Sequence, budget: &mut usize) -> StepEntry {
    let pending = sequence.pending();
    let num_tokens = pending.min(*budget);
    *budget -= num_tokens;
    let samples = num_tokens == pending;
    let chosen_row = if samples && sequence.unread > 0 { sequence.row } else { None };
    StepEntry { id: sequence.id, past_len: sequence.launched, num_tokens, chosen_row, samples }
}

#[cfg(test)]
mod tests;
