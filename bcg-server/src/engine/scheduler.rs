//! Continuous batching as a pure rule: which sequences run next, on which pages.
//!
//! A step takes the newest token of every running sequence, then fills its budget of tokens with prompts: those that are
//! under way first, then waiting ones in order of arrival. A long prompt is prefilled in chunks, beside the decodes of
//! others. When pages run out, the newest sequence gives its pages back and is computed again later, from what the prefix
//! cache still has of it.
//!
//! Steps overlap: the next one is planned while the last one runs, so a sequence's newest token may be known to the device
//! only. [`Scheduler::launch`] records that a plan was enqueued, [`Scheduler::collect`] what it chose.
//!
//! Invariants, checked by [`Scheduler::check`]:
//! - no page is written by two sequences, and none is lost (kept by [`PrefixCache`]);
//! - every running sequence is older than every waiting one, so the oldest always advances and every sequence ends;
//! - a step has at most `max_batch_tokens` tokens, and at most `max_running` sequences run;
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
    pub max_running: usize,
    /// Tokens in one step at most; no fewer than `max_running`, so that all can decode.
    pub max_batch_tokens: usize,
    /// Tokens in one sequence at most.
    pub context_length: usize,
}

/// What kind of step runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Prompts, or parts of them.
    Prefill,
    /// Prompts beside newest tokens.
    Mixed,
    /// The newest token of each running sequence.
    Decode,
}

impl Phase {
    /// Returns the phase's name in logs and metrics.
    pub fn as_str(self) -> &'static str {
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
    pub fn phase(&self) -> Phase {
        let decodes = self.entries.iter().filter(|entry| entry.num_tokens == 1).count();
        match decodes {
            0 => Phase::Prefill,
            all if all == self.entries.len() => Phase::Decode,
            _ => Phase::Mixed,
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
        assert!(limits.max_running > 0, "at least one sequence runs");
        assert!(limits.max_batch_tokens >= limits.max_running, "a step holds the newest token of every sequence");
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

    /// Queues a sequence behind all others. It ends at the end of the context at the latest.
    ///
    /// # Panics
    /// If it leaves no room for one generated token, or is not newer than those that are known.
    pub fn add(&mut self, mut sequence: Sequence) {
        assert!(sequence.tokens.len() < self.limits.context_length, "the context has room for one more token");
        let newest = self.waiting.back().or(self.running.last()).map(|known| known.id);
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

    /// Decides what runs next and reserves its pages; `None` when there is nothing to do before the last step is collected.
    pub fn plan(&mut self) -> Option<StepPlan> {
        let preempted = self.make_room();
        let mut budget = self.limits.max_batch_tokens;
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
        self.waiting.push_front(sequence);
        Some(id)
    }

    /// Lets waiting sequences run, in order of arrival, as long as tokens and pages are left.
    fn admit(&mut self, budget: &mut usize, entries: &mut Vec<StepEntry>) -> Vec<SequenceId> {
        let mut admitted = Vec::new();
        while *budget > 0 && self.running.len() < self.limits.max_running {
            let Some(sequence) = self.waiting.front_mut().filter(|sequence| sequence.unread == 0) else { break };
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
            self.running.extend(self.waiting.pop_front());
        }
        admitted
    }

    /// Records that a plan was enqueued.
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

    /// Takes all waiting sequences out, for a scheduler that takes this one's place.
    pub fn take_waiting(&mut self) -> Vec<Sequence> {
        self.waiting.drain(..).collect()
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
mod tests {
    use super::*;
    use bcg_models::state::PagePool;
    use std::collections::HashMap;

    fn scheduler(num_pages: usize, context_length: usize) -> Scheduler {
        let limits = Limits { max_running: 4, max_batch_tokens: 16, context_length };
        Scheduler::new(limits, PrefixCache::new(PagePool::new(num_pages, 4), true))
    }

    /// Tokens that no other sequence has, so that nothing is shared.
    fn sequence(id: u64, len: usize) -> Sequence {
        Sequence::new(SequenceId(id), (0..len as u32).map(|at| 1000 * id as u32 + at).collect(), 1000, false)
    }

    fn ids(plan: &StepPlan) -> Vec<u64> {
        plan.entries.iter().map(|entry| entry.id.0).collect()
    }

    /// Plans, launches and collects at once.
    fn step(scheduler: &mut Scheduler) -> Option<StepPlan> {
        let plan = scheduler.plan()?;
        scheduler.check();
        scheduler.launch(&plan);
        scheduler.check();
        scheduler.collect(&plan, &vec![7; plan.entries.len()]);
        scheduler.check();
        Some(plan)
    }

    #[test]
    fn prompts_run_beside_the_decodes_of_others() {
        let mut scheduler = scheduler(16, 32);
        scheduler.add(sequence(1, 3));
        scheduler.add(sequence(2, 5));
        let first = step(&mut scheduler).expect("work");
        assert_eq!((first.phase(), ids(&first), first.num_tokens()), (Phase::Prefill, vec![1, 2], 8));
        scheduler.add(sequence(3, 20));
        let second = step(&mut scheduler).expect("work");
        assert_eq!((second.phase(), ids(&second), second.num_tokens()), (Phase::Mixed, vec![1, 2, 3], 16));
        let third = step(&mut scheduler).expect("work");
        assert_eq!((ids(&third), third.num_tokens()), (vec![1, 2, 3], 8), "the rest of the prompt");
        let fourth = step(&mut scheduler).expect("work");
        assert_eq!((fourth.phase(), fourth.num_tokens()), (Phase::Decode, 3));
    }

    #[test]
    fn a_long_prompt_is_prefilled_in_chunks_and_samples_once() {
        let mut scheduler = scheduler(8, 32);
        scheduler.add(sequence(1, 20));
        let first = step(&mut scheduler).expect("work");
        assert_eq!((first.entries[0].num_tokens, first.entries[0].samples), (16, false));
        let second = step(&mut scheduler).expect("work");
        assert_eq!(
            (second.phase(), second.entries[0].num_tokens, second.entries[0].samples),
            (Phase::Prefill, 4, true)
        );
        assert_eq!(scheduler.running(SequenceId(1)).expect("runs").generated(), [7]);
    }

    #[test]
    fn a_step_takes_the_token_that_the_one_before_chooses() {
        let mut scheduler = scheduler(8, 32);
        scheduler.add(sequence(1, 3));
        let first = scheduler.plan().expect("work");
        scheduler.launch(&first);
        scheduler.add(sequence(2, 2));
        let second = scheduler.plan().expect("work");
        let rows: Vec<_> = second.entries.iter().map(|entry| (entry.id.0, entry.past_len, entry.chosen_row)).collect();
        assert_eq!(rows, [(1, 3, Some(0)), (2, 0, None)]);
        scheduler.launch(&second);
        scheduler.collect(&first, &[50]);
        let third = scheduler.plan().expect("work");
        let rows: Vec<_> = third.entries.iter().map(|entry| (entry.past_len, entry.chosen_row)).collect();
        assert_eq!(rows, [(4, Some(0)), (2, Some(1))]);
        scheduler.collect(&second, &[51, 60]);
        assert_eq!(scheduler.running(SequenceId(1)).expect("runs").generated(), [50, 51]);
        scheduler.check();
    }

    #[test]
    fn who_must_know_its_token_waits_for_it_and_nobody_runs_beyond_the_last_token() {
        let mut scheduler = scheduler(8, 32);
        scheduler.add(Sequence::new(SequenceId(1), vec![1, 2], 9, true));
        scheduler.add(Sequence::new(SequenceId(2), vec![3, 4], 2, false));
        let first = scheduler.plan().expect("work");
        scheduler.launch(&first);
        let second = scheduler.plan().expect("work");
        assert_eq!(ids(&second), [2]);
        scheduler.launch(&second);
        scheduler.collect(&first, &[50, 60]);
        let third = scheduler.plan().expect("work");
        assert_eq!((ids(&third), third.entries[0].chosen_row), (vec![1], None));
        scheduler.launch(&third);
        assert_eq!(scheduler.plan(), None);
        scheduler.collect(&second, &[61]);
        assert_eq!(scheduler.running(SequenceId(2)).expect("runs").generated(), [60, 61]);
    }

    #[test]
    fn the_newest_gives_its_pages_back_and_takes_up_what_the_cache_kept() {
        let mut scheduler = scheduler(5, 16);
        scheduler.add(sequence(1, 7));
        scheduler.add(sequence(2, 7));
        assert_eq!(step(&mut scheduler).expect("work").entries.len(), 2);
        assert!(step(&mut scheduler).expect("work").preempted.is_empty());
        let plan = step(&mut scheduler).expect("work");
        assert_eq!((plan.preempted, plan.entries[0].id), (vec![SequenceId(2)], SequenceId(1)));
        scheduler.remove(SequenceId(1)).expect("known");
        let again = step(&mut scheduler).expect("work");
        assert_eq!(
            (again.admitted, again.entries[0].past_len, again.entries[0].num_tokens),
            (vec![SequenceId(2)], 8, 1)
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
        assert_eq!(ids(&step(&mut scheduler).expect("work")), [1]);
        assert_eq!(scheduler.num_waiting(), 2);
    }

    #[test]
    fn a_shared_prefix_is_computed_once() {
        let mut scheduler = scheduler(16, 32);
        let prompt = |last: u32| [vec![5; 12], vec![last]].concat();
        scheduler.add(Sequence::new(SequenceId(1), prompt(1), 9, false));
        step(&mut scheduler);
        scheduler.add(Sequence::new(SequenceId(2), prompt(2), 9, false));
        let plan = step(&mut scheduler).expect("work");
        assert_eq!((plan.entries[1].past_len, plan.entries[1].num_tokens), (12, 1));
        assert_eq!(scheduler.running(SequenceId(2)).expect("runs").num_cached(), 12);
        assert_eq!(scheduler.num_used_pages(), 3 + 1 + 1);
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
    fn every_sequence_ends_right_and_no_page_is_written_by_two_in_random_runs() {
        for seed in 0..400 {
            let random = &mut Random(seed);
            let page_size = 1 + random.below(5);
            let context_length = 2 + random.below(30);
            let pool = PagePool::new(context_length.div_ceil(page_size) + random.below(12), page_size);
            let max_running = 1 + random.below(5);
            let limits = Limits { context_length, max_running, max_batch_tokens: max_running + random.below(40) };
            Run::new(seed, Scheduler::new(limits, PrefixCache::new(pool, random.below(4) > 0))).go(random);
        }
    }

    /// A model whose next token is the sum of all before it, computed over pages as a device would: in the order of the
    /// launches, from what the pages hold then.
    struct Run {
        seed: u64,
        scheduler: Scheduler,
        pages: HashMap<(u32, usize), u32>,
        chosen: Vec<u32>,
        in_flight: Option<(StepPlan, Vec<u32>)>,
        waited: HashMap<SequenceId, usize>,
        ended: u64,
    }

    const VOCAB: u32 = 3;

    impl Run {
        fn new(seed: u64, scheduler: Scheduler) -> Self {
            let (pages, chosen, in_flight, waited) = Default::default();
            Self { seed, scheduler, pages, chosen, in_flight, waited, ended: 0 }
        }

        fn go(&mut self, random: &mut Random) {
            let (total, mut added, mut steps) = (12, 0, 0);
            let limits = *self.scheduler.limits();
            while self.ended < total {
                steps += 1;
                assert!(steps < 20_000, "seed {}: {} of {total} sequences ended", self.seed, self.ended);
                if added < total && (self.scheduler.is_idle() || random.below(3) == 0) {
                    added += 1;
                    let len = 1 + random.below(limits.context_length - 1);
                    // Few different tokens, so that prefixes are shared.
                    let prompt = (0..len).map(|_| random.below(VOCAB as usize) as u32 / 2).collect();
                    let (max_tokens, waits) = (1 + random.below(20), random.below(4) == 0);
                    self.scheduler.add(Sequence::new(SequenceId(added), prompt, max_tokens, waits));
                }
                let plan = self.scheduler.plan();
                self.scheduler.check();
                assert!(plan.is_some() || self.in_flight.is_some() || self.scheduler.is_idle(), "seed {}", self.seed);
                let next = plan.map(|plan| self.launch(plan));
                if let Some((plan, tokens)) = std::mem::replace(&mut self.in_flight, next) {
                    self.scheduler.collect(&plan, &tokens);
                    self.end_some(&plan, random);
                }
                self.scheduler.check();
                if random.below(20) == 0 {
                    self.scheduler.flush_cache();
                }
            }
            if let Some((plan, tokens)) = self.in_flight.take() {
                self.scheduler.collect(&plan, &tokens);
            }
            assert_eq!(self.scheduler.num_used_pages(), 0, "seed {}", self.seed);
        }

        fn launch(&mut self, plan: StepPlan) -> (StepPlan, Vec<u32>) {
            let seed = self.seed;
            assert!(plan.num_tokens() <= self.scheduler.limits().max_batch_tokens, "seed {seed}: step over budget");
            let page_size = self.scheduler.cache().pool().page_size();
            let mut chosen = Vec::new();
            for entry in &plan.entries {
                let sequence = self.scheduler.running(entry.id).expect("runs");
                assert!(entry.num_tokens > 0, "seed {seed}: empty entry");
                let known = entry.num_tokens - usize::from(entry.chosen_row.is_some());
                let mut tokens = sequence.tokens()[entry.past_len..entry.past_len + known].to_vec();
                tokens.extend(entry.chosen_row.map(|row| self.chosen[row]));
                for (position, token) in (entry.past_len..).zip(tokens) {
                    let page = sequence.pages()[position / page_size];
                    self.pages.insert((page, position % page_size), token);
                }
                let end = entry.past_len + entry.num_tokens;
                let slot = |position: usize| (sequence.pages()[position / page_size], position % page_size);
                let sum: u32 = (0..end).map(|position| self.pages[&slot(position)]).sum();
                chosen.push((sum + end as u32) % VOCAB);
            }
            self.check_fairness(&plan);
            self.scheduler.launch(&plan);
            self.chosen.clone_from(&chosen);
            (plan, chosen)
        }

        /// The oldest sequence runs in every other step at the latest.
        fn check_fairness(&mut self, plan: &StepPlan) {
            let oldest = self.scheduler.running.first().map(|sequence| sequence.id);
            let runs = plan.entries.iter().any(|entry| Some(entry.id) == oldest);
            if let Some(oldest) = oldest {
                let waited = self.waited.entry(oldest).or_default();
                *waited = if runs { 0 } else { *waited + 1 };
                assert!(*waited <= 2, "seed {}: {oldest} starves", self.seed);
            }
        }

        fn end_some(&mut self, plan: &StepPlan, random: &mut Random) {
            for entry in plan.entries.iter().filter(|entry| entry.samples) {
                let all = self.scheduler.running.iter().chain(&self.scheduler.waiting);
                let Some(sequence) = all.into_iter().find(|sequence| sequence.id == entry.id) else { continue };
                let is_complete = sequence.tokens.len() >= sequence.max_len;
                if is_complete || random.below(16) == 0 {
                    let sequence = self.scheduler.remove(entry.id).expect("known");
                    self.ended += 1;
                    for at in sequence.num_prompt..sequence.tokens.len() {
                        let sum: u32 = sequence.tokens[..at].iter().sum();
                        let expected = (sum + at as u32) % VOCAB;
                        assert_eq!(sequence.tokens[at], expected, "seed {}: {}, token {at}", self.seed, entry.id);
                    }
                }
            }
        }
    }
}
