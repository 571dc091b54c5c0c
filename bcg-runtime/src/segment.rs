//! A segment: one executable CUDA graph between two breaks, its own or one shared with equal segments.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::arena::{BlockRecord, FrozenTensor};
use crate::capture::breaks::BreakSite;
use crate::device::traits::NodeCounts;
use crate::device::{Graph, GraphExec, Stream};
use crate::{Eager, Error, Result};

/// One executable graph, or nothing where no work was captured.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) exec: Executable,
    pub(crate) nodes: NodeCounts,
    pub(crate) kernels: Vec<&'static str>,
}

/// What a segment launches.
#[derive(Debug)]
pub(crate) enum Executable {
    /// An empty segment, which costs no launch.
    Empty,
    /// Its own executable.
    Own(GraphExec),
    /// An executable that equal segments share, and the graph that it is updated to before this segment's launch.
    Shared { exec: Arc<SharedExec>, graph: Graph, segment: usize },
}

/// An executable of several segments.
#[derive(Debug)]
pub(crate) struct SharedExec {
    exec: GraphExec,
    /// The segment whose graph it holds.
    holds: AtomicUsize,
}

impl Segment {
    pub(crate) fn is_empty(&self) -> bool {
        matches!(self.exec, Executable::Empty)
    }

    pub(crate) fn launch(&self, stream: &Stream) -> Result<()> {
        match &self.exec {
            Executable::Empty => Ok(()),
            Executable::Own(exec) => exec.launch(stream),
            Executable::Shared { exec, graph, segment } => {
                // Replays of one graph never overlap on the host: they borrow its runner.
                if exec.holds.load(Ordering::Relaxed) != *segment {
                    if !exec.exec.update(graph)? {
                        let what = "the driver no longer updates a shared executable to this segment, as it did at \
                                    capture; capture again without GraphOptions::shares_executables";
                        return Err(Error::other(what));
                    }
                    exec.holds.store(*segment, Ordering::Relaxed);
                }
                exec.exec.launch(stream)
            }
        }
    }

    /// Makes the executable of segment number `segment`, that of an equal one of `earlier` if there is one.
    pub(crate) fn shared<'a>(
        graph: Graph,
        segment: usize,
        nodes: NodeCounts,
        kernels: &[&'static str],
        earlier: impl Iterator<Item = &'a Self>,
    ) -> Result<Executable> {
        let equal = earlier.filter(|earlier| earlier.nodes == nodes && earlier.kernels == kernels);
        for other in equal {
            if let Executable::Shared { exec, .. } = &other.exec
                && exec.exec.update(&graph)?
            {
                exec.holds.store(segment, Ordering::Relaxed);
                return Ok(Executable::Shared { exec: Arc::clone(exec), graph, segment });
            }
        }
        let exec = Arc::new(SharedExec { exec: graph.instantiate()?, holds: AtomicUsize::new(segment) });
        Ok(Executable::Shared { exec, graph, segment })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::device::Allocation;

    #[test]
    fn a_shared_executable_that_cannot_be_updated_is_never_launched() -> Result<()> {
        let device = Device::host();
        let (stream, memory) = (Stream::new(&device, "main")?, Allocation::new(&device, 4)?);
        let captured = |num_fills: usize| {
            device.backend().begin_capture(stream.handle())?;
            (0..num_fills).try_for_each(|_| device.backend().fill_u8(stream.handle(), memory.ptr(), 1, 4))?;
            Graph::end_capture(&stream)
        };
        let (one, two) = (captured(1)?, captured(2)?);
        let exec = Arc::new(SharedExec { exec: one.instantiate()?, holds: AtomicUsize::new(0) });
        let exec = Executable::Shared { exec, graph: two, segment: 1 };
        let segment = Segment { exec, nodes: NodeCounts::default(), kernels: Vec::new() };
        let refused = segment.launch(&stream).expect_err("another structure");
        assert!(refused.to_string().contains("shares_executables"), "{refused}");
        Ok(())
    }
}
