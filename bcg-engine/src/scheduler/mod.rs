//! Continuous batching as a pure rule: which sequences run next, on which pages.
//!
//! A step takes the newest token of every running sequence, then fills its budget of tokens with prompts: those that are
//! under way first, then waiting ones in their turn (`queue`). A long prompt is prefilled in chunks, beside the decodes
//! of others. When pages run out, a sequence gives its pages back and is computed again later, from what the prefix cache
//! still has of it: the newest of the client that runs the most.
//!
//! Clients share fairly what is scarce (max-min: nobody gets more by taking it from one who has less):
//! - the tokens of a step: each client with prompts gets its part of the budget, and what one leaves goes to the others;
//!   where their part is all that some ask for, the others wait for one step, so that short prompts run in a short step;
//! - the places among those that run: where all are taken, or all pages, the client that runs the most lets its newest
//!   sequence give way to one that runs at least two fewer.
//!
//! This ends. Each time a sequence gives way to another client's, the sum of the squares of what clients run falls: from
//! `m` and `w`, with `m >= w + 2`, to `m - 1` and `w + 1`. So it cannot go back and forth, and only an end or an arrival
//! lets it go on. And the oldest running sequence never gives way, neither to a client nor for pages: whoever does is the
//! newest of a client that runs at least two, or runs beside others that are older. So the oldest advances in every
//! other step at least, once it is ready, until it ends or an older one runs again, of which there are finitely many.
//!
//! Steps overlap: the next one is planned while the last one runs, so a sequence's newest token may be known to the device
//! only. [`Scheduler::launch`] notes that a plan was enqueued, [`Scheduler::collect`] what it chose.
//!
//! With a pipeline of S stages, S steps are under way at once, and those that decode are spread over S steps in turn
//! (*micro-batches*): a step takes a part of them, those whose turn was the longest ago, and none of whom a token is on its
//! way in one of the S - 1 steps before. If there is nothing else to run, such a token is taken all the same, by the next
//! step, which then waits for it on the device, as without a pipeline. The chunks of a prompt follow each other in steps
//! that follow each other.
//!
//! Invariants, checked by [`Scheduler::check`]:
//! - no page is written by two sequences, and none is lost (kept by [`PrefixCache`]);
//! - running sequences stand in order of arrival, waiting ones in their clients' order;
//! - a step has at most `chunked_prefill_size` tokens, and at most `max_running_requests` sequences run;
//! - a running sequence that is ready decodes in every step, or, with S stages, in one of S: the tokens of prompts never
//!   hold it up.
//!
//! Called by [`super::worker`] only. It never sees text, channels or devices.

use bcg_models::ChosenToken;

use super::prefix_cache::PrefixCache;
use super::roles::DecodeRoom;
use super::sequence::{Lane, Sequence, SequenceId};
use queue::FairQueue;

pub(crate) use queue::ClientIdx;

mod moves;
mod queue;

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
    /// The last of them, if the host has not read it: where it is chosen.
    pub chosen: Option<ChosenToken>,
    /// Whether its last token runs, so that the sampled token counts.
    pub samples: bool,
}

/// What runs next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepPlan {
    /// Whose step it is.
    pub lane: Lane,
    /// One entry for each sequence of the step.
    pub entries: Vec<StepEntry>,
    /// Sequences that left the queue for this step, including those that come back from a preemption.
    pub admitted: Vec<SequenceId>,
    /// Sequences that gave their pages back: for want of pages, or to let another client run.
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
    waiting: FairQueue,
    /// In order of arrival.
    running: Vec<Sequence>,
    cache: PrefixCache,
    newest: Option<SequenceId>,
    /// The stages of the model's pipeline.
    num_stages: usize,
    /// Steps that were launched.
    num_launched: u64,
    /// Those of them that are neither collected nor forgotten.
    num_under_way: usize,
    /// In the prefill role, where sequences go after the first token of their answers.
    room: Option<DecodeRoom>,
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
        let (waiting, running) = (FairQueue::default(), Vec::new());
        let (num_stages, num_launched, num_under_way) = (1, 0, 0);
        let (newest, room) = (None, None);
        Self { limits, waiting, running, cache, newest, num_stages, num_launched, num_under_way, room }
    }

    /// Spreads those that decode over as many steps as the model's pipeline has stages.
    #[must_use]
    pub fn with_stages(self, num_stages: usize) -> Self {
        Self { num_stages: num_stages.max(1), ..self }
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

    /// Queues a sequence after all others of its client and priority. It ends at the end of the context at the latest.
    ///
    /// # Panics
    /// If it leaves no room for one generated token, or is not newer than all before it.
    pub fn add(&mut self, mut sequence: Sequence) {
        assert!(sequence.tokens().len() < self.limits.context_length, "the context has room for one more token");
        let before = self.newest.replace(sequence.id);
        assert!(before < Some(sequence.id), "sequences arrive in order");
        sequence.max_len = sequence.max_len.min(self.limits.context_length);
        sequence.runs_to = match &self.room {
            Some(_) => sequence.max_len.min(sequence.num_prompt + 1),
            None => sequence.max_len,
        };
        self.waiting.push(sequence);
    }

    /// Returns how many sequences wait.
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Returns how many sequences run.
    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Returns who runs, in order of arrival.
    pub fn running_ids(&self) -> impl Iterator<Item = SequenceId> {
        self.running.iter().map(|sequence| sequence.id)
    }

    /// Returns how many pages sequences use.
    pub fn num_used_pages(&self) -> usize {
        self.cache.pool().num_pages() - self.cache.num_available()
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.len() == 0 && self.running.is_empty()
    }

    /// Returns a running sequence.
    pub fn running(&self, id: SequenceId) -> Option<&Sequence> {
        self.position(id).map(|at| &self.running[at])
    }

    /// Leaves a sequence out of all plans until it is released, or releases it. Steps that were launched with it go on.
    /// `false` if it is not known.
    pub fn set_held(&mut self, id: SequenceId, is_held: bool) -> bool {
        self.known(id).map(|sequence| sequence.is_held = is_held).is_some()
    }

    /// Returns the running sequences that are held, and how many tokens each has.
    pub fn held(&self) -> impl Iterator<Item = (SequenceId, usize)> {
        self.running.iter().filter(|sequence| sequence.is_held).map(|sequence| (sequence.id, sequence.len()))
    }

    /// Whether a sequence is known and not held.
    pub fn is_free(&mut self, id: SequenceId) -> bool {
        self.known(id).is_some_and(|sequence| !sequence.is_held)
    }

    /// Puts a sequence, if it is known, into another lane, from the next plan on.
    pub fn set_lane(&mut self, id: SequenceId, lane: Lane) {
        if let Some(sequence) = self.known(id) {
            sequence.lane = lane;
        }
    }

    /// Returns the lane of a sequence that is known.
    pub fn lane(&mut self, id: SequenceId) -> Option<Lane> {
        self.known(id).map(|sequence| sequence.lane)
    }

    /// Lets a sequence, if it is known, be computed again from the tokens that the host knows: the steps that were launched
    /// with it, and are not collected, never will be.
    pub fn rewind(&mut self, id: SequenceId) {
        if let Some(at) = self.position(id) {
            self.preempt(at);
        }
        if let Some(sequence) = self.waiting.get_mut(id) {
            (sequence.unread, sequence.under_way) = (0, 0);
        }
        self.leave_room(id);
    }

    /// Forgets all steps that were launched and are not collected: they never will be. Their sequences are to be
    /// [rewound](Self::rewind).
    pub fn forget_under_way(&mut self) {
        self.num_under_way = 0;
    }

    /// Decides what runs next and reserves its pages; `None` when there is nothing to do before the last step is collected.
    pub fn plan(&mut self) -> Option<StepPlan> {
        self.plan_lane(Lane::Open, true)
    }

    /// As [`plan`](Self::plan), for the sequences of one lane; if not `may_admit`, for those that run.
    pub fn plan_lane(&mut self, lane: Lane, may_admit: bool) -> Option<StepPlan> {
        let mut plan = StepPlan { lane, entries: Vec::new(), admitted: Vec::new(), preempted: self.make_room(lane) };
        let mut budget = self.limits.chunked_prefill_size;
        self.waiting.clear_demands();
        for sequence in self.running.iter().filter(|sequence| sequence.is_ready(lane) && sequence.pending() > 1) {
            self.waiting.add_demand(sequence.client_idx, sequence.pending());
        }
        self.take_decodes(false, &mut budget, &mut plan);
        // Who gave way for want of pages would only come back to give way again.
        if may_admit && plan.preempted.is_empty() {
            self.admit(&mut budget, &mut plan);
        }
        self.share_out(budget, &mut plan);
        if plan.entries.is_empty() && self.num_under_way <= 1 {
            self.take_decodes(true, &mut budget, &mut plan);
        }
        let is_empty = plan.entries.is_empty() && plan.preempted.is_empty() && plan.admitted.is_empty();
        (!is_empty).then_some(plan)
    }

    /// Takes those along whose turn it is to decode: those of whom no token is on its way in one of the steps that other
    /// stages have, unless they `may_wait` for it on the device, and of these no more than their part of all that decode.
    fn take_decodes(&self, may_wait: bool, budget: &mut usize, plan: &mut StepPlan) {
        let (lane, num_stages) = (plan.lane, self.num_stages);
        let turn = |sequence: &Sequence| (sequence.chosen.map(|(step, _)| step), sequence.id);
        let steps_since = |sequence: &Sequence| sequence.chosen.map_or(0, |(step, _)| self.num_launched - step);
        let is_free = |sequence: &Sequence| sequence.unread == 0 || steps_since(sequence) >= num_stages as u64;
        let is_next = |sequence: &&Sequence| {
            sequence.is_ready(lane) && sequence.pending() == 1 && (may_wait || is_free(sequence))
        };
        // Steps of a trial are not launched ahead.
        let last_turn = if num_stages > 1 && lane != Lane::Trial {
            let decoding = self.running.iter().filter(|sequence| sequence.is_decoding(lane)).count();
            let mut turns: Vec<_> = self.running.iter().filter(is_next).map(turn).collect();
            turns.sort_unstable();
            turns.truncate(decoding.div_ceil(num_stages));
            turns.last().copied()
        } else {
            None
        };
        for sequence in self.running.iter().filter(is_next) {
            if *budget > 0 && last_turn.is_none_or(|last| turn(sequence) <= last) {
                plan.entries.push(take_chunk(sequence, 1, self.num_launched));
                *budget -= 1;
            }
        }
    }

    /// Gives the prompts that are under way, and then those that begin, the tokens that are left in the step.
    fn share_out(&mut self, budget: usize, plan: &mut StepPlan) {
        self.waiting.share(budget);
        for sequence in &self.running {
            if sequence.is_ready(plan.lane) && sequence.pending() > 1 && !plan.admitted.contains(&sequence.id) {
                take_share(sequence, self.num_launched, &mut self.waiting, &mut plan.entries);
            }
        }
        for id in &plan.admitted {
            if let Ok(at) = self.running.binary_search_by_key(id, |sequence| sequence.id) {
                take_share(&self.running[at], self.num_launched, &mut self.waiting, &mut plan.entries);
            }
        }
    }

    /// Reserves the pages of the next tokens, the oldest sequence first, and returns who had to give way.
    fn make_room(&mut self, lane: Lane) -> Vec<SequenceId> {
        let mut preempted = Vec::new();
        let mut at = 0;
        while at < self.running.len() {
            let sequence = &mut self.running[at];
            let (ready, len) = (sequence.is_ready(lane), sequence.len());
            let has_room = match &mut sequence.pages {
                Some(pages) if ready => self.cache.reserve(pages, len),
                _ => true,
            };
            if has_room {
                at += 1;
                continue;
            }
            // It may be the one that asks: then the others that stand behind it ask next.
            let gives_way = self.newest_of_largest();
            preempted.push(self.preempt(gives_way));
            at -= usize::from(gives_way < at);
        }
        preempted
    }

    /// Where the newest sequence of the client that runs the most stands; of two such clients, that of the newer one.
    fn newest_of_largest(&self) -> usize {
        let most = self.waiting.most_running();
        let is_of_largest = |sequence: &Sequence| self.waiting.num_running(sequence.client_idx) == most;
        self.running.iter().rposition(is_of_largest).unwrap_or(0)
    }

    /// Lets a running sequence wait for its next turn, without pages.
    fn preempt(&mut self, at: usize) -> SequenceId {
        let mut sequence = self.running.remove(at);
        if let Some(pages) = sequence.rewind() {
            self.cache.release(pages);
        }
        let (id, client) = (sequence.id, sequence.client_idx);
        self.waiting.push(sequence);
        self.waiting.end(client);
        self.leave_room(id);
        id
    }

    /// Lets waiting sequences run, in their turn, as long as tokens and pages are left.
    fn admit(&mut self, budget: &mut usize, plan: &mut StepPlan) {
        loop {
            let Some((client, id)) = self.waiting.next(plan.lane, *budget) else { return };
            if !self.take_room(id) {
                return;
            }
            let is_full = self.running.len() == self.limits.max_running_requests;
            if is_full || !self.begin(id, plan) {
                self.leave_room(id);
                if !self.give_way(client, id, is_full, budget, plan) {
                    return;
                }
            }
        }
    }

    /// Lets a waiting sequence run; `false` if there are too few pages for it.
    fn begin(&mut self, id: SequenceId, plan: &mut StepPlan) -> bool {
        let Some(sequence) = self.waiting.get_mut(id) else { return false };
        // One token more than it has: a prefill that is preempted at its first decode step is wasted.
        let tokens = sequence.tokens();
        let Some(pages) = self.cache.claim(tokens, tokens.len() + 1) else { return false };
        // And one page for each of the others, which would soon take those of the newest.
        if self.cache.num_available() < self.running.len() {
            self.cache.release(pages);
            return false;
        }
        let cached = pages.num_shared_tokens(&self.cache);
        sequence.launched = cached;
        sequence.num_cached.get_or_insert(cached.min(sequence.num_prompt));
        sequence.pages = Some(pages);
        let Some(sequence) = self.waiting.begin(id) else { return false };
        self.waiting.add_demand(sequence.client_idx, sequence.pending());
        let at = self.running.partition_point(|running| running.id < id);
        self.running.insert(at, sequence);
        plan.admitted.push(id);
        true
    }

    /// Lets the newest sequence of the client that runs the most give way to a waiting one of another client, which runs at
    /// least two fewer; `false` if there is no such client. For want of pages, the other client must not hold fewer of
    /// them afterwards: nobody pushes many small sequences out with a large one.
    fn give_way(
        &mut self,
        client: ClientIdx,
        id: SequenceId,
        for_place: bool,
        budget: &mut usize,
        plan: &mut StepPlan,
    ) -> bool {
        if self.waiting.most_running() < self.waiting.num_running(client) + 2 {
            return false;
        }
        let at = self.newest_of_largest();
        let gives_way = &self.running[at];
        // One that was let in a moment ago does not go again.
        if plan.admitted.contains(&gives_way.id) {
            return false;
        }
        if !for_place {
            let len = self.waiting.get_mut(id).map_or(0, |sequence| sequence.tokens().len() + 1);
            let wanted = self.num_pages(client) + self.cache.pool().pages_for(len);
            if self.num_pages(gives_way.client_idx) < wanted + gives_way.pages().len() {
                return false;
            }
        }
        let (largest, id, pending) = (gives_way.client_idx, gives_way.id, gives_way.pending());
        if let Some(entry) = plan.entries.iter().position(|entry| entry.id == id) {
            plan.entries.remove(entry);
            *budget += 1;
        } else if gives_way.is_ready(plan.lane) && pending > 1 {
            self.waiting.take_demand(largest, pending);
        }
        self.preempt(at);
        plan.preempted.push(id);
        true
    }

    /// Pages of a client's running sequences, those that they share counted for each.
    fn num_pages(&self, client: ClientIdx) -> usize {
        let running = self.running.iter().filter(|sequence| sequence.client_idx == client);
        running.map(|sequence| sequence.pages().len()).sum()
    }

    /// Notes that a plan was enqueued.
    pub fn launch(&mut self, plan: &StepPlan) {
        for (row, entry) in plan.entries.iter().enumerate() {
            let Some(at) = self.position(entry.id) else { continue };
            let sequence = &mut self.running[at];
            sequence.launched += entry.num_tokens;
            sequence.under_way += 1;
            sequence.pushed = sequence.launched;
            if entry.samples {
                sequence.unread += 1;
                sequence.chosen = Some((self.num_launched, row));
            }
        }
        self.num_launched += 1;
        self.num_under_way += 1;
    }

    /// Records that a step ran: `tokens[i]` was chosen for `plan.entries[i]`. What it computed can be shared from now on.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn collect(&mut self, plan: &StepPlan, tokens: &[u32]) {
        assert_eq!(plan.entries.len(), tokens.len(), "one token for each entry of the step");
        self.num_under_way -= 1;
        for (entry, &token) in plan.entries.iter().zip(tokens) {
            let sequence = match self.position(entry.id) {
                Some(at) => &mut self.running[at],
                // Preempted since: its tokens stay true.
                None => match self.waiting.get_mut(entry.id) {
                    Some(sequence) => sequence,
                    None => continue,
                },
            };
            sequence.under_way -= 1;
            if entry.samples {
                sequence.unread -= 1;
                sequence.push(token);
            }
            if let Some(mut pages) = sequence.pages.take() {
                self.cache.publish(&mut pages, &sequence.tokens()[..entry.past_len + entry.num_tokens]);
                sequence.pages = Some(pages);
            }
        }
    }

    /// Forgets a sequence, waiting or running, and frees its pages.
    pub fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let Some(at) = self.position(id) else { return self.waiting.remove(id) };
        let mut sequence = self.running.remove(at);
        self.waiting.end(sequence.client_idx);
        if let Some(pages) = sequence.rewind() {
            self.cache.release(pages);
        }
        Some(sequence)
    }

    /// Takes all waiting sequences out, in order of arrival, for a scheduler that takes this one's place. Tokens that
    /// nobody has read are lost, and chosen again.
    pub fn take_waiting(&mut self) -> Vec<Sequence> {
        let mut ids: Vec<SequenceId> = self.waiting.iter().map(|sequence| sequence.id).collect();
        ids.sort_unstable();
        let mut waiting: Vec<Sequence> = ids.into_iter().filter_map(|id| self.waiting.remove(id)).collect();
        for sequence in &mut waiting {
            (sequence.unread, sequence.under_way, sequence.lane) = (0, 0, Lane::Open);
            sequence.destination = None;
        }
        waiting
    }

    fn known(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        match self.position(id) {
            Some(at) => Some(&mut self.running[at]),
            None => self.waiting.get_mut(id),
        }
    }

    fn position(&self, id: SequenceId) -> Option<usize> {
        self.running.binary_search_by_key(&id, |sequence| sequence.id).ok()
    }

    /// Checks the invariants named at the top of this module.
    ///
    /// # Panics
    /// Says which invariant is broken, and by whom.
    pub fn check(&self) {
        let is_sorted = self.running.is_sorted_by(|a, b| a.id < b.id);
        assert!(is_sorted, "running sequences stand in order of arrival");
        self.waiting.check(&self.running);
        assert!(self.running.len() <= self.limits.max_running_requests, "{} sequences run", self.running.len());
        for sequence in &self.running {
            let (id, len) = (sequence.id, sequence.len());
            assert!(sequence.launched <= len, "sequence {id} went too far");
            assert!(len <= sequence.max_len, "sequence {id} has {len} tokens");
            let room = sequence.pages().len() * self.cache.pool().page_size();
            assert!(sequence.launched <= room, "sequence {id} computed more than its pages hold");
        }
        for sequence in self.waiting.iter() {
            assert!(sequence.pages.is_none(), "sequence {} waits with pages", sequence.id);
            assert_eq!(sequence.launched, 0, "sequence {} waits with computed tokens", sequence.id);
        }
        self.cache.check(self.running.iter().filter_map(|sequence| sequence.pages.as_ref()));
    }
}

/// Lets a prompt run as far as its client's share of the step goes.
fn take_share(sequence: &Sequence, num_launched: u64, queue: &mut FairQueue, entries: &mut Vec<StepEntry>) {
    match queue.take_share(sequence.client_idx, sequence.pending()) {
        0 => {}
        num_tokens => entries.push(take_chunk(sequence, num_tokens, num_launched)),
    }
}

/// The next tokens of a sequence, in the step that is launched after `num_launched` others.
fn take_chunk(sequence: &Sequence, num_tokens: usize, num_launched: u64) -> StepEntry {
    let samples = num_tokens == sequence.pending();
    let chosen = sequence.chosen.filter(|_| samples && sequence.unread > 0);
    let chosen = chosen.map(|(step, row)| ChosenToken { steps_since: (num_launched - step) as usize - 1, row });
    StepEntry { id: sequence.id, past_len: sequence.launched, num_tokens, chosen, samples }
}

#[cfg(test)]
mod tests;
