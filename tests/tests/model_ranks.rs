//! The rules of models that are divided among several ranks, on host devices.

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
