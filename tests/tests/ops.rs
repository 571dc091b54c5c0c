//! The op rules on the host device, under a few schedules, each a test of its own so that they run side by side; the `gpu`
//! binary runs them on CUDA.

use bcg_runtime::{Device, HostOptions};
use bcg_tests::ops::RULES;

fn every_op_matches_its_reference(seed: u64) {
    for (name, rule) in RULES {
        println!("{name}"); // shown if the rule panics
        let mut options = HostOptions::default();
        options.seed = seed;
        rule(&Device::host_with(options));
    }
}

#[test]
fn every_op_matches_its_reference_in_one_schedule() {
    every_op_matches_its_reference(0);
}

#[test]
fn every_op_matches_its_reference_in_another_schedule() {
    every_op_matches_its_reference(1);
}
