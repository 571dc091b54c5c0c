//! Capture: from a forward to segments and breaks.
//!
//! - [`context`] and [`eager`] are what captured code and breaks hold; [`breaks`] is what an annotated function expands
//!   to.
//! - [`freeze`] keeps the arguments of a break, [`bridge`] carries its outputs to the captured work after it.
//! - [`state`] owns the order of begin, break, end and abort without a device; [`writer`] drives the device between
//!   those transitions, puts each [`step`] on the tape, and aborts when it is dropped.

pub(crate) mod breaks;
pub(crate) mod bridge;
pub(crate) mod context;
pub(crate) mod eager;
pub(crate) mod freeze;
pub(crate) mod state;
pub(crate) mod step;
pub(crate) mod writer;
