//! The op rules on the host device, under a few schedules; the `gpu` binary runs them on CUDA.

use bcg_runtime::{Device, HostOptions};
use bcg_tests::ops::RULES;

#[test]
fn every_op_matches_its_reference_on_the_host_device() {
    for (name, rule) in RULES {
        for seed in 0..3 {
            println!("{name}, seed {seed}"); // shown if the rule panics
            let mut options = HostOptions::default();
            options.seed = seed;
            rule(&Device::host_with(options));
        }
    }
}
