//! The rules of a pair of models, on host devices.

use bcg_runtime::Device;
use bcg_tests::golden;

/// One test for each rule and checkpoint.
macro_rules! tests {
    (checkpoints { $($module:ident = $checkpoint:literal,)* } rules $rules:tt) => {
        $(mod $module { tests!(@rules $checkpoint $rules); })*
    };
    (@rules $checkpoint:tt { $($rule:ident,)* }) => {
        $(
            #[test]
            fn $rule() {
                super::golden::$rule(&super::devices(), $checkpoint);
            }
        )*
    };
}

bcg_tests::roles_rules!(tests);

/// Two devices whose work runs late, in an order of its own.
fn devices() -> [Device; 2] {
    [3, 4].map(|seed| {
        let device = Device::host();
        device.host_control().expect("a host device").reseed(seed);
        device
    })
}

#[test]
fn rows_arrive() {
    bcg_tests::roles::rows_arrive(&devices(), 50).expect("every row is right");
}
