//! The rule of experts that ranks own, on host devices with late, seeded schedules of each; the `gpu` binary runs it on CUDA.

use std::time::Duration;

use bcg_runtime::{Device, HostOptions, World, WorldOptions};
use bcg_tests::experts::experts_match_plain_math;

#[test]
fn experts_match_plain_math_on_host_devices() {
    for num_ranks in [2, 4] {
        let devices = (0..num_ranks).map(|rank| {
            let mut options = HostOptions::default();
            options.seed = rank as u64;
            Device::host_with(options)
        });
        let mut options = WorldOptions::default();
        options.timeout = Duration::from_secs(60);
        let world = World::new(devices.collect(), options).expect("a world");
        let num_checked = experts_match_plain_math(&world, 32).expect("every layer is right");
        println!("{num_ranks} ranks: {num_checked} layers");
    }
}
