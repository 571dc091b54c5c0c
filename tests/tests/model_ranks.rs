//! The rules of models that are divided among several ranks, on host devices.

use bcg_models::GraphMode;
use bcg_runtime::Device;
use bcg_tests::golden;

fn hosts(count: usize) -> Vec<Device> {
    (0..count).map(|_| Device::host()).collect()
}

/// One test for each rule, checkpoint, number of ranks and way to divide experts.
macro_rules! tests {
    (worlds { $($module:ident = $world:tt,)* } rules $rules:tt) => {
        $(mod $module { tests!(@rules $world $rules); })*
    };
    (@rules ($checkpoint:literal, $num_ranks:literal, $experts:ident) { $($rule:ident,)* }) => {
        $(
            #[test]
            fn $rule() {
                super::golden::$rule(&super::hosts($num_ranks), $checkpoint, super::golden::$experts);
            }
        )*
    };
}

bcg_tests::ranks_rules!(tests);

#[test]
fn ranks_that_do_not_divide_a_model_are_refused() {
    golden::CHECKPOINTS.iter().for_each(|checkpoint| golden::ranks_that_do_not_divide_a_model_are_refused(checkpoint));
}

#[test]
fn nodes_choose_the_tokens_of_one_process() {
    let all = [GraphMode::Ahead, GraphMode::Off, GraphMode::Lazy];
    for (checkpoint, num_nodes, num_local, modes) in [
        ("tiny-qwen3", 2, 2, &all[..2]),
        ("tiny-qwen3-moe", 4, 1, &all[2..]),
        ("tiny-nemotron-h", 2, 1, &all[2..]),
        ("tiny-deepseek-v3", 2, 1, &all[2..]),
    ] {
        golden::nodes_choose_the_tokens_of_one_process(checkpoint, num_nodes, num_local, modes);
    }
}
