//! Replay: the segments and breaks of a graph, in order, on the live batch.
//!
//! [`chain`] alternates graph launches and breaks; [`verify`] compares a replay with an eager run.

pub(crate) mod chain;
pub(crate) mod verify;
