//! What the scheduler does with small batches, and that its invariants hold in random runs.

use std::collections::{HashMap, VecDeque};

use bcg_models::state::PagePool;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::ClientId;

mod fair;

fn scheduler(num_pages: usize, context_length: usize) -> Scheduler {
    let limits = Limits { max_running_requests: 4, chunked_prefill_size: 16, context_length };
    Scheduler::new(limits, PrefixCache::new(PagePool::new(num_pages, 4), true))
}

/// Tokens that no other sequence has, so that nothing is shared.
fn sequence(id: u64, len: usize) -> Sequence {
    let prompt: Vec<u32> = (0..len as u32).map(|at| 1000 * id as u32 + at).collect();
    Sequence::new(SequenceId(id), prompt, 1000, false)
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
    assert_eq!((first.kind(), ids(&first), first.num_tokens()), (PlanKind::Prefill, vec![1, 2], 8));
    scheduler.add(sequence(3, 20));
    let second = step(&mut scheduler).expect("work");
    assert_eq!((second.kind(), ids(&second), second.num_tokens()), (PlanKind::Mixed, vec![1, 2, 3], 16));
    let third = step(&mut scheduler).expect("work");
    assert_eq!((ids(&third), third.num_tokens()), (vec![1, 2, 3], 8), "the rest of the prompt");
    let fourth = step(&mut scheduler).expect("work");
    assert_eq!((fourth.kind(), fourth.num_tokens()), (PlanKind::Decode, 3));
}

#[test]
fn a_long_prompt_is_prefilled_in_chunks_and_samples_once() {
    let mut scheduler = scheduler(8, 32);
    scheduler.add(sequence(1, 20));
    let first = step(&mut scheduler).expect("work");
    assert_eq!((first.entries[0].num_tokens, first.entries[0].samples), (16, false));
    let second = step(&mut scheduler).expect("work");
    assert_eq!((second.kind(), second.entries[0].num_tokens, second.entries[0].samples), (PlanKind::Prefill, 4, true));
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
    let rows: Vec<_> = second.entries.iter().map(|entry| (entry.id.0, entry.past_len, entry.chosen)).collect();
    assert_eq!(rows, [(1, 3, Some(ChosenToken::of_last(0))), (2, 0, None)]);
    scheduler.launch(&second);
    scheduler.collect(&first, &[50]);
    let third = scheduler.plan().expect("work");
    let rows: Vec<_> = third.entries.iter().map(|entry| (entry.past_len, entry.chosen)).collect();
    assert_eq!(rows, [(4, Some(ChosenToken::of_last(0))), (2, Some(ChosenToken::of_last(1)))]);
    scheduler.collect(&second, &[51, 60]);
    assert_eq!(scheduler.running(SequenceId(1)).expect("runs").generated(), [50, 51]);
    scheduler.check();
}

#[test]
fn a_pipeline_decodes_in_turn_with_a_step_in_each_stage() {
    let mut scheduler = scheduler(16, 32).with_stages(2);
    (1..=3).for_each(|id| scheduler.add(sequence(id, 2)));
    let mut under_way = VecDeque::new();
    let mut seen = Vec::new();
    for _ in 0..6 {
        let plan = scheduler.plan().expect("work");
        let since: Vec<_> = plan.entries.iter().map(|entry| entry.chosen.map(|token| token.steps_since)).collect();
        seen.push((ids(&plan), since));
        scheduler.launch(&plan);
        scheduler.check();
        under_way.push_back(plan);
        if under_way.len() > 2 {
            let plan = under_way.pop_front().expect("a step");
            scheduler.collect(&plan, &vec![7; plan.entries.len()]);
        }
    }
    // All prompts run at once; what they choose is awaited by the next step, since nothing else can run.
    let (prompts, first) = ((vec![1, 2, 3], vec![None; 3]), (vec![1, 2], vec![Some(0); 2]));
    let [one, two] = [(vec![3], vec![Some(1)]), (vec![1, 2], vec![Some(1); 2])];
    assert_eq!(seen, [prompts, first, one.clone(), two.clone(), one, two]);
}

#[test]
fn the_only_sequence_of_a_pipeline_runs_one_step_ahead() {
    let mut scheduler = scheduler(16, 32).with_stages(3);
    scheduler.add(sequence(1, 2));
    let first = scheduler.plan().expect("work");
    scheduler.launch(&first);
    let second = scheduler.plan().expect("it waits for its token on the device");
    assert_eq!(second.entries[0].chosen, Some(ChosenToken::of_last(0)));
    scheduler.launch(&second);
    assert_eq!(scheduler.plan(), None, "a prompt that comes now would wait for more steps");
    scheduler.add(sequence(2, 2));
    assert_eq!(ids(&scheduler.plan().expect("a prompt waits for no token")), [2]);
}

#[test]
fn the_chunks_of_a_prompt_fill_a_pipeline() {
    let mut scheduler = scheduler(16, 64).with_stages(2);
    scheduler.add(sequence(1, 40));
    let chunks: Vec<_> = (0..3)
        .map(|_| {
            let plan = scheduler.plan().expect("a chunk");
            scheduler.launch(&plan);
            (plan.entries[0].past_len, plan.entries[0].num_tokens)
        })
        .collect();
    assert_eq!(chunks, [(0, 16), (16, 16), (32, 8)]);
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
    assert_eq!((ids(&third), third.entries[0].chosen), (vec![1], None));
    scheduler.launch(&third);
    assert_eq!(scheduler.plan(), None);
    scheduler.collect(&second, &[61]);
    assert_eq!(scheduler.running(SequenceId(2)).expect("runs").generated(), [60, 61]);
}

#[test]
fn a_held_sequence_is_in_no_plan_and_lets_others_pass_until_it_is_released() {
    let mut scheduler = scheduler(8, 32);
    scheduler.add(sequence(1, 2));
    scheduler.add(sequence(2, 2));
    step(&mut scheduler);
    assert!(scheduler.set_held(SequenceId(1), true));
    scheduler.add(sequence(3, 2));
    assert!(scheduler.set_held(SequenceId(3), true));
    scheduler.add(sequence(4, 2));
    assert_eq!(ids(&step(&mut scheduler).expect("work")), [2, 4]);
    assert!(scheduler.set_held(SequenceId(3), false));
    assert_eq!(ids(&step(&mut scheduler).expect("work")), [2, 4, 3]);
    scheduler.remove(SequenceId(2));
    scheduler.remove(SequenceId(3));
    scheduler.remove(SequenceId(4));
    assert_eq!((step(&mut scheduler), scheduler.is_idle()), (None, false));
    assert!(scheduler.set_held(SequenceId(1), false));
    assert_eq!(ids(&step(&mut scheduler).expect("work")), [1]);
    assert!(!scheduler.set_held(SequenceId(9), true));
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
    assert_eq!((again.admitted, again.entries[0].past_len, again.entries[0].num_tokens), (vec![SequenceId(2)], 8, 1));
}

#[test]
fn a_sequence_that_another_scheduler_takes_over_chooses_its_unread_token_again() {
    let mut old = scheduler(5, 16);
    old.add(sequence(1, 7));
    old.add(sequence(2, 7));
    step(&mut old);
    // This step is launched and never collected, and the next one has no room for the newest.
    let launched = old.plan().expect("work");
    old.launch(&launched);
    assert_eq!(old.plan().expect("work").preempted, [SequenceId(2)]);
    let mut new = scheduler(5, 16);
    old.take_waiting().into_iter().for_each(|sequence| new.add(sequence));
    let plan = step(&mut new).expect("it is not held up");
    assert_eq!((ids(&plan), plan.num_tokens()), (vec![2], 8), "the prompt and the token that was read");
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

fn random_run(seed: u64, num_stages: usize, random: &mut SmallRng) {
    let page_size: usize = 1 + random.random_range(0..5);
    let context_length: usize = 2 + random.random_range(0..30);
    let pool = PagePool::new(context_length.div_ceil(page_size) + random.random_range(0..12), page_size);
    let max_running_requests = 1 + random.random_range(0..5);
    let limits = Limits {
        context_length,
        max_running_requests,
        chunked_prefill_size: max_running_requests + random.random_range(0..40),
    };
    let cache = PrefixCache::new(pool, random.random_range(0..4) > 0);
    let scheduler = Scheduler::new(limits, cache).with_stages(num_stages);
    Run::new(seed, scheduler, 1 + random.random_range(0..3)).go(random);
}

#[test]
fn every_sequence_ends_right_and_no_page_is_written_by_two_in_random_runs() {
    for seed in 0..400 {
        random_run(seed, 1, &mut SmallRng::seed_from_u64(seed));
    }
}

#[test]
fn with_a_pipeline_every_sequence_ends_right_in_random_runs() {
    for seed in 0..600 {
        random_run(seed, 2 + seed as usize % 3, &mut SmallRng::seed_from_u64(seed));
    }
}

/// A model whose next token is the sum of all before it, computed over pages as a device would: in the order of the
/// launches, from what the pages hold then.
struct Run {
    seed: u64,
    scheduler: Scheduler,
    pages: HashMap<(u32, usize), u32>,
    /// The tokens of the latest steps, the newest first: as many as there are stages.
    chosen: VecDeque<Vec<u32>>,
    in_flight: VecDeque<(StepPlan, Vec<u32>)>,
    waited: HashMap<SequenceId, usize>,
    ended: u64,
    num_clients: usize,
}

const VOCAB: u32 = 3;

impl Run {
    fn new(seed: u64, scheduler: Scheduler, num_clients: usize) -> Self {
        let (pages, chosen, in_flight, waited) = Default::default();
        Self { seed, scheduler, pages, chosen, in_flight, waited, ended: 0, num_clients }
    }

    fn go(&mut self, random: &mut SmallRng) {
        let (total, mut added, mut steps) = (12, 0, 0);
        let limits = *self.scheduler.limits();
        while self.ended < total {
            steps += 1;
            assert!(steps < 20_000, "seed {}: {} of {total} sequences ended", self.seed, self.ended);
            if added < total && (self.scheduler.is_idle() || random.random_range(0..3) == 0) {
                added += 1;
                let len = 1 + random.random_range(0..limits.context_length - 1);
                // Few different tokens, so that prefixes are shared.
                let prompt: Vec<u32> = (0..len).map(|_| random.random_range(0..VOCAB as usize) as u32 / 2).collect();
                let (max_tokens, waits) = (1 + random.random_range(0..20), random.random_range(0..4) == 0);
                let sequence = Sequence::new(SequenceId(added), prompt, max_tokens, waits);
                let client = ClientId::new(["a", "b", "c"][random.random_range(0..self.num_clients)]);
                self.scheduler.add(sequence.of(client, random.random_range(0..3)));
            }
            let plan = self.scheduler.plan();
            self.scheduler.check();
            assert!(plan.is_some() || !self.in_flight.is_empty() || self.scheduler.is_idle(), "seed {}", self.seed);
            let launches = plan.is_some();
            if let Some(plan) = plan {
                let launched = self.launch(plan);
                self.in_flight.push_back(launched);
            }
            let is_full = self.in_flight.len() > self.scheduler.num_stages;
            if is_full || !launches {
                self.collect(random);
            }
            self.scheduler.check();
            if random.random_range(0..20) == 0 {
                self.scheduler.flush_cache();
            }
        }
        for (plan, tokens) in std::mem::take(&mut self.in_flight) {
            self.scheduler.collect(&plan, &tokens);
        }
        assert_eq!(self.scheduler.num_used_pages(), 0, "seed {}", self.seed);
    }

    /// Ends the oldest step, well or not.
    fn collect(&mut self, random: &mut SmallRng) {
        let Some((plan, tokens)) = self.in_flight.pop_front() else { return };
        if random.random_range(0..20) == 0 {
            // The step failed: it and those after it are computed again.
            self.scheduler.forget_under_way();
            for (plan, _) in std::iter::once((plan, tokens)).chain(std::mem::take(&mut self.in_flight)) {
                plan.entries.iter().for_each(|entry| self.scheduler.rewind(entry.id));
            }
        } else {
            self.scheduler.collect(&plan, &tokens);
            self.end_some(&plan, random);
        }
    }

    fn launch(&mut self, plan: StepPlan) -> (StepPlan, Vec<u32>) {
        let seed = self.seed;
        assert!(plan.num_tokens() <= self.scheduler.limits().chunked_prefill_size, "seed {seed}: step over budget");
        let page_size = self.scheduler.cache().pool().page_size();
        let mut chosen = Vec::new();
        for entry in &plan.entries {
            let sequence = self.scheduler.running(entry.id).expect("runs");
            assert!(entry.num_tokens > 0, "seed {seed}: empty entry");
            let known = entry.num_tokens - usize::from(entry.chosen.is_some());
            let mut tokens = sequence.tokens()[entry.past_len..entry.past_len + known].to_vec();
            tokens.extend(entry.chosen.map(|token| self.chosen[token.steps_since][token.row]));
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
        self.chosen.push_front(chosen.clone());
        self.chosen.truncate(self.scheduler.num_stages);
        (plan, chosen)
    }

    /// The oldest sequence runs in every other step at the latest, or every other round of a pipeline's steps.
    fn check_fairness(&mut self, plan: &StepPlan) {
        let oldest = self.scheduler.running.first().map(|sequence| sequence.id);
        let runs = plan.entries.iter().any(|entry| Some(entry.id) == oldest);
        if let Some(oldest) = oldest {
            let waited = self.waited.entry(oldest).or_default();
            *waited = if runs { 0 } else { *waited + 1 };
            assert!(*waited <= 2 * self.scheduler.num_stages, "seed {}: {oldest} starves", self.seed);
        }
    }

    fn end_some(&mut self, plan: &StepPlan, random: &mut SmallRng) {
        for entry in plan.entries.iter().filter(|entry| entry.samples) {
            let all = self.scheduler.running.iter().chain(self.scheduler.waiting.iter());
            let Some(sequence) = all.into_iter().find(|sequence| sequence.id == entry.id) else { continue };
            let is_complete = sequence.tokens().len() >= sequence.max_len;
            if is_complete || random.random_range(0..16) == 0 {
                let sequence = self.scheduler.remove(entry.id).expect("known");
                self.ended += 1;
                for at in sequence.num_prompt..sequence.tokens().len() {
                    let sum: u32 = sequence.tokens()[..at].iter().sum();
                    let expected = (sum + at as u32) % VOCAB;
                    assert_eq!(sequence.tokens()[at], expected, "seed {}: {}, token {at}", self.seed, entry.id);
                }
            }
        }
    }
}
