//! A segment: the work captured between two breaks, as one executable graph, its own or one shared with equal segments.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::arena::{Arena, BlockRecord, FrozenTensor};
use crate::capture::breaks::BreakSite;
use crate::device::traits::NodeCounts;
use crate::device::{Graph, GraphExec, Stream};
use crate::{Eager, Error, Result};

/// What was captured between two breaks. Its executable is made at its first launch, which may never come: a merged
/// executable does the work of many segments.
#[derive(Debug)]
pub(crate) struct Segment {
    /// Among the segments of its graph.
    pub(crate) index: usize,
    /// Nothing if no work was captured: launching that costs nothing.
    pub(crate) graph: Option<Graph>,
    pub(crate) nodes: NodeCounts,
    pub(crate) kernels: Vec<&'static str>,
    /// The first piece of work is a kernel that may start before the one ahead of it has ended.
    pub(crate) is_programmatic: bool,
    /// Where equal segments find each other's executables; `None` if each has its own.
    pub(crate) pool: Option<Arc<SharedExecs>>,
    pub(crate) exec: OnceLock<Executable>,
}

/// What a segment launches.
#[derive(Debug)]
pub(crate) enum Executable {
    /// Its own executable.
    Own(GraphExec),
    /// One that equal segments share, and that is updated to this segment's graph before its launch.
    Shared(Arc<SharedExec>),
}

/// The executables that segments of one graph share.
pub(crate) type SharedExecs = Mutex<Vec<Arc<SharedExec>>>;

/// An executable of several segments.
#[derive(Debug)]
pub(crate) struct SharedExec {
    exec: GraphExec,
    nodes: NodeCounts,
    kernels: Vec<&'static str>,
    /// The segment whose graph it was made from.
    made_by: usize,
    /// The segment whose graph it holds.
    holds: AtomicUsize,
}

impl Segment {
    pub(crate) fn is_empty(&self) -> bool {
        self.graph.is_none()
    }

    pub(crate) fn launch(&self, stream: &Stream) -> Result<()> {
        let Some(graph) = &self.graph else { return Ok(()) };
        match self.executable(graph)? {
            Executable::Own(exec) => exec.launch(stream),
            Executable::Shared(shared) => {
                // Replays of one graph never overlap on the host: they borrow its runner.
                if shared.holds.load(Ordering::Relaxed) != self.index {
                    if !shared.exec.update(graph)? {
                        let what = "the driver no longer updates a shared executable to this segment, as it did before; \
                                    capture again without GraphOptions::shares_executables";
                        return Err(Error::other(what));
                    }
                    shared.holds.store(self.index, Ordering::Relaxed);
                }
                shared.exec.launch(stream)
            }
        }
    }

    /// Returns the nodes of its own executable, if it is there; the first segment of equal ones owns a shared one.
    pub(crate) fn num_exec_nodes(&self) -> usize {
        match self.exec.get() {
            Some(Executable::Own(_)) => self.nodes.total(),
            Some(Executable::Shared(shared)) if shared.made_by == self.index => self.nodes.total(),
            Some(Executable::Shared(_)) | None => 0,
        }
    }

    /// Makes the executable now, so that the first launch need not.
    pub(crate) fn prepare(&self) -> Result<()> {
        self.graph.as_ref().map_or(Ok(()), |graph| self.executable(graph).map(|_| ()))
    }

    /// Gives the executable up; one that still runs finishes first.
    pub(crate) fn forget_executable(&mut self) {
        self.exec = OnceLock::new();
        if let Some(pool) = &self.pool {
            pool.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
    }

    fn executable(&self, graph: &Graph) -> Result<&Executable> {
        if let Some(exec) = self.exec.get() {
            return Ok(exec);
        }
        let exec = match &self.pool {
            None => Executable::Own(graph.instantiate()?),
            Some(pool) => Executable::Shared(self.shared(graph, pool)?),
        };
        Ok(self.exec.get_or_init(|| exec))
    }

    /// Returns the executable of an equal segment, or a new one.
    fn shared(&self, graph: &Graph, pool: &SharedExecs) -> Result<Arc<SharedExec>> {
        let mut pool = pool.lock().unwrap_or_else(PoisonError::into_inner);
        for shared in pool.iter().filter(|shared| shared.nodes == self.nodes && shared.kernels == self.kernels) {
            if shared.exec.update(graph)? {
                shared.holds.store(self.index, Ordering::Relaxed);
                return Ok(Arc::clone(shared));
            }
        }
        let (exec, kernels, made_by) = (graph.instantiate()?, self.kernels.clone(), self.index);
        let holds = AtomicUsize::new(made_by);
        let shared = Arc::new(SharedExec { exec, nodes: self.nodes, kernels, made_by, holds });
        pool.push(Arc::clone(&shared));
        Ok(shared)
    }
}

/// The body of a break with its frozen arguments and outputs.
pub(crate) type BreakFn<L> = Box<dyn Fn(&mut Eager<'_, L>, &Arena) -> Result<()> + Send + Sync>;

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
    /// Why its work cannot become nodes of a merged executable, if so.
    pub(crate) not_healable: Option<&'static str>,
}

/// One step of a graph.
pub(crate) enum Step<L> {
    Segment(Arc<Segment>),
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
        let captured = |index: usize, exec: OnceLock<Executable>| {
            device.backend().begin_capture(stream.handle())?;
            (0..=index).try_for_each(|_| device.backend().fill_u8(stream.handle(), memory.ptr(), 1, 4))?;
            let graph = Some(Graph::end_capture(&stream)?);
            let (nodes, kernels, pool) = (NodeCounts::default(), Vec::new(), Some(Arc::default()));
            Ok::<_, Error>(Segment { index, graph, nodes, kernels, is_programmatic: false, pool, exec })
        };
        let one = captured(0, OnceLock::new())?;
        one.launch(&stream)?;
        let two = captured(1, one.exec)?; // has two nodes, and the executable of one
        let refused = two.launch(&stream).expect_err("another structure");
        assert!(refused.to_string().contains("shares_executables"), "{refused}");
        Ok(())
    }
}
