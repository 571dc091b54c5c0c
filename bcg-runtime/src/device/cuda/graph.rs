//! Captures and graphs.
//!
//! Captures are thread-local: other threads of the process may allocate, load modules and copy meanwhile, which the
//! global mode would answer with an error on their side or a spoilt capture on ours; and this thread stays protected
//! from calls that a replay could not repeat, which the relaxed mode would let pass silently. The few calls off the
//! launch path that are harmless during a capture step out of that protection one by one (`CudaBackend::enter`).
//! The price: a capture must end on the thread that began it.

use std::sync::atomic::Ordering;

use super::super::traits::{ExecHandle, GraphBackend, GraphHandle, NodeCounts, NodeHandle, Part, StreamHandle};
use super::merge::Merge;
use super::sys::CAPTURE_INVALIDATED;
use super::{CudaBackend, OpenCapture};
use crate::op::Op;
use crate::{Error, Result};

impl GraphBackend for CudaBackend {
    fn begin_capture(&self, stream: StreamHandle) -> Result<()> {
        let mut gate = self.gate();
        self.bind_again()?;
        self.driver.begin_capture(stream.0)?;
        let thread = std::thread::current().id();
        gate.captures.push(OpenCapture { context: self.context, stream: stream.0, thread, is_spoilt: false });
        self.gate.num_captures.store(gate.captures.len(), Ordering::Release);
        Ok(())
    }

    fn end_capture(&self, stream: StreamHandle) -> Result<GraphHandle> {
        self.bind()?;
        let is_own = |capture: &OpenCapture| (capture.context, capture.stream) == (self.context, stream.0);
        let is_spoilt = self.gate().captures.iter().any(|capture| is_own(capture) && capture.is_spoilt);
        if is_spoilt {
            self.abort_capture(stream);
            return Err(self.driver.error("cuStreamEndCapture", CAPTURE_INVALIDATED));
        }
        match self.driver.end_capture(stream.0) {
            Ok(graph) if graph != 0 => {
                self.capture_ended(stream.0);
                Ok(GraphHandle(graph))
            }
            ended => {
                self.abort_capture(stream);
                let null_graph = || self.driver.error("cuStreamEndCapture", CAPTURE_INVALIDATED);
                Err(ended.err().unwrap_or_else(null_graph))
            }
        }
    }

    fn abort_capture(&self, stream: StreamHandle) {
        self.enter_and_log(|driver| {
            if driver.is_capturing(stream.0)? {
                // Ending an invalidated capture returns the error that invalidated it, and ends it all the same.
                match driver.end_capture(stream.0) {
                    Ok(0) => {}
                    Ok(graph) => driver.destroy_graph(graph)?,
                    Err(error) => tracing::debug!(%error, "the aborted capture was invalid"),
                }
            }
            Ok(())
        });
        // A context that no longer answers holds no capture either.
        if self.driver.is_capturing(stream.0).unwrap_or(false) {
            tracing::warn!(device = %self.name, "a stream still captures: captures end on the thread that began them");
        } else {
            self.capture_ended(stream.0);
        }
    }

    fn node_counts(&self, graph: GraphHandle) -> Result<NodeCounts> {
        self.bind()?;
        let mut counts = NodeCounts::default();
        for node in self.driver.graph_nodes(graph.0)? {
            count_node(&mut counts, self.driver.node_type(node)?);
        }
        Ok(counts)
    }

    fn instantiate(&self, graph: GraphHandle) -> Result<ExecHandle> {
        let _relaxed = self.enter()?;
        let exec = self.driver.instantiate(graph.0)?;
        if exec == 0 {
            let what = "instantiating: the driver returned no executable graph and no error";
            return Err(Error::other(what));
        }
        Ok(ExecHandle(exec))
    }

    fn update_exec(&self, exec: ExecHandle, graph: GraphHandle) -> Result<bool> {
        self.bind()?;
        self.driver.update_exec(exec.0, graph.0)
    }

    fn launch_graph(&self, exec: ExecHandle, stream: StreamHandle) -> Result<()> {
        self.bind()?;
        self.driver.launch_graph(exec.0, stream.0)
    }

    fn merge(&self, _stream: StreamHandle, parts: &[Part<'_>]) -> Result<Option<(GraphHandle, Vec<NodeHandle>)>> {
        let _relaxed = self.enter()?;
        let graph = self.driver.create_graph()?;
        match Merge::new(self, graph).add_all(parts) {
            Ok(Some(nodes)) => Ok(Some((GraphHandle(graph), nodes))),
            refused => {
                self.destroy_graph(GraphHandle(graph));
                refused.map(|_| None)
            }
        }
    }

    fn patch(&self, exec: ExecHandle, node: NodeHandle, op: &Op) -> Result<bool> {
        self.bind()?;
        self.set_node(exec.0, node.0, op)
    }

    fn destroy_graph(&self, graph: GraphHandle) {
        self.enter_and_log(|driver| driver.destroy_graph(graph.0));
    }

    fn destroy_exec(&self, exec: ExecHandle) {
        // One that still runs is freed by the driver when it has finished.
        self.enter_and_log(|driver| driver.destroy_exec(exec.0));
    }
}

/// Counts a node by its `CUgraphNodeType`; types that newer drivers add are `other`.
fn count_node(counts: &mut NodeCounts, kind: u32) {
    const KERNEL: u32 = 0;
    const MEMCPY: u32 = 1;
    const MEMSET: u32 = 2;
    const MEM_ALLOC: u32 = 10;
    const MEM_FREE: u32 = 11;
    *match kind {
        KERNEL => &mut counts.kernels,
        MEMCPY => &mut counts.copies,
        MEMSET => &mut counts.fills,
        MEM_ALLOC | MEM_FREE => &mut counts.memory,
        _ => &mut counts.other,
    } += 1;
}

#[cfg(test)]
mod tests {
    use super::*;
    use cudarc::driver::sys::CUgraphNodeType as Kind;

    #[test]
    fn every_node_is_counted_once_under_its_kind() {
        let kinds = [
            Kind::CU_GRAPH_NODE_TYPE_KERNEL,
            Kind::CU_GRAPH_NODE_TYPE_MEMCPY,
            Kind::CU_GRAPH_NODE_TYPE_MEMSET,
            Kind::CU_GRAPH_NODE_TYPE_MEM_ALLOC,
            Kind::CU_GRAPH_NODE_TYPE_MEM_FREE,
            Kind::CU_GRAPH_NODE_TYPE_EMPTY,
            Kind::CU_GRAPH_NODE_TYPE_GRAPH,
        ];
        let mut counts = NodeCounts::default();
        kinds.iter().for_each(|kind| count_node(&mut counts, *kind as u32));
        count_node(&mut counts, 1000); // of a driver yet to come
        assert_eq!(counts, NodeCounts { kernels: 1, copies: 1, fills: 1, memory: 2, other: 3 });
        assert_eq!(counts.total(), 8);
    }
}
