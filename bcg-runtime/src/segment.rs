//! A segment: the work captured between two breaks, as an executable graph that segments with the same kernels share.
//!
//! Such as the segments of a model's layers: on an H200 sharing saves about 0.1 MiB of device memory a segment and
//! costs 0.7 to 5 µs of host time a launch (docs/BENCHMARKS.md). Where breaks heal, a merged executable does the work
//! of many segments, and theirs are launched one by one only where a replay falls back to the chain.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::device::traits::NodeCounts;
use crate::device::{Graph, GraphExec, Stream};
use crate::{Error, Result};

/// What was captured between two breaks. Its executable is made at its first launch, which may never come: a merged
/// executable does the work of many segments.
#[derive(Debug)]
pub(crate) struct Segment {
    /// Its place among the segments of its graph.
    pub(crate) index: usize,
    /// The captured work; `None` if there was none, and then a launch costs nothing.
    pub(crate) graph: Option<Graph>,
    pub(crate) nodes: NodeCounts,
    pub(crate) kernels: Vec<&'static str>,
    /// Stands for the geometries of these kernels: the same on all ranks.
    pub(crate) geometry: u64,
    /// The first piece of work is a kernel that may start before the one ahead of it has ended.
    pub(crate) is_programmatic: bool,
    /// Where the segments of one graph find each other's executables.
    pub(crate) pool: Arc<SharedExecs>,
    /// The executable, updated to this segment's graph before a launch if it holds another one.
    pub(crate) exec: OnceLock<Arc<SharedExec>>,
}

/// The executables that segments of one graph share.
pub(crate) type SharedExecs = Mutex<Vec<Arc<SharedExec>>>;

/// An executable of one segment or of several.
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
        let shared = self.executable(graph)?;
        // Replays of one graph never overlap on the host: they borrow its runner.
        if shared.holds.load(Ordering::Relaxed) != self.index {
            if !shared.exec.update(graph)? {
                let what = "the driver no longer updates a shared executable to this segment, as it did before; capture \
                            the graph again";
                return Err(Error::other(what));
            }
            shared.holds.store(self.index, Ordering::Relaxed);
        }
        shared.exec.launch(stream)
    }

    /// Returns the nodes of the executable if it was made for this segment, and 0 if it was made for an equal one.
    pub(crate) fn num_exec_nodes(&self) -> usize {
        match self.exec.get() {
            Some(shared) if shared.made_by == self.index => self.nodes.total(),
            _ => 0,
        }
    }

    /// Makes the executable now, so that the first launch need not.
    pub(crate) fn prepare(&self) -> Result<()> {
        self.graph.as_ref().map_or(Ok(()), |graph| self.executable(graph).map(|_| ()))
    }

    /// Gives the executable up; one that still runs finishes first.
    pub(crate) fn forget_executable(&mut self) {
        self.exec = OnceLock::new();
        self.pool.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn executable(&self, graph: &Graph) -> Result<&SharedExec> {
        if let Some(exec) = self.exec.get() {
            return Ok(exec);
        }
        let exec = self.shared(graph)?;
        Ok(self.exec.get_or_init(|| exec))
    }

    /// Returns the executable of an equal segment, or a new one.
    fn shared(&self, graph: &Graph) -> Result<Arc<SharedExec>> {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::device::Allocation;
    use crate::op::Op;

    #[test]
    fn a_shared_executable_that_cannot_be_updated_is_never_launched() -> Result<()> {
        let device = Device::host();
        let (stream, memory) = (Stream::new(&device, "main")?, Allocation::new(&device, 4)?);
        let captured = |index: usize, exec: OnceLock<Arc<SharedExec>>| {
            device.backend().begin_capture(stream.handle())?;
            (0..=index).try_for_each(|_| {
                device.backend().enqueue(stream.handle(), &Op::Fill { dst: memory.ptr(), byte: 1, bytes: 4 })
            })?;
            let graph = Some(Graph::end_capture(&stream)?);
            let (nodes, kernels, pool) = (NodeCounts::default(), Vec::new(), Arc::default());
            Ok::<_, Error>(Segment { index, graph, nodes, kernels, geometry: 0, is_programmatic: false, pool, exec })
        };
        let one = captured(0, OnceLock::new())?;
        one.launch(&stream)?;
        let two = captured(1, one.exec)?; // has two nodes, and the executable of one
        let refused = two.launch(&stream).expect_err("another structure");
        assert!(refused.to_string().contains("capture the graph again"), "{refused}");
        Ok(())
    }
}
