//! What a graph tells about itself.

use std::time::Duration;

use crate::BlockLifetime;

/// What a graph consists of; see [`BreakableCudaGraph`](crate::BreakableCudaGraph) for an example.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Description {
    /// The graph's name.
    pub name: String,
    /// The segments, in order.
    pub segments: Vec<SegmentDescription>,
    /// The breaks, in order.
    pub breaks: Vec<BreakDescription>,
    /// Executables that do the work of several segments and the breaks between them.
    pub num_merged: usize,
    /// Arena bytes that a replay uses.
    pub extent_bytes: usize,
    /// The arena's blocks, in the order in which the forward takes them.
    pub blocks: Vec<BlockLifetime>,
    /// Host time of the capture, its run included.
    pub capture_time: Duration,
}

/// One segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentDescription {
    /// No work was captured; the segment costs no launch.
    pub is_empty: bool,
    /// Graph nodes in all.
    pub num_nodes: usize,
    /// Copies among them.
    pub num_copies: usize,
    /// Fills among them.
    pub num_fills: usize,
    /// The captured kernels, in order.
    pub kernels: Vec<&'static str>,
}

/// One eager break.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BreakDescription {
    /// The annotated function.
    pub name: &'static str,
    /// Its file.
    pub file: &'static str,
    /// Its line.
    pub line: u32,
    /// Index of the segment before it.
    pub after_segment: usize,
    /// Kernels that it launched at capture.
    pub num_launches: usize,
    /// Frozen tensors among its arguments.
    pub num_args: usize,
    /// Bytes of its outputs.
    pub bridge_bytes: usize,
    /// What it did that a merged executable cannot hold, so that each replay runs it as a break of its own; `None` if it heals.
    pub not_healable: Option<&'static str>,
    /// Nodes of its work that healed replays have patched so far.
    pub num_patched: u64,
}
