//! Random programs with collectives, each with schedules of its own.

use bcg_runtime::{Device, HostOptions};
use bcg_tests::random;

/// Programs that are run.
const NUM_PROGRAMS: u64 = 1000;

#[test]
fn random_programs_give_the_same_on_every_rank_eagerly_captured_and_replayed() {
    for seed in 0..NUM_PROGRAMS {
        let num_ranks = if seed % 10 == 0 { 4 } else { 2 };
        let device = |rank| {
            let mut options = HostOptions::default();
            (options.seed, options.ordinal) = (seed * 8 + rank, rank as usize);
            Device::host_with(options)
        };
        random::check(&(0..num_ranks).map(device).collect::<Vec<_>>(), seed);
    }
}
