//! The golden rules on the host device; the `gpu` binary runs them on CUDA.

use bcg_runtime::Device;
use bcg_tests::golden;

/// One test for each rule and checkpoint: they run beside each other, and say which one failed.
macro_rules! tests {
    (checkpoints { $($module:ident = $checkpoint:literal,)* } rules $rules:tt) => {
        $(mod $module { tests!(@rules $checkpoint $rules); })*
    };
    (@rules $checkpoint:literal { $($rule:ident,)* }) => {
        $(
            #[test]
            fn $rule() {
                super::golden::$rule(&super::Device::host(), $checkpoint);
            }
        )*
    };
}

bcg_tests::golden_rules!(tests);
