//! Drives the device through a capture: one stream capture for each segment, launched as soon as it is instantiated,
//! unless nothing is to run. What it writes, step by step, becomes the graph's tape.
//!
//! Invariants:
//! - While the state is `Segment`, the main stream captures and [`OpStream::segment`] is there; in every other
//!   state neither is true.
//! - [`CaptureGuard`] aborts an open capture when it is dropped, so that an early return or a panic leaves the stream
//!   usable (law L5).

use std::cell::Cell;
use std::hash::Hasher as _;
use std::sync::{Arc, OnceLock};

use super::state::CaptureState;
use super::step::{Break, Step};
use crate::device::watch::Hold;
use crate::device::{Graph, PinnedBuffer};
use crate::generation::Stamp;
use crate::segment::{Segment, SharedExecs};
use crate::stream::SegmentLog;
use crate::stream::work_list::{self, Active, ListMode, Span, WorkList};
use crate::tensor::PersistentBuffer;
use crate::{Error, OpStream, Result};

thread_local! {
    /// A capture is open on this thread.
    static IS_CAPTURING: Cell<bool> = const { Cell::new(false) };
}

/// What a capture has put on its tape so far.
pub(crate) struct TapeWriter<L> {
    pub(crate) state: CaptureState,
    pub(crate) steps: Vec<Step<L>>,
    /// Segments among the steps.
    num_segments: usize,
    /// Where equal segments find each other's executables.
    pool: Arc<SharedExecs>,
    /// What can be launched as one, in order.
    pub(crate) spans: Vec<Span>,
    pub(crate) retained: Vec<Arc<PersistentBuffer>>,
    pub(crate) pinned: Vec<Arc<PinnedBuffer>>,
    pub(crate) stamps: Vec<Stamp>,
}

impl<L> TapeWriter<L> {
    fn new() -> Self {
        Self {
            state: CaptureState::Idle,
            steps: Vec::new(),
            num_segments: 0,
            pool: Arc::default(),
            spans: Vec::new(),
            retained: Vec::new(),
            pinned: Vec::new(),
            stamps: Vec::new(),
        }
    }

    /// Returns the index of the segment that is open, or that ended last.
    pub(crate) fn segment_index(&self) -> usize {
        let ended = self.num_segments;
        if self.state == CaptureState::Segment { ended } else { ended.saturating_sub(1) }
    }

    pub(crate) fn begin(&mut self, stream: &mut OpStream) -> Result<()> {
        self.state.begin()?;
        self.begin_segment(stream)
    }

    /// Ends the open segment and launches it, so that the break sees real data (law L6).
    pub(crate) fn begin_break(&mut self, stream: &mut OpStream, place: &str) -> Result<()> {
        let segment = self.segment_index();
        self.state.begin_break()?;
        self.end_segment(stream, place).inspect_err(|_| self.abort(stream)).map_err(|error| error.in_segment(segment))
    }

    pub(crate) fn end_break(&mut self, stream: &mut OpStream, step: Option<Break<L>>) -> Result<()> {
        self.state.end_break()?;
        let segment = self.segment_index();
        if let Some(mut step) = step {
            let ended = stream.end_listing().map_err(|error| error.in_break(step.site, segment));
            step.not_healable = ended.inspect_err(|_| self.abort(stream))?;
            if step.not_healable.is_some() {
                self.spans.push(work_list::take_span());
            }
            self.steps.push(Step::Break(step));
        }
        self.begin_segment(stream).inspect_err(|_| self.abort(stream)).map_err(|error| error.in_segment(segment))
    }

    /// Ends the open segment and begins another one.
    pub(crate) fn split(&mut self, stream: &mut OpStream) -> Result<()> {
        self.begin_break(stream, "break_graph()")?;
        self.end_break(stream, None)
    }

    pub(crate) fn end(&mut self, stream: &mut OpStream) -> Result<()> {
        let segment = self.segment_index();
        let mut sealed = self.state;
        sealed.end()?;
        self.end_segment(stream, "the end of the capture")
            .inspect_err(|_| self.abort(stream))
            .map_err(|error| error.in_segment(segment))?;
        self.spans.push(work_list::take_span());
        self.state = sealed;
        Ok(())
    }

    /// Gives the capture up: discards it and returns the stream to use.
    pub(crate) fn abort(&mut self, stream: &mut OpStream) {
        self.state.abort();
        if stream.segment.take().is_some() {
            stream.device().backend().abort_capture(stream.main().handle());
        }
        stream.arena().set_may_grow(true);
        stream.arena().end_claims();
        stream.reset_forks();
    }

    fn begin_segment(&mut self, stream: &mut OpStream) -> Result<()> {
        stream.device().backend().begin_capture(stream.main().handle())?;
        stream.segment = Some(SegmentLog { index: self.num_segments, ..SegmentLog::default() });
        stream.arena().set_may_grow(false);
        stream.arena().log_step(self.steps.len());
        Ok(())
    }

    fn end_segment(&mut self, stream: &mut OpStream, place: &str) -> Result<()> {
        stream.check_joined(place)?;
        // From here on the driver's capture is over, whether `end_capture` succeeds or fails.
        let log =
            stream.segment.take().ok_or(Error::CaptureState { transition: "end a segment", state: "none is open" })?;
        let graph = Graph::end_capture(stream.main())?;
        stream.arena().set_may_grow(true);
        let nodes = graph.node_counts()?;
        if log.is_broken {
            let what = "a call failed in this segment and its error was ignored; the segment misses work".to_owned();
            return Err(Error::CaptureForbidden { what });
        }
        if nodes.memory > 0 {
            let what = format!("{} memory nodes were captured; allocate through OpStream::empty", nodes.memory);
            return Err(Error::CaptureForbidden { what });
        }
        let segment = Arc::new(Segment {
            index: self.num_segments,
            graph: (nodes.kernels + nodes.copies + nodes.fills > 0).then_some(graph),
            nodes,
            kernels: log.kernels,
            geometry: log.number.finish(),
            is_programmatic: log.is_programmatic.unwrap_or(false),
            pool: Arc::clone(&self.pool),
            exec: OnceLock::new(),
        });
        work_list::pass(&segment);
        if !stream.is_dry {
            segment.launch(stream.main())?;
        }
        tracing::debug!(
            segment = self.segment_index(),
            kernels = nodes.kernels,
            nodes = nodes.total(),
            "segment captured"
        );
        self.steps.push(Step::Segment(segment));
        stream.arena().log_step(self.steps.len());
        self.num_segments += 1;
        self.retained.extend(log.retained);
        self.pinned.extend(log.pinned);
        self.stamps.extend(log.stamps);
        Ok(())
    }
}

/// Owns an open capture and aborts it on drop.
pub(crate) struct CaptureGuard<'a, L> {
    pub(crate) stream: &'a mut OpStream,
    pub(crate) writer: TapeWriter<L>,
    _list: Active,
}

impl<'a, L> CaptureGuard<'a, L> {
    /// Begins a capture; with `is_dry`, nothing runs until the guard goes. `hold` lasts until the graphs are made.
    pub(crate) fn begin(stream: &'a mut OpStream, is_dry: bool, hold: &Hold<'_>) -> Result<Self> {
        if IS_CAPTURING.replace(true) {
            let state = "another capture is open on this thread";
            return Err(Error::CaptureState { transition: "begin", state });
        }
        let list_mode = if is_dry { ListMode::CaptureAhead } else { ListMode::Capture };
        let list = Active::begin(WorkList::new(stream.main(), list_mode), hold);
        let list = list.inspect_err(|_| IS_CAPTURING.set(false))?;
        let mut guard = Self { stream, writer: TapeWriter::new(), _list: list };
        guard.writer.begin(guard.stream)?;
        guard.stream.is_dry = is_dry;
        Ok(guard)
    }

    /// Ends the capture and returns what is on the tape.
    pub(crate) fn seal(mut self) -> Result<TapeWriter<L>> {
        self.writer.end(self.stream)?;
        let mut sealed = TapeWriter::new();
        sealed.state = CaptureState::Sealed;
        Ok(std::mem::replace(&mut self.writer, sealed))
    }
}

impl<L> Drop for CaptureGuard<'_, L> {
    fn drop(&mut self) {
        IS_CAPTURING.set(false);
        self.stream.is_dry = false;
        if self.writer.state != CaptureState::Sealed {
            self.writer.abort(self.stream);
        }
    }
}
