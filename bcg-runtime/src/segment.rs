//! A segment: one executable CUDA graph between two breaks.

use std::sync::Arc;

use crate::arena::{BlockRecord, FrozenTensor};
use crate::capture::breaks::BreakSite;
use crate::device::traits::NodeCounts;
use crate::device::{GraphExec, Stream};
use crate::{Eager, Result};

/// One executable graph, or nothing where no work was captured.
#[derive(Debug)]
pub(crate) struct Segment {
    /// `None` for an empty segment, which costs no launch.
    pub(crate) exec: Option<GraphExec>,
    pub(crate) nodes: NodeCounts,
    pub(crate) kernels: Vec<&'static str>,
}

impl Segment {
    pub(crate) fn launch(&self, stream: &Stream) -> Result<()> {
        match &self.exec {
            Some(exec) => exec.launch(stream),
            None => Ok(()),
        }
    }
}

/// The body of a break with its frozen arguments and outputs.
pub(crate) type BreakFn<L> = Box<dyn Fn(&mut Eager<'_, L>) -> Result<()> + Send + Sync>;

/// One eager break of a captured graph.
pub(crate) struct Break<L> {
    pub(crate) site: &'static BreakSite,
    pub(crate) run: BreakFn<L>,
    /// The allocations that the body made at capture.
    pub(crate) blocks: Arc<[BlockRecord]>,
    pub(crate) args: Vec<FrozenTensor>,
    pub(crate) outputs: Vec<FrozenTensor>,
    /// Launches of the body at capture.
    pub(crate) launches: usize,
}

/// One step of a graph.
pub(crate) enum Step<L> {
    Segment(Segment),
    Break(Break<L>),
}
