//! Open captures of the host device.
//!
//! Invariants: a capture belongs to the thread and the stream that began it; each of its members names it in its
//! `StreamState`. As on CUDA, a forbidden call spoils it: what follows fails, and only ending or aborting it frees its
//! streams. `graph.rs` begins and ends captures, `event.rs` spreads them, `stream.rs` adds nodes to them.

use std::sync::Arc;
use std::thread::ThreadId;

use super::State;
use super::graph::{GraphNodes, Node};
use super::work::Work;
use crate::device::traits::{GraphHandle, StreamHandle};
use crate::{Error, Result};

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

    /// Adds a node to an open capture, after what `stream` added before.
    pub(super) fn add_node(
        &mut self,
        call: &'static str,
        capture: u64,
        stream: StreamHandle,
        work: Work,
    ) -> Result<()> {
        self.check_valid(call, capture)?;
        let stream = self.streams.get_mut(&stream.0).expect("guards pass live streams only");
        let nodes = &mut self.captures.get_mut(&capture).expect("an open capture").nodes;
        let idx = nodes.len() as u32;
        let deps = std::mem::replace(&mut stream.frontier, vec![idx]);
        nodes.push(Node { work, deps, lane: stream.lane });
        Ok(())
    }

    /// Adds a copy of a whole graph to an open capture.
    pub(super) fn add_graph(&mut self, capture: u64, stream: StreamHandle, graph: &GraphNodes) -> Result<()> {
        self.check_valid("cuGraphLaunch", capture)?;
        let stream = self.streams.get_mut(&stream.0).expect("guards pass live streams only");
        let nodes = &mut self.captures.get_mut(&capture).expect("an open capture").nodes;
        graph.append_to(nodes, &mut stream.frontier);
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

    /// Closes a capture: its streams are usable again, and the memory that waited for its end is due.
    pub(super) fn close(&mut self, id: u64) -> Capture {
        let capture = self.captures.remove(&id).expect("an open capture");
        for member in &capture.members {
            let stream = self.stream(*member);
            stream.capture = None;
            stream.frontier.clear();
        }
        if !self.captures.values().any(|other| other.thread == capture.thread) {
            let deferred = std::mem::take(&mut self.deferred).into_iter();
            let (due, kept): (Vec<_>, Vec<_>) = deferred.partition(|(thread, _)| *thread == capture.thread);
            self.deferred = kept;
            self.due.extend(due.into_iter().map(|(_, release)| release));
        }
        capture
    }

    pub(super) fn begin_capture(&mut self, stream: StreamHandle) -> Result<()> {
        if self.stream(stream).capture.is_some() {
            let what = "cuStreamBeginCapture on a stream that captures already; end that capture first";
            return Err(Error::CaptureForbidden { what: what.to_owned() });
        }
        let id = self.new_handle();
        let thread = std::thread::current().id();
        let capture = Capture { origin: stream, thread, nodes: Vec::new(), members: Vec::new(), spoilt: false };
        self.captures.insert(id, capture);
        self.join_capture(stream, id);
        Ok(())
    }

    pub(super) fn end_capture(&mut self, stream: StreamHandle) -> Result<GraphHandle> {
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
}

#[cfg(test)]
mod tests {
    use super::super::testing::Rig;
    use super::*;
    use crate::device::traits::{GraphBackend, MemoryBackend, StreamBackend};
    use crate::op::Op;

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
            let added = rig.backend.enqueue(stream, &Op::Fill { dst: ptr, byte: 0, bytes: 8 });
            assert!(matches!(added, Err(Error::Driver { code: 901, .. })));
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
    fn a_fault_at_the_end_of_a_capture_leaves_the_stream_usable() {
        let rig = Rig::new();
        let (stream, log) = (rig.stream("main"), rig.log());
        rig.backend.begin_capture(stream).unwrap();
        rig.control.fail_calls_named("cuStreamEndCapture", 1);
        assert!(matches!(rig.backend.end_capture(stream), Err(Error::Driver { code: 999, .. })));
        rig.append(stream, log, 1).unwrap();
        assert_eq!(rig.read_log(log), [1]);
    }
}
