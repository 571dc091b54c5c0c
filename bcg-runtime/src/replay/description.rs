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
    /// The number of executables that do the work of several segments and the breaks between them.
    pub num_merged: usize,
    /// The bytes of the arena that a replay uses.
    pub extent_bytes: usize,
    /// The arena's blocks, in the order in which the forward takes them.
    pub blocks: Vec<BlockLifetime>,
    /// The host time of the capture, its run included.
    pub capture_time: Duration,
}

/// One segment of a graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentDescription {
    /// Whether no work was captured, so that the segment costs no launch.
    pub is_empty: bool,
    /// The number of graph nodes.
    pub num_nodes: usize,
    /// The number of copies among the nodes.
    pub num_copies: usize,
    /// The number of fills among the nodes.
    pub num_fills: usize,
    /// The captured kernels, in order.
    pub kernels: Vec<&'static str>,
}

/// One eager break of a graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BreakDescription {
    /// The name of the annotated function.
    pub name: &'static str,
    /// The file that the function is in.
    pub file: &'static str,
    /// The line of the function.
    pub line: u32,
    /// The index of the segment before the break.
    pub after_segment: usize,
    /// The number of kernels that the break launched at capture.
    pub num_launches: usize,
    /// The number of frozen tensors among the break's arguments.
    pub num_args: usize,
    /// The bytes of the break's outputs.
    pub bridge_bytes: usize,
    /// What the break did that a merged executable cannot hold, so that each replay runs it as a break of its own;
    /// `None` if it heals.
    pub not_healable: Option<&'static str>,
    /// How many nodes of the break's work healed replays have patched so far.
    pub num_patched: u64,
}
