//! Capture: from a forward to segments and breaks.
//!
//! [`state`] owns the order of begin, break, end and abort without a device; [`recorder`] drives the device between
//! those transitions and aborts when it is dropped; [`breaks`] is what an annotated function expands to.

pub(crate) mod breaks;
pub(crate) mod recorder;
pub(crate) mod state;
pub(crate) mod step;
