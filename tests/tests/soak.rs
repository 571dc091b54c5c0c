//! The soak on the host device; the `gpu` binary runs it on CUDA.

use bcg_runtime::Device;
use bcg_tests::soak;

#[test]
fn mixed_steps_are_right_and_grow_nothing() {
    soak::mixed_steps_are_right_and_grow_nothing(&Device::host());
}
