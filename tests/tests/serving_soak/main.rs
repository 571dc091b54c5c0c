//! The whole server under random calls, faults of its device, overload and clients that leave.
//!
//! The soak is a row of *lives* of a server, each with another setup; a life is a row of *phases*. Whatever happens:
//! - every call has one end: an answer, an error, or its client left; and so has every request that the engine accepted;
//! - what the engine answers is right: questions with a known answer get that answer, batched, preempted or not;
//! - behind every phase no page is held, and behind every life no object of a device, no thread and no memory is;
//! - a lost device costs the requests that were under way; a second one ends the engine, with an error for each request;
//! - nothing panics.
//!
//! `cargo test` runs a short one, `cargo xtask soak` the long one.

mod calls;
mod client;
mod life;
mod phases;
mod tally;

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bcg_runtime::LiveObjects;

use life::{Life, SETUPS, eventually};
use phases::{MAX_QUEUED, PHASES, Phase, Soak};
use tally::{Process, Record};

/// Calls of one life of the long soak.
const CALLS_OF_A_LIFE: u64 = 1250;
/// How soon a server whose queue is full must say so.
const OVERLOAD_ANSWER: Duration = Duration::from_millis(50);
/// How much the process may grow between the first quarter and the end, in bytes: pages that the allocator keeps.
const GROWTH_MAX: usize = 8 << 20;
/// How much a device's memory may grow behind the first phase of a life: larger steps came later.
const DEVICE_GROWTH_MAX: usize = 8 << 20;

/// Steps that are launched and not collected, at most: each has an event that the runner keeps for the next one.
const STEPS_UNDER_WAY: usize = 2;

/// What panicked, in whatever thread.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn note_panics() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICS.lock().unwrap_or_else(PoisonError::into_inner).push(info.to_string());
        print(info);
    }));
}

fn check_growth(first: LiveObjects, now: LiveObjects) {
    let growth = now.allocated_bytes.saturating_sub(first.allocated_bytes);
    assert!(growth <= DEVICE_GROWTH_MAX, "the device's memory grew: {first:?}, {now:?}");
    assert_eq!(now.streams, first.streams, "{now:?}");
    assert!(now.events <= first.events + STEPS_UNDER_WAY, "{now:?}");
}

fn num_forwards(life: &Life) -> u64 {
    let metrics = life.engine.metrics();
    metrics.graph_replays.get() + metrics.graph_captures.get() + metrics.num_eager()
}

/// Runs one life.
fn live(soak: &mut Soak, index: usize, num_calls: u64, record: &mut Record) {
    let life = Life::start(SETUPS[index % SETUPS.len()], MAX_QUEUED);
    soak.learn_answers(&life);
    let (mut num_choices, mut objects) = (0, None);
    for (phase, part) in PHASES {
        let tally = soak.run(&life, phase, num_calls * part / 100);
        life.check_at_rest();
        let num_loads = if phase == Phase::Lost { 2 } else { 1 };
        assert_eq!(life.num_loads(), num_loads, "{phase:?}: {:?}", tally.messages);
        let first = *objects.get_or_insert_with(|| life.live_objects());
        if phase != Phase::Lost {
            check_growth(first, life.live_objects());
        }
        let forwards = num_forwards(&life);
        soak.check_answer(&life);
        assert!(num_forwards(&life) > forwards, "the counters of forwards go on, on a new device too");
        num_choices += tally.num_choices;
        record.add(phase, &tally);
    }
    assert!(life.engine.num_ended_by("stop") + life.engine.num_ended_by("length") >= num_choices);
    record.preemptions += life.engine.metrics().preemptions.get();
    record.cached_tokens += life.engine.metrics().cached_prompt_tokens.get();
    if index.is_multiple_of(2) {
        record.add(Phase::ShutDown, &soak.shut_down(life));
    } else {
        record.add(Phase::GivenUp, &soak.give_up(life));
    }
}

/// Makes about `num_calls` calls in `num_lives` lives.
fn soak(num_calls: u64, num_lives: usize, seed: u64) -> Record {
    note_panics();
    let (mut soak, mut record) = (Soak::new(seed), Record::default());
    let before = Process::measure();
    for index in 0..num_lives {
        println!("life {} of {num_lives}: {:?}", index + 1, SETUPS[index % SETUPS.len()]);
        live(&mut soak, index, num_calls / num_lives as u64, &mut record);
        eventually("every thread ends", || Process::measure().num_threads <= before.num_threads);
        record.resident_bytes.push(Process::measure().resident_bytes);
    }
    println!("{record}");
    let panics = std::mem::take(&mut *PANICS.lock().unwrap_or_else(PoisonError::into_inner));
    assert!(panics.is_empty(), "{panics:?}");
    let total = &record.total;
    assert!(total.answered > 0 && total.overloaded > 0 && total.failed > 0 && total.left > 0);
    record
}

#[test]
fn a_server_survives_everything_at_once() {
    soak(120, 2, 1);
}

/// `cargo xtask soak` runs this with its own numbers.
#[test]
#[ignore = "takes long; run it with cargo xtask soak"]
fn the_long_soak() {
    let number = |name: &str| {
        let value = std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
        value.unwrap_or_else(|| panic!("{name} is not a number; run cargo xtask soak"))
    };
    let num_calls = number("BCG_SOAK_REQUESTS");
    let num_lives = usize::try_from(num_calls / CALLS_OF_A_LIFE).expect("a number").max(SETUPS.len());
    let record = soak(num_calls, num_lives, number("BCG_SOAK_SEED"));
    assert!(record.preemptions > 0 && record.cached_tokens > 0);
    assert!(record.total.wait_at(0.99) < OVERLOAD_ANSWER, "a full queue must say so sooner");
    assert!(record.growth_bytes() <= GROWTH_MAX, "the process grew");
}
