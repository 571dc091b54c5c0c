//! The rules of collectives on host devices, with several numbers of ranks and late, seeded schedules of each; the `gpu` binary
//! runs them on CUDA.

use std::time::Duration;

use bcg_runtime::{Device, HostOptions, World, WorldOptions};
use bcg_tests::collectives::{Size, a_rank_that_does_not_come_is_lost, collectives_match_plain_sums};

fn world(num_ranks: usize, timeout: Duration) -> World {
    let devices = (0..num_ranks).map(|rank| {
        let mut options = HostOptions::default();
        options.seed = rank as u64;
        Device::host_with(options)
    });
    let mut options = WorldOptions::default();
    options.timeout = timeout;
    World::new(devices.collect(), options).expect("a world")
}

#[test]
fn collectives_match_plain_sums_on_host_devices() {
    for num_ranks in [2, 3, 4, 8] {
        let size = Size { elements: 9000, calls: 200, max_delay: Duration::from_micros(100) };
        let world = world(num_ranks, Duration::from_secs(30));
        let num_checked = collectives_match_plain_sums(&world, size).expect("every result is right");
        println!("{num_ranks} ranks: {num_checked} results");
    }
}

#[test]
fn a_rank_that_does_not_come_is_lost_on_host_devices() {
    for num_ranks in [2, 4] {
        let world = world(num_ranks, Duration::from_secs(1));
        a_rank_that_does_not_come_is_lost(&world).expect("all ranks are told");
    }
}
