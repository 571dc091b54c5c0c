//! The conformance rules on the host device, each under many schedules, half of them with healed replay.

use bcg_runtime::{Device, HostOptions, ReplayMode};
use bcg_tests::conformance::fixture::with_replay;
use bcg_tests::conformance::{self, *};

/// Schedules that each rule is run under, unless `BCG_SCHEDULES` says otherwise, as `cargo xtask miri` does.
const NUM_SEEDS: u64 = 100;

fn num_schedules() -> u64 {
    std::env::var("BCG_SCHEDULES").map_or(NUM_SEEDS, |number| number.parse().expect("BCG_SCHEDULES is a number"))
}

/// Rules that take long and do not depend on the schedule, and how many schedules they get.
const SLOW: &[(&str, u64)] = &[
    ("ten_thousand_segments_are_legal", 1),
    ("a_thousand_replays_grow_nothing", 1),
    ("padding_is_at_most_an_eighth_above_sixteen_rows", 1),
];

fn run(name: &str, rule: fn(&Device)) {
    let num_seeds = SLOW.iter().find(|(slow, _)| *slow == name).map_or(num_schedules(), |(_, seeds)| *seeds);
    for seed in 0..num_seeds {
        let mut options = HostOptions::default();
        options.seed = seed;
        let device = Device::host_with(options);
        let mode = if seed % 2 == 0 { ReplayMode::Healed } else { ReplayMode::Chain };
        let run = || with_replay(mode, || rule(&device));
        let passed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        if let Err(panic) = passed {
            eprintln!("{name} is broken with seed {seed}, {mode:?}");
            std::panic::resume_unwind(panic);
        }
    }
}

macro_rules! tests {
    ($($group:ident { $($rule:ident,)* })*) => { $(
        mod $group {
            $(
                #[test]
                fn $rule() {
                    super::run(stringify!($rule), super::conformance::$group::$rule);
                }
            )*
        }
    )* };
}

bcg_tests::conformance_rules!(tests);

/// A rule that is written but not listed would never run.
#[test]
fn every_rule_is_listed() {
    for (group, rules) in GROUPS {
        let path = format!("{}/src/conformance/{group}.rs", env!("CARGO_MANIFEST_DIR"));
        let source = std::fs::read_to_string(path).expect("the group's source");
        let written = source.lines().filter(|line| line.starts_with("pub fn ") && line.contains("device: &Device) {"));
        assert_eq!(written.count(), rules.len(), "{group}");
    }
}
