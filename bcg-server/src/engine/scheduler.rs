//! Continuous batching as a pure rule: which sequences run next, on which pages.
//!
//! Prefill goes first: sequences that still have prompt to run, then waiting ones in order of arrival, up to the
//! token budget of a step. When there is none, all running sequences decode together. When pages run out, the newest
//! sequence gives its pages back and is computed again later.
//!
//! Invariants, checked by [`Scheduler::check`]:
//! - no page belongs to two sequences, and none is lost (kept by [`PagePool`]'s leases);
//! - every running sequence is older than every waiting one, so the oldest always advances and every sequence ends;
//! - a step has at most `max_batch_tokens` tokens, and at most `max_running` sequences run.
//!
//! Called by [`super::worker`] only. It never sees text, channels or devices.

use std::collections::VecDeque;

use bcg_models::state::PagePool;

use super::sequence::{Sequence, SequenceId};

/// The bounds of a scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that run together at most.
    pub max_running: usize,
    /// Tokens in one step at most.
    pub max_batch_tokens: usize,
    /// Tokens in one sequence at most.
    pub context_length: usize,
}

/// What kind of step runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Prompts, or parts of them.
    Prefill,
    /// The newest token of each running sequence.
    Decode,
}

impl Phase {
    /// Returns the phase's name in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// One sequence's part of a step: its next `num_tokens` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepEntry {
    /// Whose tokens.
    pub id: SequenceId,
    /// How many.
    pub num_tokens: usize,
    /// Whether its last token runs, so that the sampled token counts.
    pub samples: bool,
}

/// What runs next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepPlan {
    /// Prefill or decode.
    pub phase: Phase,
    /// Sequences in order of age.
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
}

/// Waiting and running sequences, and the pages they share.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    pool: PagePool,
}

impl Scheduler {
    /// Makes a scheduler that hands out the pages of `pool`.
    ///
    /// # Panics
    /// If a limit is zero, or the pool cannot hold one sequence of the full context: then the oldest sequence could
    /// wait for pages for ever.
    pub fn new(limits: Limits, pool: PagePool) -> Self {
        assert!(limits.max_running > 0, "at least one sequence runs");
        assert!(limits.max_batch_tokens > 0, "a step has at least one token");
        assert!(pool.pages_for(limits.context_length) <= pool.num_pages(), "the cache holds one full sequence");
        Self { limits, waiting: VecDeque::new(), running: Vec::new(), pool }
    }

    /// Returns the bounds.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Queues a sequence behind all others.
    ///
    /// # Panics
    /// If it leaves no room for one generated token, or is not newer than those that are known.
    pub fn add(&mut self, sequence: Sequence) {
        assert!(sequence.tokens.len() < self.limits.context_length, "the context has room for one more token");
        let newest = self.waiting.back().or(self.running.last()).map(|known| known.id);
        assert!(newest < Some(sequence.id), "sequences arrive in order");
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

    /// Returns how many pages there are.
    pub fn num_pages(&self) -> usize {
        self.pool.num_pages()
    }

    /// Returns how many pages are in use.
    pub fn num_used_pages(&self) -> usize {
        self.pool.num_pages() - self.pool.num_free()
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Returns a running sequence.
    pub fn running(&self, id: SequenceId) -> Option<&Sequence> {
        self.position(id).map(|at| &self.running[at])
    }

    /// Decides what runs next and reserves its pages; `None` when there is nothing to do.
    pub fn plan(&mut self) -> Option<StepPlan> {
        self.plan_prefill().or_else(|| self.plan_decode())
    }

    fn plan_prefill(&mut self) -> Option<StepPlan> {
        let mut budget = self.limits.max_batch_tokens;
        let mut entries = Vec::new();
        for sequence in self.running.iter().filter(|sequence| !sequence.is_decoding()) {
            if budget > 0 {
                entries.push(take_chunk(sequence, &mut budget));
            }
        }
        let mut admitted = Vec::new();
        while budget > 0 && self.running.len() < self.limits.max_running {
            let Some(mut sequence) = self.waiting.pop_front() else { break };
            // One token more than it has: a prefill that is preempted at its first decode step is wasted.
            let Ok(lease) = self.pool.lease(self.pool.pages_for(sequence.tokens.len() + 1)) else {
                self.waiting.push_front(sequence);
                break;
            };
            sequence.lease = Some(lease);
            entries.push(take_chunk(&sequence, &mut budget));
            admitted.push(sequence.id);
            self.running.push(sequence);
        }
        if entries.is_empty() {
            return None;
        }
        Some(StepPlan { phase: Phase::Prefill, entries, admitted, preempted: Vec::new() })
    }

    fn plan_decode(&mut self) -> Option<StepPlan> {
        let mut preempted = Vec::new();
        let mut at = 0;
        while at < self.running.len() {
            let Sequence { tokens, lease, .. } = &mut self.running[at];
            if lease.as_mut().is_some_and(|lease| lease.reserve_tokens(tokens.len()).is_ok()) {
                at += 1;
            } else {
                // The newest gives way, even if it is the one that asks; the loop then ends.
                preempted.extend(self.preempt_newest());
            }
        }
        let mut budget = self.limits.max_batch_tokens;
        let entries: Vec<StepEntry> =
            self.running.iter().take(budget).map(|sequence| take_chunk(sequence, &mut budget)).collect();
        if entries.is_empty() {
            return None;
        }
        Some(StepPlan { phase: Phase::Decode, entries, admitted: Vec::new(), preempted })
    }

    fn preempt_newest(&mut self) -> Option<SequenceId> {
        let mut sequence = self.running.pop()?;
        sequence.lease = None;
        sequence.computed = 0;
        let id = sequence.id;
        self.waiting.push_front(sequence);
        Some(id)
    }

    /// Records that a step ran: `tokens[i]` was sampled for `plan.entries[i]`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn commit(&mut self, plan: &StepPlan, tokens: &[u32]) {
        assert_eq!(plan.entries.len(), tokens.len(), "one token for each entry of the step");
        for (entry, &token) in plan.entries.iter().zip(tokens) {
            let Some(at) = self.position(entry.id) else { continue };
            let sequence = &mut self.running[at];
            sequence.computed += entry.num_tokens;
            if entry.samples {
                sequence.tokens.push(token);
            }
        }
    }

    /// Forgets a sequence, waiting or running, and frees its pages.
    pub fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        if let Some(at) = self.position(id) {
            let mut sequence = self.running.remove(at);
            sequence.lease = None;
            return Some(sequence);
        }
        let at = self.waiting.iter().position(|sequence| sequence.id == id)?;
        self.waiting.remove(at)
    }

    fn position(&self, id: SequenceId) -> Option<usize> {
        self.running.binary_search_by_key(&id, |sequence| sequence.id).ok()
    }

    /// Checks the invariants named at the top of this module.
    ///
    /// # Panics
    /// Says which invariant is broken, and by whom.
    pub fn check(&self) {
        let ids: Vec<SequenceId> = self.running.iter().chain(&self.waiting).map(|sequence| sequence.id).collect();
        assert!(ids.is_sorted_by(|a, b| a < b), "sequences out of order: {ids:?}");
        assert!(self.running.len() <= self.limits.max_running, "{} sequences run", self.running.len());
        for sequence in &self.running {
            assert!(sequence.pending() > 0, "sequence {} has nothing to run", sequence.id);
            let room = sequence.pages().len() * self.pool.page_size();
            assert!(sequence.computed <= room, "sequence {} computed more than its pages hold", sequence.id);
        }
        for sequence in &self.waiting {
            assert!(sequence.lease.is_none(), "sequence {} waits with pages", sequence.id);
            assert_eq!(sequence.computed, 0, "sequence {} waits with computed tokens", sequence.id);
        }
        self.pool.check(self.running.iter().filter_map(|sequence| sequence.lease.as_ref()));
    }
}

fn take_chunk(sequence: &Sequence, budget: &mut usize) -> StepEntry {
    let pending = sequence.pending();
    let num_tokens = pending.min(*budget);
    *budget -= num_tokens;
    StepEntry { id: sequence.id, num_tokens, samples: num_tokens == pending }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scheduler(num_pages: usize, context_length: usize) -> Scheduler {
        let limits = Limits { max_running: 4, max_batch_tokens: 16, context_length };
        Scheduler::new(limits, PagePool::new(num_pages, 4))
    }

    fn sequence(id: u64, len: usize) -> Sequence {
        Sequence::new(SequenceId(id), vec![1; len])
    }

    fn step(scheduler: &mut Scheduler) -> Option<StepPlan> {
        let plan = scheduler.plan()?;
        scheduler.check();
        scheduler.commit(&plan, &vec![7; plan.entries.len()]);
        scheduler.check();
        Some(plan)
    }

    #[test]
    fn prefill_goes_first_then_all_decode_together() {
        let mut scheduler = scheduler(8, 32);
        scheduler.add(sequence(1, 3));
        scheduler.add(sequence(2, 5));
        let first = step(&mut scheduler).expect("work");
        assert_eq!((first.phase, first.entries.len(), first.num_tokens()), (Phase::Prefill, 2, 8));
        scheduler.add(sequence(3, 2));
        let second = step(&mut scheduler).expect("work");
        assert_eq!((second.phase, second.entries.len()), (Phase::Prefill, 1));
        let third = step(&mut scheduler).expect("work");
        assert_eq!((third.phase, third.entries.len(), third.num_tokens()), (Phase::Decode, 3, 3));
    }

    #[test]
    fn a_long_prompt_is_prefilled_in_chunks_and_samples_once() {
        let mut scheduler = scheduler(8, 32);
        scheduler.add(sequence(1, 20));
        let first = step(&mut scheduler).expect("work");
        assert_eq!((first.entries[0].num_tokens, first.entries[0].samples), (16, false));
        let second = step(&mut scheduler).expect("work");
        assert_eq!((second.phase, second.entries[0].num_tokens, second.entries[0].samples), (Phase::Prefill, 4, true));
        assert_eq!(scheduler.running(SequenceId(1)).expect("runs").num_generated(), 1);
    }

    #[test]
    fn the_newest_gives_its_pages_back_and_is_computed_again() {
        let mut scheduler = scheduler(4, 16);
        scheduler.add(sequence(1, 7));
        scheduler.add(sequence(2, 7));
        assert_eq!(step(&mut scheduler).expect("work").entries.len(), 2);
        assert!(step(&mut scheduler).expect("work").preempted.is_empty());
        let plan = step(&mut scheduler).expect("work");
        assert_eq!(plan.preempted, [SequenceId(2)]);
        assert_eq!(plan.entries.iter().map(|entry| entry.id).collect::<Vec<_>>(), [SequenceId(1)]);
        scheduler.remove(SequenceId(1)).expect("known");
        let again = step(&mut scheduler).expect("work");
        assert_eq!(
            (again.phase, again.admitted, again.entries[0].num_tokens),
            (Phase::Prefill, vec![SequenceId(2)], 9)
        );
    }

    #[test]
    fn removing_frees_the_pages_of_running_and_waiting() {
        let mut scheduler = scheduler(8, 32);
        scheduler.add(sequence(1, 8));
        step(&mut scheduler);
        scheduler.add(sequence(2, 8));
        assert!(scheduler.num_used_pages() > 0);
        assert!(scheduler.remove(SequenceId(1)).is_some());
        assert!(scheduler.remove(SequenceId(2)).is_some());
        assert!(scheduler.remove(SequenceId(2)).is_none());
        assert_eq!((scheduler.num_used_pages(), scheduler.is_idle()), (0, true));
    }

    #[test]
    fn arrival_order_is_kept_even_if_a_later_one_would_fit() {
        let mut scheduler = scheduler(9, 32);
        scheduler.add(sequence(1, 14));
        step(&mut scheduler);
        scheduler.add(sequence(2, 30));
        scheduler.add(sequence(3, 1));
        assert_eq!(step(&mut scheduler).expect("work").phase, Phase::Decode);
        assert_eq!(scheduler.num_waiting(), 2);
    }

    /// A small generator, so that the test needs no dependency and every seed is a name for its run.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: usize) -> usize {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((self.0 >> 33) as usize) % bound
        }
    }

    #[test]
    fn every_sequence_ends_and_no_page_is_owned_twice_in_random_runs() {
        for seed in 0..300 {
            let random = &mut Random(seed);
            let page_size = 1 + random.below(5);
            let context_length = 2 + random.below(30);
            let pool = PagePool::new(context_length.div_ceil(page_size) + random.below(12), page_size);
            let limits =
                Limits { context_length, max_running: 1 + random.below(5), max_batch_tokens: 1 + random.below(40) };
            run_random(seed, limits, pool, random);
        }
    }

    fn run_random(seed: u64, limits: Limits, pool: PagePool, random: &mut Random) {
        let mut scheduler = Scheduler::new(limits, pool);
        let total = 12;
        let (mut added, mut ended, mut steps) = (0, 0, 0);
        while ended < total {
            steps += 1;
            assert!(steps < 20_000, "seed {seed}: {ended} of {total} sequences ended");
            if added < total && (scheduler.is_idle() || random.below(3) == 0) {
                added += 1;
                scheduler.add(sequence(added, 1 + random.below(limits.context_length - 1)));
            }
            let Some(plan) = step(&mut scheduler) else {
                assert!(scheduler.is_idle(), "seed {seed}: work is left but nothing is planned");
                continue;
            };
            assert!(plan.num_tokens() <= limits.max_batch_tokens, "seed {seed}: step over budget");
            assert!(plan.entries.iter().all(|entry| entry.num_tokens > 0), "seed {seed}: empty entry");
            for entry in plan.entries.iter().filter(|entry| entry.samples) {
                let len = scheduler.running(entry.id).expect("ran").tokens().len();
                if len >= limits.context_length || random.below(12) == 0 {
                    scheduler.remove(entry.id).expect("known");
                    ended += 1;
                }
            }
            scheduler.check();
        }
        assert_eq!(scheduler.num_used_pages(), 0, "seed {seed}");
    }
}
