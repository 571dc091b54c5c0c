//! Captures and graphs of the host device.
//!
//! Invariants: nodes are in the order of their recording, so a dependency has a smaller index; a graph never changes,
//! so pending launches and executables share it. A capture belongs to the thread and the stream that began it. As on
//! CUDA, a forbidden call spoils it: what follows fails, and only ending or aborting it frees its streams.

use std::collections::HashSet;
use std::sync::Arc;
use std::thread::ThreadId;

use super::queue::OpRef;
use super::work::Work;
use super::{HostBackend, State};
use crate::device::traits::{ExecHandle, GraphBackend, GraphHandle, NodeCounts, StreamHandle};
use crate::{Error, Result};

/// One operation of a graph.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) work: Work,
    pub(super) deps: Vec<u32>,
    /// The recording stream's.
    pub(super) lane: u32,
}

/// A graph that was captured.
#[derive(Debug)]
pub(super) struct GraphNodes {
    pub(super) nodes: Vec<Node>,
    /// Nodes on which no other depends.
    pub(super) leaves: Vec<u32>,
}

impl GraphNodes {
    fn new(nodes: Vec<Node>) -> Self {
        let inner: HashSet<u32> = nodes.iter().flat_map(|node| node.deps.iter().copied()).collect();
        let leaves = (0..nodes.len() as u32).filter(|idx| !inner.contains(idx)).collect();
        Self { nodes, leaves }
    }
}

/// An executable graph.
#[derive(Debug)]
pub(super) struct Exec {
    graph: Arc<GraphNodes>,
    /// Its latest launch: launches of one executable never overlap.
    last: OpRef,
}

/// An open capture.
#[derive(Debug)]
pub(super) struct Capture {
    origin: StreamHandle,
    thread: ThreadId,
    nodes: Vec<Node>,
    /// Streams in the capture, the origin first.
    members: Vec<StreamHandle>,
    spoilt: bool,
}

impl Capture {
    /// Returns a node that the origin, having `frontier`, does not wait for.
    fn unjoined(&self, frontier: &[u32]) -> Option<&Node> {
        let mut joined = vec![false; self.nodes.len()];
        frontier.iter().for_each(|idx| joined[*idx as usize] = true);
        for (idx, node) in self.nodes.iter().enumerate().rev() {
            if joined[idx] {
                node.deps.iter().for_each(|dep| joined[*dep as usize] = true);
            }
        }
        joined.iter().position(|joined| !joined).map(|idx| &self.nodes[idx])
    }
}

impl State {
    /// Returns the open capture, if any, that the calling thread began.
    pub(super) fn capture_of_this_thread(&self) -> Option<u64> {
        if self.captures.is_empty() {
            return None;
        }
        let thread = std::thread::current().id();
        self.captures.iter().find(|(_, capture)| capture.thread == thread).map(|(id, _)| *id)
    }

    /// Spoils a capture, if it is open, and says what was forbidden.
    pub(super) fn forbid(&mut self, capture: u64, what: String) -> Error {
        if let Some(capture) = self.captures.get_mut(&capture) {
            capture.spoilt = true;
        }
        Error::CaptureForbidden { what }
    }

    pub(super) fn check_valid(&self, call: &'static str, capture: u64) -> Result<()> {
        if self.captures[&capture].spoilt {
            return Err(Error::driver(call, 901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"));
        }
        Ok(())
    }

    pub(super) fn join_capture(&mut self, stream: StreamHandle, capture: u64) {
        self.captures.get_mut(&capture).expect("an open capture").members.push(stream);
        self.stream(stream).capture = Some(capture);
    }

    /// Adds a node to an open capture, after what `stream` recorded before.
    pub(super) fn record(&mut self, call: &'static str, capture: u64, stream: StreamHandle, work: Work) -> Result<()> {
        self.check_valid(call, capture)?;
        let stream = self.streams.get_mut(&stream.0).expect("guards pass live streams only");
        let nodes = &mut self.captures.get_mut(&capture).expect("an open capture").nodes;
        let idx = nodes.len() as u32;
        let deps = std::mem::replace(&mut stream.frontier, vec![idx]);
        nodes.push(Node { work, deps, lane: stream.lane });
        Ok(())
    }

    /// Adds a copy of a whole graph to an open capture.
    fn record_graph(&mut self, capture: u64, stream: StreamHandle, graph: &GraphNodes) -> Result<()> {
        self.check_valid("cuGraphLaunch", capture)?;
        let stream = self.streams.get_mut(&stream.0).expect("guards pass live streams only");
        let nodes = &mut self.captures.get_mut(&capture).expect("an open capture").nodes;
        let first = nodes.len() as u32;
        for node in &graph.nodes {
            let mut node = node.clone();
            node.deps.iter_mut().for_each(|dep| *dep += first);
            if node.deps.is_empty() {
                node.deps.clone_from(&stream.frontier);
            }
            nodes.push(node);
        }
        if !graph.leaves.is_empty() {
            stream.frontier = graph.leaves.iter().map(|leaf| leaf + first).collect();
        }
        Ok(())
    }

    /// Takes a stream that is about to go out of its capture; that of an origin is discarded.
    pub(super) fn abandon(&mut self, stream: StreamHandle) {
        let Some(id) = self.stream(stream).capture else { return };
        let capture = self.captures.get_mut(&id).expect("an open capture");
        if capture.origin == stream {
            self.close(id);
        } else {
            capture.members.retain(|member| *member != stream);
        }
    }

    /// Closes a capture: its streams are usable again, and memory that waited for its end is given back.
    fn close(&mut self, id: u64) -> Capture {
        let capture = self.captures.remove(&id).expect("an open capture");
        for member in &capture.members {
            let stream = self.stream(*member);
            stream.capture = None;
            stream.frontier.clear();
        }
        if !self.deferred.is_empty() && !self.captures.values().any(|other| other.thread == capture.thread) {
            self.queue.run_all(&self.memory);
            let (due, kept) =
                std::mem::take(&mut self.deferred).into_iter().partition(|(thread, _)| *thread == capture.thread);
            self.deferred = kept;
            let due: Vec<_> = due;
            due.into_iter().for_each(|(_, release)| self.release_now(release));
        }
        capture
    }

    fn end_capture(&mut self, stream: StreamHandle) -> Result<GraphHandle> {
        let call = "cuStreamEndCapture";
        let Some(id) = self.stream(stream).capture else {
            return Err(Error::driver(call, 401, "CUDA_ERROR_ILLEGAL_STATE"));
        };
        let frontier = self.stream(stream).frontier.clone();
        let capture = self.close(id);
        if capture.spoilt {
            return Err(Error::driver(call, 901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"));
        }
        if capture.origin != stream {
            return Err(Error::driver(call, 903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED"));
        }
        if capture.thread != std::thread::current().id() {
            return Err(Error::driver(call, 908, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD"));
        }
        if let Some(node) = capture.unjoined(&frontier) {
            let stream = self.lanes[node.lane as usize].to_string();
            return Err(Error::UnjoinedStream { stream, place: "the end of the capture".to_owned() });
        }
        let handle = self.new_handle();
        self.graphs.insert(handle, Arc::new(GraphNodes::new(capture.nodes)));
        Ok(GraphHandle(handle))
    }

    fn graph(&self, graph: GraphHandle) -> &Arc<GraphNodes> {
        self.graphs.get(&graph.0).expect("guards pass live graphs only")
    }
}

impl GraphBackend for HostBackend {
    fn begin_capture(&self, stream: StreamHandle) -> Result<()> {
        let state = &mut *self.enter("cuStreamBeginCapture")?;
        if state.stream(stream).capture.is_some() {
            let what = "cuStreamBeginCapture on a stream that captures already; end that capture first";
            return Err(Error::CaptureForbidden { what: what.to_owned() });
        }
        let id = state.new_handle();
        let thread = std::thread::current().id();
        let capture = Capture { origin: stream, thread, nodes: Vec::new(), members: Vec::new(), spoilt: false };
        state.captures.insert(id, capture);
        state.join_capture(stream, id);
        Ok(())
    }

    fn end_capture(&self, stream: StreamHandle) -> Result<GraphHandle> {
        match self.enter("cuStreamEndCapture") {
            Ok(mut state) => state.end_capture(stream),
            Err(error) => {
                self.abort_capture(stream);
                Err(error)
            }
        }
    }

    fn abort_capture(&self, stream: StreamHandle) {
        let state = &mut *self.lock();
        if let Some(id) = state.stream(stream).capture {
            state.close(id);
        }
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
        let handle = state.new_handle();
        state.execs.insert(handle, exec);
        Ok(ExecHandle(handle))
    }

    fn upload(&self, exec: ExecHandle, stream: StreamHandle) -> Result<()> {
        let state = &mut *self.enter("cuGraphUpload")?;
        state.refuse_on_capturing(stream, "cuGraphUpload to a capturing stream; upload before the capture")?;
        debug_assert!(state.execs.contains_key(&exec.0), "guards pass live executables only");
        Ok(())
    }

    fn launch_graph(&self, exec: ExecHandle, stream: StreamHandle) -> Result<()> {
        let state = &mut *self.enter("cuGraphLaunch")?;
        let exec = state.execs.get_mut(&exec.0).expect("guards pass live executables only");
        let launched = state.streams.get_mut(&stream.0).expect("guards pass live streams only");
        if let Some(capture) = launched.capture {
            let graph = Arc::clone(&exec.graph);
            return state.record_graph(capture, stream, &graph);
        }
        let op = state.queue.push_graph(launched.lane, &exec.graph, launched.last, exec.last);
        (launched.last, exec.last) = (op, op);
        state.queue.trim(&state.memory);
        Ok(())
    }

    fn destroy_graph(&self, graph: GraphHandle) {
        self.lock().graphs.remove(&graph.0);
    }

    fn destroy_exec(&self, exec: ExecHandle) {
        self.lock().execs.remove(&exec.0);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Rig;
    use super::*;
    use crate::device::traits::{EventBackend, MemoryBackend, StreamBackend};

    #[test]
    fn recorded_work_does_not_run_at_capture_and_runs_at_each_launch() {
        let rig = Rig::new();
        let (stream, log) = (rig.stream("main"), rig.log());
        let exec = rig.capture(stream, || (0..3).for_each(|v| rig.append(stream, log, v).unwrap())).unwrap();
        assert_eq!(rig.read_log(log), []);
        rig.append(stream, log, 9).unwrap();
        rig.backend.upload(exec, stream).unwrap();
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
        rig.backend.fill_u8(stream, log, 0, 4).unwrap();
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
    fn an_unjoined_fork_is_an_error_that_names_its_stream() {
        let rig = Rig::new();
        let (main, side, log) = (rig.stream("main"), rig.stream("side"), rig.log());
        rig.backend.begin_capture(main).unwrap();
        rig.order(main, side).unwrap();
        rig.append(side, log, 1).unwrap();
        let error = rig.backend.end_capture(main).unwrap_err();
        assert!(matches!(&error, Error::UnjoinedStream { stream, .. } if stream == "side"), "{error}");
        rig.append(side, log, 2).unwrap();
        rig.append(main, log, 3).unwrap();
        assert_eq!(rig.read_log(log).len(), 2);
    }

    #[test]
    fn synchronising_or_pageable_copies_spoil_a_capture() {
        let rig = Rig::new();
        let (stream, ptr) = (rig.stream("main"), rig.backend.alloc(8).unwrap());
        let forbidden: [&dyn Fn() -> Result<()>; 4] = [
            &|| rig.backend.synchronize_stream(stream),
            &|| rig.backend.synchronize(),
            &|| rig.backend.copy_from_host(stream, ptr, &[1]),
            &|| rig.backend.copy_to_host(stream, &mut [0], ptr),
        ];
        for call in forbidden {
            rig.backend.begin_capture(stream).unwrap();
            assert!(matches!(call(), Err(Error::CaptureForbidden { .. })));
            let recorded = rig.backend.fill_u8(stream, ptr, 0, 8);
            assert!(matches!(recorded, Err(Error::Driver { code: 901, .. })));
            assert!(matches!(rig.backend.end_capture(stream), Err(Error::Driver { code: 901, .. })));
            call().unwrap();
        }
    }

    #[test]
    fn the_capturing_thread_may_not_allocate_but_others_may() {
        let rig = Rig::new();
        let stream = rig.stream("main");
        let unit = rig.backend.map_granularity();
        let base = rig.backend.reserve(unit).unwrap();
        let allocate = || -> [Result<()>; 4] {
            [
                rig.backend.alloc(8).map(drop),
                rig.backend.alloc_pinned(8).map(drop),
                rig.backend.reserve(unit).map(drop),
                rig.backend.map(base, 0, unit),
            ]
        };
        rig.backend.begin_capture(stream).unwrap();
        assert!(allocate().iter().all(|result| matches!(result, Err(Error::CaptureForbidden { .. }))));
        std::thread::scope(|scope| assert!(scope.spawn(allocate).join().unwrap().iter().all(Result::is_ok)));
        assert!(rig.backend.end_capture(stream).is_err());
    }

    #[test]
    fn what_the_capturing_thread_frees_is_given_back_at_the_end_of_the_capture() {
        let rig = Rig::new();
        let (stream, ptr) = (rig.stream("main"), rig.backend.alloc(8).unwrap());
        let free_bytes = || rig.backend.memory_info().unwrap().free_bytes;
        let before = free_bytes();
        rig.backend.begin_capture(stream).unwrap();
        rig.backend.free(ptr);
        assert_eq!(free_bytes(), before);
        rig.backend.abort_capture(stream);
        assert_eq!(free_bytes(), before + 8);
    }

    #[test]
    fn a_second_capture_of_a_stream_is_refused_and_the_first_survives() {
        let rig = Rig::new();
        let (stream, log) = (rig.stream("main"), rig.log());
        rig.backend.begin_capture(stream).unwrap();
        assert!(matches!(rig.backend.begin_capture(stream), Err(Error::CaptureForbidden { .. })));
        rig.append(stream, log, 1).unwrap();
        let graph = rig.backend.end_capture(stream).unwrap();
        assert_eq!(rig.backend.node_counts(graph).unwrap().total(), 1);
        assert!(matches!(rig.backend.end_capture(stream), Err(Error::Driver { code: 401, .. })));
    }

    #[test]
    fn two_threads_capture_two_streams_at_once_while_a_third_works() {
        let rig = Rig::new();
        let barrier = std::sync::Barrier::new(3);
        let capture = |value: i32| {
            let (stream, log) = (rig.stream("capture"), rig.log());
            barrier.wait();
            rig.backend.begin_capture(stream).unwrap();
            barrier.wait();
            rig.append(stream, log, value).unwrap();
            let graph = rig.backend.end_capture(stream).unwrap();
            rig.backend.launch_graph(rig.backend.instantiate(graph).unwrap(), stream).unwrap();
            rig.backend.synchronize_stream(stream).unwrap();
            log
        };
        std::thread::scope(|scope| {
            let threads = [1, 2].map(|value| scope.spawn(move || (value, capture(value))));
            barrier.wait();
            barrier.wait();
            let (stream, log) = (rig.stream("worker"), rig.log());
            rig.append(stream, log, 3).unwrap();
            assert_eq!(rig.read_log(log), [3]);
            threads.into_iter().for_each(|thread| {
                let (value, log) = thread.join().unwrap();
                assert_eq!(rig.read_log(log), [value]);
            });
        });
    }

    #[test]
    fn an_aborted_capture_leaves_all_its_streams_usable() {
        let rig = Rig::new();
        let (main, side, log) = (rig.stream("main"), rig.stream("side"), rig.log());
        rig.backend.begin_capture(main).unwrap();
        rig.order(main, side).unwrap();
        rig.append(side, log, 1).unwrap();
        rig.backend.abort_capture(main);
        rig.backend.abort_capture(main);
        rig.append(side, log, 2).unwrap();
        rig.backend.synchronize_stream(main).unwrap();
        assert_eq!(rig.read_log(log), [2]);
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
    fn destroying_a_capturing_stream_discards_the_capture() {
        let rig = Rig::new();
        let (main, side, log) = (rig.stream("main"), rig.stream("side"), rig.log());
        rig.backend.begin_capture(main).unwrap();
        rig.order(main, side).unwrap();
        rig.backend.destroy_stream(main);
        rig.append(side, log, 1).unwrap();
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
    fn a_fault_at_the_end_of_a_capture_leaves_the_stream_usable() {
        let rig = Rig::new();
        let (stream, log) = (rig.stream("main"), rig.log());
        rig.backend.begin_capture(stream).unwrap();
        rig.control.fail_calls_named("cuStreamEndCapture", 1);
        assert!(matches!(rig.backend.end_capture(stream), Err(Error::Driver { code: 999, .. })));
        rig.append(stream, log, 1).unwrap();
        assert_eq!(rig.read_log(log), [1]);
    }

    #[test]
    fn memory_freed_after_the_capture_is_found_at_the_launch() {
        let rig = Rig::new();
        let (stream, ptr) = (rig.stream("main"), rig.backend.alloc(4).unwrap());
        let exec = rig.capture(stream, || rig.backend.fill_u8(stream, ptr, 0, 4).unwrap()).unwrap();
        rig.backend.free(ptr);
        rig.backend.launch_graph(exec, stream).unwrap();
        let error = rig.backend.synchronize_stream(stream).unwrap_err();
        assert!(error.to_string().contains("freed"), "{error}");
    }
}
