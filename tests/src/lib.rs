//! Tests that are written once and run on every device.
//!
//! A rule is `fn(&Device)` that panics when it is broken. `tests/*.rs` run the rules on the host device, under many
//! schedules where the rule is about order; the `gpu` binary runs the same rules on a CUDA device.

pub mod allocations;
pub mod collectives;
pub mod conformance;
pub mod device_faults;
pub mod experts;
pub mod geometry;
pub mod golden;
pub mod nodes;
pub mod ops;
pub mod random;
pub mod roles;
mod several;
pub mod soak;
pub mod world;

use bcg_runtime::Device;

/// A rule and its name.
pub type Rule = (&'static str, fn(&Device));

/// Lists functions as rules under their own names.
#[macro_export]
macro_rules! rules {
    ($($name:ident),* $(,)?) => { &[$((stringify!($name), $name as fn(&bcg_runtime::Device))),*] };
}
