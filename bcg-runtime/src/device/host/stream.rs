//! Streams of the host device: where work is enqueued, captured or waited for.
//!
//! Invariants: `last` is the stream's latest operation outside of captures; a stream captures exactly while `capture`
//! names an open capture of `graph.rs`, whose `members` then hold the stream.

use std::sync::MutexGuard;

use super::queue::OpRef;
use super::work::{Work, check_copy, check_dims};
use super::{HostBackend, State};
use crate::device::traits::{StreamBackend, StreamHandle};
use crate::op::{Op, RowCopy};
use crate::{DevicePtr, Error, Result};

#[derive(Debug)]
pub(super) struct StreamState {
    pub(super) lane: u32,
    pub(super) last: OpRef,
    /// The open capture that the stream is part of.
    pub(super) capture: Option<u64>,
    /// Nodes of the capture that the stream's next node depends on.
    pub(super) frontier: Vec<u32>,
}

impl State {
    pub(super) fn stream(&mut self, stream: StreamHandle) -> &mut StreamState {
        self.streams.get_mut(&stream.0).expect("guards pass live streams only")
    }

    /// Adds `work` to the stream's capture, or queues it.
    pub(super) fn enqueue(&mut self, call: &'static str, stream: StreamHandle, work: Work) -> Result<()> {
        let (lane, last, capture) = {
            let stream = self.stream(stream);
            (stream.lane, stream.last, stream.capture)
        };
        if let Some(capture) = capture {
            return self.add_node(call, capture, stream, work);
        }
        let op = self.queue.push(lane, work, last, OpRef::default());
        self.stream(stream).last = op;
        self.queue.trim(&self.memory);
        Ok(())
    }

    /// Returns what a piece of work does here, after the driver's checks.
    pub(super) fn work(&self, op: &Op) -> Result<Work> {
        match op {
            Op::Launch(launch) => check_dims(&launch.dims).map(|()| Work::Launch(launch.clone())),
            Op::Fill { dst, byte, bytes } => Ok(Work::Fill { dst: *dst, pattern: [*byte; 4], bytes: *bytes }),
            Op::Copy(copy) => check_copy(copy).map(|()| Work::Copy { name: "copy", copy: *copy }),
            Op::CopyFromPinned { dst, src, bytes } => self.work_from_pinned(*dst, *src, *bytes),
        }
    }

    fn work_from_pinned(&self, dst: DevicePtr, src: DevicePtr, bytes: usize) -> Result<Work> {
        if bytes > 0 && !self.memory.is_pinned(src) {
            let message = format!("the source {:#x} is not pinned memory", src.0);
            return Err(Error::Memory { kernel: "copy from pinned".to_owned(), message });
        }
        Ok(Work::Copy { name: "copy from pinned", copy: RowCopy::piece(dst, src, bytes) })
    }

    /// Refuses a call on a stream that captures, which spoils the capture as on CUDA.
    pub(super) fn refuse_on_capturing(&mut self, stream: StreamHandle, what: &str) -> Result<()> {
        match self.stream(stream).capture {
            Some(capture) => Err(self.forbid(capture, what.to_owned())),
            None => Ok(()),
        }
    }
}

impl HostBackend {
    /// Runs `op` and returns what kept it from doing its work, with the device locked again.
    pub(super) fn synchronize_op<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        op: OpRef,
    ) -> Result<MutexGuard<'a, State>> {
        let mut state = self.run_until(state, op);
        state.queue.outcome(op).map(|()| state)
    }

    fn synchronize_latest<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        stream: StreamHandle,
    ) -> Result<MutexGuard<'a, State>> {
        let last = state.stream(stream).last;
        self.synchronize_op(state, last)
    }
}

impl StreamBackend for HostBackend {
    fn create_stream(&self, name: &str) -> Result<StreamHandle> {
        let state = &mut *self.enter("cuStreamCreate")?;
        let (handle, lane) = (state.new_handle(), state.lane(name));
        let stream = StreamState { lane, last: OpRef::default(), capture: None, frontier: Vec::new() };
        state.streams.insert(handle, stream);
        Ok(StreamHandle(handle))
    }

    fn destroy_stream(&self, stream: StreamHandle) {
        let mut state = self.lock();
        state.abandon(stream);
        state.streams.remove(&stream.0);
        self.release_due(state);
    }

    fn synchronize_stream(&self, stream: StreamHandle) -> Result<()> {
        let mut state = self.enter("cuStreamSynchronize")?;
        state.refuse_on_capturing(stream, "cuStreamSynchronize of a capturing stream; synchronise in a break")?;
        self.synchronize_latest(state, stream).map(drop)
    }

    fn synchronize(&self) -> Result<()> {
        let mut state = self.enter("cuCtxSynchronize")?;
        if let Some(capture) = state.capture_of_this_thread() {
            return Err(state.forbid(capture, "cuCtxSynchronize; synchronise in a break".to_owned()));
        }
        self.run_all(state).queue.outcome_of_all()
    }

    fn enqueue(&self, stream: StreamHandle, op: &Op) -> Result<()> {
        let call = match op {
            Op::Launch(_) => "cuLaunchKernel",
            Op::Fill { .. } => "cuMemsetD8Async",
            Op::Copy(copy) if copy.rows == 1 => "cuMemcpyDtoDAsync",
            Op::Copy(_) => "cuMemcpy2DAsync",
            Op::CopyFromPinned { .. } => "cuMemcpyAsync",
        };
        let mut state = self.enter(call)?;
        let work = state.work(op)?;
        state.enqueue(call, stream, work)
    }

    fn fill_u32(&self, stream: StreamHandle, dst: DevicePtr, value: u32, count: usize) -> Result<()> {
        let mut state = self.enter("cuMemsetD32Async")?;
        if !dst.0.is_multiple_of(4) {
            return Err(Error::driver("cuMemsetD32Async", 1, "CUDA_ERROR_INVALID_VALUE"));
        }
        let work = Work::Fill { dst, pattern: value.to_ne_bytes(), bytes: count * 4 };
        state.enqueue("cuMemsetD32Async", stream, work)
    }

    fn copy_from_host(&self, stream: StreamHandle, dst: DevicePtr, src: &[u8]) -> Result<()> {
        let mut state = self.enter("cuMemcpyHtoDAsync")?;
        state.refuse_on_capturing(stream, "a copy from pageable host memory; copy from a PinnedBuffer")?;
        state.enqueue("cuMemcpyHtoDAsync", stream, Work::Upload { dst, data: src.into() })
    }

    fn copy_rows_from_host(
        &self,
        stream: StreamHandle,
        dst: DevicePtr,
        pitch: usize,
        row_bytes: usize,
        src: &[u8],
    ) -> Result<()> {
        let rows = src.chunks(row_bytes.max(1)).enumerate();
        rows.into_iter().try_for_each(|(row, data)| self.copy_from_host(stream, dst.offset_bytes(row * pitch), data))
    }

    fn copy_to_host(&self, stream: StreamHandle, dst: &mut [u8], src: DevicePtr) -> Result<()> {
        let mut state = self.enter("cuMemcpyDtoHAsync")?;
        state.refuse_on_capturing(stream, "a copy to the host; read in a break")?;
        let state = self.synchronize_latest(state, stream)?;
        let _turn = state.memory.turn();
        state.memory.read("copy to host", dst, src)
    }

    fn copy_to_pinned(&self, stream: StreamHandle, dst: DevicePtr, src: DevicePtr, bytes: usize) -> Result<()> {
        let mut state = self.enter("cuMemcpyDtoHAsync")?;
        state.refuse_on_capturing(stream, "a copy to the host; read in a break")?;
        let work = Work::Copy { name: "copy to pinned", copy: RowCopy::piece(dst, src, bytes) };
        state.enqueue("cuMemcpyDtoHAsync", stream, work)
    }
}

#[cfg(test)]
mod tests {
    use super::super::HostOptions;
    use super::super::queue::FAILURES_MAX;
    use super::super::testing::{PANIC, PanicArgs, Rig};
    use super::*;
    use crate::Dims;
    use crate::device::traits::MemoryBackend;
    use crate::launch::Launch;

    #[test]
    fn work_runs_late_and_in_stream_order() {
        let rig = Rig::new();
        let (stream, log) = (rig.stream("main"), rig.log());
        (0..20).for_each(|value| rig.append(stream, log, value).unwrap());
        assert_eq!(rig.control.num_pending(), 20);
        assert_eq!(rig.read_log(log), Vec::from_iter(0..20));
    }

    #[test]
    fn streams_without_events_run_in_every_order() {
        let rig = Rig::new();
        let (a, b) = (rig.stream("a"), rig.stream("b"));
        let mut orders = std::collections::BTreeSet::new();
        for seed in 0..64 {
            rig.control.reseed(seed);
            let log = rig.log();
            (0..2).for_each(|value| rig.append(a, log, value).unwrap());
            (10..12).for_each(|value| rig.append(b, log, value).unwrap());
            orders.insert(rig.read_log(log));
        }
        assert_eq!(orders.len(), 6, "all interleavings of 0 1 and 10 11: {orders:?}");
    }

    #[test]
    fn the_same_seed_gives_the_same_order() {
        let run = || {
            let rig = Rig::with(HostOptions { seed: 9, ..HostOptions::default() });
            let log = rig.log();
            let streams = ["a", "b", "c"].map(|name| rig.stream(name));
            (0..30).for_each(|value| rig.append(streams[value as usize % 3], log, value).unwrap());
            rig.read_log(log)
        };
        assert_eq!(run(), run());
    }

    #[test]
    fn synchronising_one_stream_need_not_run_another() {
        let rig = Rig::new();
        let (a, b, log) = (rig.stream("a"), rig.stream("b"), rig.log());
        rig.control.set_delay("b", true);
        rig.append(b, log, 1).unwrap();
        rig.append(a, log, 0).unwrap();
        rig.backend.synchronize_stream(a).unwrap();
        assert_eq!(rig.control.num_pending(), 1);
        assert_eq!(rig.read_log(log), [0, 1]);
    }

    #[test]
    fn a_delayed_stream_runs_after_all_that_does_not_wait_for_it() {
        let rig = Rig::new();
        let (a, b, log) = (rig.stream("a"), rig.stream("b"), rig.log());
        rig.append(b, log, 100).unwrap();
        rig.control.set_delay("b", true);
        (0..10).for_each(|value| rig.append(a, log, value).unwrap());
        rig.order(b, a).unwrap();
        rig.append(a, log, 10).unwrap();
        assert_eq!(rig.read_log(log), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 100, 10]);
    }

    #[test]
    fn the_queue_is_bounded() {
        let rig = Rig::with(HostOptions { max_pending: 8, ..HostOptions::default() });
        let (stream, log) = (rig.stream("main"), rig.log());
        for value in 0..100 {
            rig.append(stream, log, value).unwrap();
            assert!(rig.control.num_pending() <= 8);
        }
        assert_eq!(rig.read_log(log), Vec::from_iter(0..100));
    }

    #[test]
    fn a_failure_skips_what_depends_on_it_and_is_returned_once() {
        let rig = Rig::new();
        let (a, b, log) = (rig.stream("a"), rig.stream("b"), rig.log());
        rig.append(a, log, 1).unwrap();
        rig.fail_later(a);
        rig.append(a, log, 2).unwrap();
        rig.append(b, log, 3).unwrap();
        assert!(matches!(rig.backend.synchronize_stream(a), Err(Error::Memory { kernel, .. }) if kernel == "fill"));
        rig.backend.synchronize_stream(b).unwrap();
        rig.backend.synchronize_stream(a).unwrap();
        rig.append(a, log, 4).unwrap();
        let mut log = rig.read_log(log);
        log.sort_unstable();
        assert_eq!(log, [1, 3, 4]);
    }

    #[test]
    fn a_failure_that_ran_early_still_skips_later_work_of_its_stream() {
        let rig = Rig::new();
        let (stream, log) = (rig.stream("main"), rig.log());
        rig.fail_later(stream);
        rig.backend.free(rig.backend.alloc(1).unwrap()); // runs all that is queued, returns no error
        rig.append(stream, log, 1).unwrap();
        assert!(matches!(rig.backend.synchronize_stream(stream), Err(Error::Memory { .. })));
        assert_eq!(rig.read_log(log), []);
    }

    #[test]
    fn a_stream_that_waited_for_failed_work_says_that_its_own_was_skipped() {
        let rig = Rig::new();
        let (a, b, log) = (rig.stream("a"), rig.stream("b"), rig.log());
        rig.fail_later(a);
        rig.order(a, b).unwrap();
        rig.append(b, log, 1).unwrap();
        assert!(matches!(rig.backend.synchronize_stream(a), Err(Error::Memory { .. })));
        let error = rig.backend.synchronize_stream(b).unwrap_err();
        assert!(error.to_string().starts_with("work was skipped after: kernel fill"), "{error}");
        rig.append(b, log, 2).unwrap();
        assert_eq!(rig.read_log(log), [2]);
    }

    #[test]
    fn synchronising_the_device_returns_the_first_failure_and_forgets_the_rest() {
        let rig = Rig::new();
        let streams = ["a", "b"].map(|name| rig.stream(name));
        streams.iter().for_each(|stream| rig.fail_later(*stream));
        assert!(matches!(rig.backend.synchronize(), Err(Error::Memory { .. })));
        streams.iter().for_each(|stream| rig.backend.synchronize_stream(*stream).unwrap());
        rig.backend.synchronize().unwrap();
    }

    #[test]
    fn many_failures_are_bounded_and_leave_the_stream_usable() {
        let rig = Rig::new();
        let (stream, log) = (rig.stream("main"), rig.log());
        for _ in 0..200 {
            rig.fail_later(stream);
            assert!(matches!(rig.backend.synchronize_stream(stream), Err(Error::Memory { .. })));
            assert!(rig.backend.enter("a test").unwrap().queue.num_failures() <= FAILURES_MAX);
        }
        // Those that nobody has asked about are bounded too: more count as the last.
        for at in 0..200 {
            rig.fail_later(rig.stream(&format!("stream {at}")));
        }
        {
            let state = rig.backend.run_all(rig.backend.enter("a test").unwrap());
            assert_eq!(state.queue.num_failures(), FAILURES_MAX);
        }
        assert!(matches!(rig.backend.synchronize(), Err(Error::Memory { .. })));
        assert_eq!(rig.backend.enter("a test").unwrap().queue.num_failures(), 0);
        rig.append(stream, log, 1).unwrap();
        assert_eq!(rig.read_log(log), [1]);
    }

    #[test]
    fn a_panic_in_a_host_reference_is_an_error() {
        let rig = Rig::new();
        let stream = rig.stream("main");
        rig.backend
            .enqueue(stream, &Op::Launch(Launch::new(&PANIC, Dims::linear(1, 1), &PanicArgs { value: 0 })))
            .unwrap();
        let error = rig.backend.synchronize_stream(stream).unwrap_err();
        assert_eq!(error.to_string(), "panicked: host reference of kernel panic: asked for");
        rig.backend.synchronize_stream(stream).unwrap();
    }

    #[test]
    fn a_geometry_that_cuda_refuses_is_refused() {
        let rig = Rig::new();
        let stream = rig.stream("main");
        let dims = |grid, block, shared_bytes| Dims { grid, block, shared_bytes };
        for refused in [
            dims([1, 65_536, 1], [1, 1, 1], 0),
            dims([1, 1, 1], [1025, 1, 1], 0),
            dims([1, 1, 1], [512, 4, 1], 0),
            dims([1, 1, 1], [u32::MAX; 3], 0),
            dims([u32::MAX; 3], [1, 1, 1], 0),
            dims([0, 1, 1], [1, 1, 1], 0),
            dims([1, 1, 1], [1, 1, 1], 1 << 20),
        ] {
            let launched =
                rig.backend.enqueue(stream, &Op::Launch(Launch::new(&PANIC, refused, &PanicArgs { value: 0 })));
            assert!(matches!(launched, Err(Error::Driver { code: 1, .. })), "{refused:?}");
        }
        assert_eq!(rig.control.num_pending(), 0);
    }

    #[test]
    fn fills_and_pageable_copies_write_what_they_were_given() {
        let rig = Rig::new();
        let (stream, ptr) = (rig.stream("main"), rig.backend.alloc(16).unwrap());
        let mut data = vec![3u8; 4];
        rig.backend.fill_u32(stream, ptr, 0x0403_0201, 3).unwrap();
        rig.backend.copy_from_host(stream, ptr.offset_bytes(12), &data).unwrap();
        data.fill(9);
        assert_eq!(rig.read::<u8>(stream, ptr, 16).unwrap(), [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 3, 3, 3, 3]);
        assert!(rig.backend.fill_u32(stream, ptr.offset_bytes(1), 0, 1).is_err());
    }
}
