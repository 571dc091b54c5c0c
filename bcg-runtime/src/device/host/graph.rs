//! Graphs of the host device: the driver's calls that capture, instantiate and launch.
//!
//! Invariants: nodes are in the order in which they were captured, so a dependency has a smaller index; a graph never
//! changes, so pending launches and executables share it. `capture.rs` keeps the open captures.

use std::collections::HashSet;
use std::sync::Arc;

use super::queue::OpRef;
use super::work::Work;
use super::{HostBackend, State};
use crate::device::traits::{ExecHandle, GraphBackend, GraphHandle, NodeCounts, NodeHandle, Part, StreamHandle};
use crate::op::Op;
use crate::{Error, Result};

/// One operation of a graph.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) work: Work,
    pub(super) deps: Vec<u32>,
    /// The lane of the stream that was captured.
    pub(super) lane: u32,
}

/// A graph that was captured or merged.
#[derive(Clone, Debug)]
pub(super) struct GraphNodes {
    pub(super) nodes: Vec<Node>,
    /// Nodes on which no other depends.
    pub(super) leaves: Vec<u32>,
}

impl GraphNodes {
    pub(super) fn new(nodes: Vec<Node>) -> Self {
        let inner: HashSet<u32> = nodes.iter().flat_map(|node| node.deps.iter().copied()).collect();
        let leaves = (0..nodes.len() as u32).filter(|idx| !inner.contains(idx)).collect();
        Self { nodes, leaves }
    }

    /// Adds a copy of all nodes after `frontier`, which moves to the leaves.
    pub(super) fn append_to(&self, nodes: &mut Vec<Node>, frontier: &mut Vec<u32>) {
        let first = nodes.len() as u32;
        for node in &self.nodes {
            let mut node = node.clone();
            node.deps.iter_mut().for_each(|dep| *dep += first);
            if node.deps.is_empty() {
                node.deps.clone_from(frontier);
            }
            nodes.push(node);
        }
        if !self.leaves.is_empty() {
            *frontier = self.leaves.iter().map(|leaf| leaf + first).collect();
        }
    }

    /// Tells whether an executable of this graph can be updated to `other`: the same kinds of work in the same order.
    fn is_like(&self, other: &Self) -> bool {
        let is_like = |(a, b): (&Node, &Node)| a.deps == b.deps && a.lane == b.lane && a.work.is_like(&b.work);
        self.nodes.len() == other.nodes.len() && self.nodes.iter().zip(&other.nodes).all(is_like)
    }
}

/// An executable graph.
#[derive(Debug)]
pub(super) struct Exec {
    graph: Arc<GraphNodes>,
    /// Its latest launch: launches of one executable never overlap.
    last: OpRef,
}

/// Puts a merged graph together: every part depends on all of the one before.
#[derive(Default)]
struct Merge {
    nodes: Vec<Node>,
    /// Nodes of the last part on which no other depends.
    frontier: Vec<u32>,
}

impl Merge {
    fn add(&mut self, work: Work, lane: u32) -> NodeHandle {
        let idx = self.nodes.len() as u32;
        self.nodes.push(Node { work, deps: std::mem::replace(&mut self.frontier, vec![idx]), lane });
        NodeHandle(idx.into())
    }
}

impl State {
    fn graph(&self, graph: GraphHandle) -> &Arc<GraphNodes> {
        self.graphs.get(&graph.0).expect("guards pass live graphs only")
    }
}

impl GraphBackend for HostBackend {
    fn begin_capture(&self, stream: StreamHandle) -> Result<()> {
        self.enter("cuStreamBeginCapture")?.begin_capture(stream)
    }

    fn end_capture(&self, stream: StreamHandle) -> Result<GraphHandle> {
        match self.enter("cuStreamEndCapture") {
            Ok(mut state) => {
                let graph = state.end_capture(stream);
                self.release_due(state);
                graph
            }
            Err(error) => {
                self.abort_capture(stream);
                Err(error)
            }
        }
    }

    fn abort_capture(&self, stream: StreamHandle) {
        let mut state = self.lock();
        if let Some(id) = state.stream(stream).capture {
            state.close(id);
        }
        self.release_due(state);
    }

    fn node_counts(&self, graph: GraphHandle) -> Result<NodeCounts> {
        let state = self.enter("cuGraphGetNodes")?;
        let mut counts = NodeCounts::default();
        state.graph(graph).nodes.iter().for_each(|node| node.work.count(&mut counts));
        Ok(counts)
    }

    fn instantiate(&self, graph: GraphHandle) -> Result<ExecHandle> {
        let state = &mut *self.enter("cuGraphInstantiate")?;
        let exec = Exec { graph: Arc::clone(state.graph(graph)), last: OpRef::default() };
        state.memory.claim_exec(exec.graph.nodes.len())?;
        let handle = state.new_handle();
        state.execs.insert(handle, exec);
        Ok(ExecHandle(handle))
    }

    fn update_exec(&self, exec: ExecHandle, graph: GraphHandle) -> Result<bool> {
        let state = &mut *self.enter("cuGraphExecUpdate")?;
        let graph = Arc::clone(state.graph(graph));
        let exec = state.execs.get_mut(&exec.0).expect("guards pass live executables only");
        let is_like = exec.graph.is_like(&graph);
        if is_like {
            exec.graph = graph;
        }
        Ok(is_like)
    }

    fn launch_graph(&self, exec: ExecHandle, stream: StreamHandle) -> Result<()> {
        let state = &mut *self.enter("cuGraphLaunch")?;
        let exec = state.execs.get_mut(&exec.0).expect("guards pass live executables only");
        let launched = state.streams.get_mut(&stream.0).expect("guards pass live streams only");
        if let Some(capture) = launched.capture {
            let graph = Arc::clone(&exec.graph);
            return state.add_graph(capture, stream, &graph);
        }
        let op = state.queue.push_graph(launched.lane, &exec.graph, launched.last, exec.last);
        (launched.last, exec.last) = (op, op);
        state.queue.trim(&state.memory);
        Ok(())
    }

    fn merge(&self, stream: StreamHandle, parts: &[Part<'_>]) -> Result<Option<(GraphHandle, Vec<NodeHandle>)>> {
        let state = &mut *self.enter("cuGraphCreate")?;
        let lane = state.stream(stream).lane;
        let (mut merge, mut nodes) = (Merge::default(), Vec::new());
        for part in parts {
            match part {
                Part::Graph { graph, .. } => state.graph(*graph).append_to(&mut merge.nodes, &mut merge.frontier),
                Part::Op(op) => nodes.push(merge.add(state.work(op)?, lane)),
            }
        }
        let handle = state.new_handle();
        state.graphs.insert(handle, Arc::new(GraphNodes::new(merge.nodes)));
        Ok(Some((GraphHandle(handle), nodes)))
    }

    fn patch(&self, exec: ExecHandle, node: NodeHandle, op: &Op) -> Result<bool> {
        let state = &mut *self.enter(match op {
            Op::Launch(_) => "cuGraphExecKernelNodeSetParams",
            Op::Fill { .. } => "cuGraphExecMemsetNodeSetParams",
            Op::Copy(_) | Op::CopyFromPinned { .. } => "cuGraphExecMemcpyNodeSetParams",
        })?;
        let work = match state.work(op) {
            Err(Error::Driver { code: 1, .. }) => return Ok(false),
            work => work?,
        };
        let exec = state.execs.get_mut(&exec.0).expect("guards pass live executables only");
        // Launches that are queued share the graph, and keep it.
        let held = &mut Arc::make_mut(&mut exec.graph).nodes[node.0 as usize].work;
        if !held.is_like(&work) {
            return Ok(false);
        }
        *held = work;
        Ok(true)
    }

    fn destroy_graph(&self, graph: GraphHandle) {
        self.lock().graphs.remove(&graph.0);
    }

    fn destroy_exec(&self, exec: ExecHandle) {
        let state = &mut *self.lock();
        if let Some(exec) = state.execs.remove(&exec.0) {
            state.memory.free_exec(exec.graph.nodes.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Rig;
    use super::*;
    use crate::Error;
    use crate::device::traits::{MemoryBackend, StreamBackend};

    #[test]
    fn captured_work_does_not_run_at_capture_and_runs_at_each_launch() {
        let rig = Rig::new();
        let (stream, log) = (rig.stream("main"), rig.log());
        let exec = rig.capture(stream, || (0..3).for_each(|v| rig.append(stream, log, v).unwrap())).unwrap();
        assert_eq!(rig.read_log(log), []);
        rig.append(stream, log, 9).unwrap();
        rig.backend.launch_graph(exec, stream).unwrap();
        rig.backend.launch_graph(exec, stream).unwrap();
        rig.append(stream, log, 10).unwrap();
        assert_eq!(rig.read_log(log), [9, 0, 1, 2, 0, 1, 2, 10]);
    }

    #[test]
    fn an_empty_graph_is_legal_and_keeps_the_order() {
        let rig = Rig::new();
        let (stream, log) = (rig.stream("main"), rig.log());
        let exec = rig.capture(stream, || ()).unwrap();
        rig.append(stream, log, 1).unwrap();
        rig.backend.launch_graph(exec, stream).unwrap();
        rig.append(stream, log, 2).unwrap();
        assert_eq!(rig.read_log(log), [1, 2]);
    }

    #[test]
    fn a_graph_counts_its_nodes_by_kind() {
        let rig = Rig::new();
        let (stream, log) = (rig.stream("main"), rig.log());
        rig.backend.begin_capture(stream).unwrap();
        rig.append(stream, log, 1).unwrap();
        rig.backend.enqueue(stream, &Op::Fill { dst: log, byte: 0, bytes: 4 }).unwrap();
        rig.copy(stream, log.offset_bytes(4), log, 4).unwrap();
        rig.copy(stream, log.offset_bytes(8), log, 4).unwrap();
        let graph = rig.backend.end_capture(stream).unwrap();
        let counts = rig.backend.node_counts(graph).unwrap();
        assert_eq!(counts, NodeCounts { kernels: 1, fills: 1, copies: 2, memory: 0, other: 0 });
    }

    #[test]
    fn a_fork_and_join_keeps_its_edges_in_the_graph() {
        let rig = Rig::new();
        let (main, side, log) = (rig.stream("main"), rig.stream("side"), rig.log());
        let exec = rig
            .capture(main, || {
                rig.append(main, log, 0).unwrap();
                rig.order(main, side).unwrap();
                rig.append(side, log, 1).unwrap();
                rig.append(main, log, 2).unwrap();
                rig.order(side, main).unwrap();
                rig.append(main, log, 3).unwrap();
            })
            .unwrap();
        let mut orders = HashSet::new();
        for seed in 0..32 {
            rig.control.reseed(seed);
            let before = rig.read_log(log).len();
            rig.backend.launch_graph(exec, main).unwrap();
            orders.insert(rig.read_log(log)[before..].to_vec());
        }
        assert_eq!(orders, HashSet::from([vec![0, 1, 2, 3], vec![0, 2, 1, 3]]));
    }

    #[test]
    fn parallel_leaves_are_joined_before_later_work_of_the_stream() {
        for seed in 0..16 {
            let rig = Rig::new();
            rig.control.reseed(seed);
            let (main, side, log) = (rig.stream("main"), rig.stream("side"), rig.log());
            let exec = rig.capture(main, || {
                rig.order(main, side).unwrap();
                rig.append(side, log, 1).unwrap();
                rig.append(main, log, 2).unwrap();
                rig.order(side, main).unwrap();
            });
            rig.control.set_delay("side", true);
            rig.backend.launch_graph(exec.unwrap(), main).unwrap();
            rig.append(main, log, 3).unwrap();
            assert_eq!(rig.read_log(log), [2, 1, 3]);
        }
    }

    #[test]
    fn destroying_everything_while_launches_are_queued_changes_nothing() {
        let rig = Rig::new();
        let (stream, log) = (rig.stream("main"), rig.log());
        let exec = rig.capture(stream, || rig.append(stream, log, 1).unwrap()).unwrap();
        rig.backend.launch_graph(exec, stream).unwrap();
        rig.backend.destroy_exec(exec);
        rig.backend.destroy_stream(stream);
        assert_eq!(rig.read_log(log), [1]);
    }

    #[test]
    fn launches_of_one_executable_never_overlap_even_on_two_streams() {
        let rig = Rig::new();
        let (a, b, log) = (rig.stream("a"), rig.stream("b"), rig.log());
        let exec = rig.capture(a, || (0..3).for_each(|v| rig.append(a, log, v).unwrap())).unwrap();
        for _ in 0..4 {
            rig.backend.launch_graph(exec, a).unwrap();
            rig.backend.launch_graph(exec, b).unwrap();
        }
        assert_eq!(rig.read_log(log), [0, 1, 2].repeat(8));
    }

    #[test]
    fn a_graph_launched_into_a_capture_becomes_part_of_it() {
        let rig = Rig::new();
        let (stream, log) = (rig.stream("main"), rig.log());
        let inner = rig.capture(stream, || (1..3).for_each(|v| rig.append(stream, log, v).unwrap())).unwrap();
        let outer = rig.capture(stream, || {
            rig.append(stream, log, 0).unwrap();
            rig.backend.launch_graph(inner, stream).unwrap();
            rig.append(stream, log, 3).unwrap();
        });
        rig.backend.launch_graph(outer.unwrap(), stream).unwrap();
        assert_eq!(rig.read_log(log), [0, 1, 2, 3]);
    }

    #[test]
    fn a_failing_node_skips_the_rest_of_its_graph() {
        let rig = Rig::new();
        let (stream, log) = (rig.stream("main"), rig.log());
        let exec = rig.capture(stream, || {
            rig.append(stream, log, 1).unwrap();
            rig.fail_later(stream);
            rig.append(stream, log, 2).unwrap();
        });
        let exec = exec.unwrap();
        for _ in 0..2 {
            rig.backend.launch_graph(exec, stream).unwrap();
            assert!(matches!(rig.backend.synchronize_stream(stream), Err(Error::Memory { .. })));
        }
        assert_eq!(rig.read_log(log), [1, 1]);
    }

    #[test]
    fn an_executable_takes_device_memory_until_it_is_destroyed() {
        let rig = Rig::new();
        let (stream, log) = (rig.stream("main"), rig.log());
        let free_bytes = || rig.backend.memory_info().unwrap().free_bytes;
        let before = free_bytes();
        let capture = |num| rig.capture(stream, || (0..num).for_each(|v| rig.append(stream, log, v).unwrap()));
        let execs = [1, 3].map(|num| capture(num).unwrap());
        let taken = before - free_bytes();
        assert!(taken > 0 && taken.is_multiple_of(4), "{taken} bytes for 4 nodes");
        rig.backend.destroy_exec(execs[0]);
        assert_eq!(before - free_bytes(), taken / 4 * 3);
        rig.backend.destroy_exec(execs[1]);
        assert_eq!(free_bytes(), before);
    }

    #[test]
    fn memory_freed_after_the_capture_is_found_at_the_launch() {
        let rig = Rig::new();
        let (stream, ptr) = (rig.stream("main"), rig.backend.alloc(4).unwrap());
        let exec = rig
            .capture(stream, || rig.backend.enqueue(stream, &Op::Fill { dst: ptr, byte: 0, bytes: 4 }).unwrap())
            .unwrap();
        rig.backend.free(ptr);
        rig.backend.launch_graph(exec, stream).unwrap();
        let error = rig.backend.synchronize_stream(stream).unwrap_err();
        assert!(error.to_string().contains("freed"), "{error}");
    }
}
