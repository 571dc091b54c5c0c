//! The rules of models whose layers are divided among the stages of a pipeline, on host devices.

use bcg_runtime::{Device, HostOptions};
use bcg_tests::golden;

/// Devices whose work runs in orders of their own.
fn hosts(count: usize) -> Vec<Device> {
    let host = |at: usize| {
        let mut options = HostOptions::default();
        (options.seed, options.ordinal) = (at as u64, at);
        Device::host_with(options)
    };
    (0..count).map(host).collect()
}

/// One test for each rule, checkpoint and pipeline.
macro_rules! tests {
    (pipelines { $($module:ident = $pipeline:tt,)* } rules $rules:tt) => {
        $(mod $module { tests!(@rules $pipeline $rules); })*
    };
    (@rules $pipeline:tt { $($rule:ident,)* }) => {
        $(
            #[test]
            fn $rule() {
                let (checkpoint, num_stages, num_ranks) = $pipeline;
                super::golden::$rule(&super::hosts(num_stages * num_ranks), num_stages, checkpoint);
            }
        )*
    };
}

bcg_tests::pipeline_rules!(tests);

#[test]
fn a_pipeline_solves_what_one_device_solves() {
    golden::a_pipeline_solves_what_one_device_solves(&hosts(2), 2, "tiny-qwen3");
}

#[test]
fn stages_that_cannot_be_are_refused() {
    golden::CHECKPOINTS.iter().for_each(|checkpoint| golden::stages_that_cannot_be_are_refused(checkpoint));
}
