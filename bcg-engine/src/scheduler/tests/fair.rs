//! How clients share the places among those that run, the pages and the tokens of a step.

use std::collections::BTreeMap;

use super::*;

fn of(client: &str, sequence: Sequence) -> Sequence {
    sequence.of(ClientId::new(client), 0)
}

fn preempted(plan: &StepPlan) -> Vec<u64> {
    plan.preempted.iter().map(|id| id.0).collect()
}

fn num_running(scheduler: &Scheduler, client: &str) -> usize {
    scheduler.running.iter().filter(|sequence| sequence.client == ClientId::new(client)).count()
}

#[test]
fn a_second_client_gets_half_of_the_places_at_once_and_they_stay() {
    let mut scheduler = scheduler(64, 32);
    (1..=8).for_each(|id| scheduler.add(of("a", sequence(id, 2))));
    assert_eq!(ids(&step(&mut scheduler).expect("work")), [1, 2, 3, 4]);
    scheduler.add(of("b", sequence(9, 2)));
    let plan = step(&mut scheduler).expect("work");
    assert_eq!((preempted(&plan), ids(&plan)), (vec![4], vec![1, 2, 3, 9]));
    (10..=12).for_each(|id| scheduler.add(of("b", sequence(id, 2))));
    let plan = step(&mut scheduler).expect("work");
    assert_eq!((preempted(&plan), ids(&plan)), (vec![3], vec![1, 2, 9, 10]));
    for _ in 0..5 {
        let plan = step(&mut scheduler).expect("work");
        assert_eq!((preempted(&plan), ids(&plan)), (vec![], vec![1, 2, 9, 10]), "nobody is pushed back");
    }
    scheduler.remove(SequenceId(9));
    assert_eq!(ids(&step(&mut scheduler).expect("work")), [1, 2, 10, 11], "b has fewer running");
    scheduler.remove(SequenceId(1));
    let plan = step(&mut scheduler).expect("work");
    assert_eq!((&plan.admitted, plan.entries[3].past_len), (&vec![SequenceId(3)], 0), "who gave way comes first again");
}

#[test]
fn clients_with_equally_many_running_take_turns() {
    let mut scheduler = scheduler(64, 32);
    (1..=4).for_each(|id| scheduler.add(of("a", sequence(id, 1))));
    (5..=8).for_each(|id| scheduler.add(of("b", sequence(id, 1))));
    (9..=12).for_each(|id| scheduler.add(of("c", sequence(id, 1))));
    let plan = step(&mut scheduler).expect("work");
    assert_eq!(plan.admitted.iter().map(|id| id.0).collect::<Vec<_>>(), [1, 5, 9, 2]);
    scheduler.remove(SequenceId(2));
    assert_eq!(step(&mut scheduler).expect("work").admitted, [SequenceId(6)], "b was served before c");
}

#[test]
fn priority_orders_the_requests_of_one_client_only() {
    let mut scheduler = scheduler(64, 32);
    scheduler.add(sequence(1, 1).of(ClientId::new("a"), 0));
    scheduler.add(sequence(2, 1).of(ClientId::new("a"), 5));
    scheduler.add(sequence(3, 1).of(ClientId::new("a"), 5));
    scheduler.add(sequence(4, 1).of(ClientId::new("b"), -7));
    let admitted = step(&mut scheduler).expect("work").admitted;
    assert_eq!(admitted.iter().map(|id| id.0).collect::<Vec<_>>(), [2, 4, 3, 1]);
}

#[test]
fn a_probe_comes_before_all_others() {
    let mut scheduler = scheduler(64, 32);
    (1..=4).for_each(|id| scheduler.add(of("a", sequence(id, 1))));
    scheduler.add(of("b", sequence(5, 1)));
    scheduler.add(of("health", sequence(6, 1).as_probe()));
    assert_eq!(step(&mut scheduler).expect("work").admitted[0], SequenceId(6));
}

#[test]
fn long_prompts_share_the_tokens_of_a_step_and_wait_for_short_ones_every_other_step() {
    let mut scheduler = scheduler(64, 64);
    let tokens = |plan: &StepPlan| plan.entries.iter().map(|entry| (entry.id.0, entry.num_tokens)).collect::<Vec<_>>();
    scheduler.add(of("a", sequence(1, 60)));
    assert_eq!(tokens(&step(&mut scheduler).expect("work")), [(1, 16)], "alone it has the whole step");
    scheduler.add(of("b", sequence(2, 5)));
    assert_eq!(tokens(&step(&mut scheduler).expect("work")), [(2, 5)], "a short prompt has a step of its own");
    scheduler.add(of("b", sequence(3, 40)));
    scheduler.add(of("c", sequence(4, 3)));
    let plan = step(&mut scheduler).expect("work");
    assert_eq!(tokens(&plan), [(2, 1), (1, 6), (4, 3), (3, 6)], "15 tokens: c needs 3, a and b have 6 each");
    assert_eq!(tokens(&step(&mut scheduler).expect("work")), [(2, 1), (4, 1), (1, 7), (3, 7)]);
}

#[test]
fn one_large_sequence_pushes_no_small_ones_out() {
    let limits = Limits { max_running_requests: 4, chunked_prefill_size: 64, context_length: 64 };
    let mut scheduler = Scheduler::new(limits, PrefixCache::new(PagePool::new(16, 4), true));
    (1..=3).for_each(|id| scheduler.add(of("a", sequence(id, 15))));
    step(&mut scheduler);
    scheduler.add(of("b", sequence(4, 40)));
    assert_eq!(
        preempted(&step(&mut scheduler).expect("work")),
        Vec::<u64>::new(),
        "it would hold more pages than all of a"
    );
    scheduler.remove(SequenceId(4));
    scheduler.add(of("c", sequence(5, 15)));
    let plan = step(&mut scheduler).expect("work");
    assert_eq!((preempted(&plan), plan.admitted), (vec![3], vec![SequenceId(5)]));
}

#[test]
fn pages_run_out_at_the_cost_of_the_client_that_runs_the_most() {
    let mut scheduler = scheduler(8, 32);
    (1..=2).for_each(|id| scheduler.add(of("a", sequence(id, 4))));
    scheduler.add(of("b", sequence(3, 3)));
    let given_way = (0..10).find_map(|_| step(&mut scheduler).expect("work").preempted.first().copied());
    assert_eq!(given_way, Some(SequenceId(2)), "the newest of a, not the newest of all, which asked for the page");
    assert_eq!(num_running(&scheduler, "b"), 1);
}

/// Random clients, of which one has far more and longer requests, with pages for all: after every plan the places are
/// shared max-min, and the steps of the others' short requests are bounded.
#[test]
fn nobody_who_asks_for_little_waits_long() {
    for seed in 0..10 {
        let random = &mut SmallRng::seed_from_u64(seed);
        let max_running_requests = 2 + random.random_range(0..6);
        let limits = Limits { max_running_requests, chunked_prefill_size: 32, context_length: 200 };
        let mut scheduler = Scheduler::new(limits, PrefixCache::new(PagePool::new(400, 4), seed % 2 == 0));
        let mut next = 0;
        let mut add = |scheduler: &mut Scheduler, client: &str, prompt: usize, answer: usize| {
            next += 1;
            let prompt: Vec<u32> = (0..prompt as u32).map(|at| 1000 * next as u32 + at).collect();
            scheduler.add(of(client, Sequence::new(SequenceId(next), prompt, answer, false)));
            SequenceId(next)
        };
        for _ in 0..40 {
            add(&mut scheduler, "flood", 100, 50);
        }
        // When the short requests arrived, in steps.
        let mut short: BTreeMap<SequenceId, usize> = BTreeMap::new();
        for now in 0..200 {
            let others = num_running(&scheduler, "b") + num_running(&scheduler, "c");
            if random.random_range(0..10) == 0 && others == 0 {
                let client = ["b", "c"][random.random_range(0..2)];
                short.insert(add(&mut scheduler, client, 1 + random.random_range(0..12), 2), now);
            }
            let Some(plan) = step(&mut scheduler) else { break };
            check_shares(&scheduler, seed);
            for entry in plan.entries.iter().filter(|entry| entry.samples) {
                if let Some(arrived) = short.remove(&entry.id) {
                    assert_eq!(now, arrived, "seed {seed}: the first token comes with the first step");
                }
                let sequence = scheduler.running(entry.id).expect("runs");
                if sequence.len() == sequence.max_len {
                    scheduler.remove(entry.id);
                }
            }
        }
        assert!(short.is_empty(), "seed {seed}: {short:?}");
    }
}

/// While somebody waits, nobody else runs two more.
fn check_shares(scheduler: &Scheduler, seed: u64) {
    let most = scheduler.waiting.most_running();
    for sequence in scheduler.waiting.iter() {
        let runs = scheduler.waiting.num_running(sequence.client_idx);
        assert!(most < runs + 2, "seed {seed}: {} waits with {runs} running, another runs {most}", sequence.client);
    }
}
