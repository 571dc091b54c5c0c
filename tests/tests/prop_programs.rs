//! Random programs on the host device, each under a schedule of its own.

use std::sync::atomic::{AtomicU64, Ordering};

use bcg_runtime::{Device, HostOptions};
use bcg_tests::random;

/// Programs that are run; `BCG_RANDOM_PROGRAMS` overrides it.
const NUM_PROGRAMS: u64 = 10_000;

/// First seed; `BCG_RANDOM_FIRST` overrides it.
fn from_environment(name: &str, default: u64) -> u64 {
    let value = std::env::var(name).ok();
    value.map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name} must be a number, not {value}")))
}

fn check(seed: u64) {
    let mut options = HostOptions::default();
    options.seed = seed;
    random::check(&[Device::host_with(options)], seed);
}

#[test]
fn random_programs_give_the_same_eagerly_captured_and_replayed() {
    let first = from_environment("BCG_RANDOM_FIRST", 0);
    let end = first + from_environment("BCG_RANDOM_PROGRAMS", NUM_PROGRAMS);
    let next = AtomicU64::new(first);
    let num_threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|threads| {
        for _ in 0..num_threads {
            threads.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    check(seed);
                }
            });
        }
    });
}

#[test]
fn programs_that_failed_once_pass() {
    random::REGRESSIONS.iter().copied().for_each(check);
}
