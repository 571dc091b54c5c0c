//! The record: what the breaks of a forward enqueue, in order, between its segments.
//!
//! A capture notes the work of each break beside doing it. A healed replay keeps it back, with the segments, until the
//! span is launched as one. What cannot be recorded makes the thread *leave* the record: what was kept back is enqueued
//! at once, in order, and the rest of the break runs as in a chain. So whatever a body does, it finds the device as in an
//! eager run.
//!
//! Invariants:
//! - A forward runs on one thread, and its record belongs to that thread: a body may reach the device past its context
//!   (`Device::read`, freeing memory), and those calls leave the record too.
//! - While work is kept back, nothing of the forward that comes after it was enqueued.
//! - Work of another runner inside a break is none of the record's business: nothing orders the two streams.

use std::cell::RefCell;
use std::sync::Arc;

use crate::break_site::BreakSite;
use crate::device::Stream;
use crate::device::watch::{self, Needs, Watcher};
use crate::launch::{AnyKernel, Launch};
use crate::op::Op;
use crate::segment::Segment;
use crate::{Device, Dims, Error, Result};

thread_local! {
    static RECORD: RefCell<Option<Record>> = const { RefCell::new(None) };
}

/// The break that enqueued a piece of work.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// Index among the steps of its graph.
    pub(crate) step: usize,
    /// Index of the segment before it.
    pub(crate) segment: usize,
    pub(crate) site: &'static BreakSite,
}

/// A piece of work and where it comes from.
#[derive(Clone, Debug)]
pub(crate) struct Recorded {
    pub(crate) op: Op,
    pub(crate) place: Place,
}

/// Segments in a row and the work of the breaks between them.
#[derive(Debug, Default)]
pub(crate) struct Span {
    /// The first `num_ops` are there; the others are places to write the next ones to, without moving large values.
    slots: Vec<Recorded>,
    num_ops: usize,
    /// Each with the number of ops before it.
    pub(crate) segments: Vec<(usize, Arc<Segment>)>,
}

/// What the record is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RecordMode {
    /// Work is noted and runs.
    Capture,
    /// Work is noted and nothing runs.
    CaptureAhead,
    /// Work is kept back.
    Replay,
}

/// The record of one forward.
#[derive(Debug)]
pub(crate) struct Record {
    main: Arc<Stream>,
    mode: RecordMode,
    /// The break that runs.
    place: Option<Place>,
    /// Ops when that break began.
    break_begin: usize,
    /// Why that break cannot be healed.
    left: Option<&'static str>,
    /// A call that a capture ahead could not serve.
    needs_run: Option<&'static str>,
    /// The error of a flush whose caller could not return one.
    error: Option<Error>,
    span: Span,
}

impl Record {
    pub(crate) fn new(main: &Arc<Stream>, mode: RecordMode) -> Self {
        Self {
            main: Arc::clone(main),
            mode,
            place: None,
            break_begin: 0,
            left: None,
            needs_run: None,
            error: None,
            span: Span::default(),
        }
    }

    /// Work that is enqueued now would be kept back.
    fn keeps_back(&self) -> bool {
        self.mode == RecordMode::Replay && self.left.is_none()
    }

    fn leave(&mut self, what: &'static str, needs: Needs) -> Result<()> {
        match self.mode {
            RecordMode::Replay if self.left.is_none() => {
                if self.place.is_some() {
                    self.left = Some(what);
                }
                self.span.flush(&self.main)
            }
            RecordMode::Capture | RecordMode::CaptureAhead if self.place.is_some() => {
                self.left = self.left.or(Some(what));
                if self.mode == RecordMode::CaptureAhead && needs == Needs::Results {
                    self.needs_run = Some(what); // whatever the caller makes of the error
                    return Err(Error::NeedsRun { what });
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl Span {
    /// Returns the work, in order.
    pub(crate) fn ops(&self) -> &[Recorded] {
        &self.slots[..self.num_ops]
    }

    fn push(&mut self, op: &Op, place: Place) {
        match self.slots.get_mut(self.num_ops) {
            Some(slot) => (slot.op, slot.place) = (op.clone(), place),
            None => self.slots.push(Recorded { op: op.clone(), place }),
        }
        self.num_ops += 1;
    }

    fn push_launch(&mut self, kernel: &'static dyn AnyKernel, dims: Dims, args: &[u8], place: Place) {
        match self.slots.get_mut(self.num_ops) {
            Some(Recorded { op: Op::Launch(launch), place: slot_place }) => {
                (launch.kernel, launch.dims, *slot_place) = (kernel, dims, place);
                launch.args.set(args);
            }
            Some(slot) => (slot.op, slot.place) = (Op::Launch(Launch::from_bytes(kernel, dims, args)), place),
            None => {
                let op = Op::Launch(Launch::from_bytes(kernel, dims, args));
                self.slots.push(Recorded { op, place });
            }
        }
        self.num_ops += 1;
    }

    /// Enqueues everything, in order, and forgets it.
    pub(crate) fn flush(&mut self, main: &Stream) -> Result<()> {
        let result = self.enqueue(main);
        self.clear();
        result
    }

    /// Enqueues everything, in order.
    pub(crate) fn enqueue(&self, main: &Stream) -> Result<()> {
        let enqueue = |ops: &[Recorded]| {
            ops.iter().try_for_each(|Recorded { op, place }| {
                let enqueued = main.device().backend().enqueue(main.handle(), op);
                enqueued.map_err(|error| error.in_break(place.site, place.segment))
            })
        };
        let mut next = 0;
        for (before, segment) in &self.segments {
            enqueue(&self.ops()[next..*before])?;
            next = *before;
            segment.launch(main).map_err(|error| error.in_segment(segment.index))?;
        }
        enqueue(&self.ops()[next..])
    }

    pub(crate) fn clear(&mut self) {
        self.num_ops = 0;
        self.segments.clear();
    }
}

/// Calls `f` with the record of this thread, if there is one.
fn with<R>(f: impl FnOnce(&mut Record) -> R) -> Option<R> {
    RECORD.with_borrow_mut(|record| record.as_mut().map(f))
}

/// Makes a record the thread's until it is dropped; an outer one waits meanwhile.
#[derive(Debug)]
pub(crate) struct Active {
    outer: Option<(Option<Record>, Option<Watcher>)>,
}

/// What the device tells while a record is active.
const WATCHER: Watcher = Watcher { before_call: leave, before_free: leave_in_drop };

impl Active {
    pub(crate) fn begin(record: Record) -> Self {
        Self { outer: Some((RECORD.replace(Some(record)), watch::install(Some(WATCHER)))) }
    }

    /// Ends the recording and returns the record, empty.
    pub(crate) fn end(mut self) -> Option<Record> {
        let (outer, watcher) = self.outer.take()?;
        watch::install(watcher);
        let mut record = RECORD.replace(outer)?;
        (record.place, record.left, record.error) = (None, None, None);
        record.span.clear();
        Some(record)
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        if let Some((outer, watcher)) = self.outer.take() {
            watch::install(watcher);
            RECORD.set(outer);
        }
    }
}

/// Adds a segment to the span.
pub(crate) fn pass(segment: &Arc<Segment>) {
    with(|record| record.span.segments.push((record.span.num_ops, Arc::clone(segment))));
}

/// Begins a break. At a replay, one that cannot be healed keeps nothing back.
pub(crate) fn begin_break(place: Place, not_healable: Option<&'static str>) {
    with(|record| {
        record.place = Some(place);
        record.left = not_healable;
        record.break_begin = record.span.num_ops;
    });
}

/// Ends a break and returns why it cannot be healed, if so. At a capture, a span ends before such a break.
///
/// # Errors
/// That of enqueuing what was kept back, if that failed where no error could be returned.
pub(crate) fn end_break() -> Result<Option<&'static str>> {
    with(|record| {
        record.place = None;
        let left = record.left.take();
        if left.is_some() && record.mode != RecordMode::Replay {
            record.span.num_ops = record.break_begin;
        }
        record.error.take().map_or(Ok(left), Err)
    })
    .unwrap_or(Ok(None))
}

/// Takes the span that ends here.
pub(crate) fn take_span() -> Span {
    with(|record| std::mem::take(&mut record.span)).unwrap_or_default()
}

/// Calls `f` with the span that ends here, which is empty afterwards.
pub(crate) fn end_span<R>(f: impl FnOnce(&Span, &Stream) -> R) -> Option<R> {
    with(|record| {
        let result = f(&record.span, &record.main);
        record.span.clear();
        result
    })
}

/// Returns the call that a capture ahead could not serve.
pub(crate) fn needs_run() -> Option<&'static str> {
    with(|record| record.needs_run).flatten()
}

/// Notes work of a break that goes to `main`; `true` if it is kept back and must not be enqueued.
pub(crate) fn keep(main: &Arc<Stream>, op: &Op) -> bool {
    note(main, |span, place| span.push(op, place))
}

/// As [`keep`], for a launch of `kernel` with the argument struct in `args`.
pub(crate) fn keep_launch(main: &Arc<Stream>, kernel: &'static dyn AnyKernel, dims: Dims, args: &[u8]) -> bool {
    note(main, |span, place| span.push_launch(kernel, dims, args, place))
}

fn note(main: &Arc<Stream>, push: impl FnOnce(&mut Span, Place)) -> bool {
    with(|record| {
        if !Arc::ptr_eq(&record.main, main) || record.left.is_some() {
            return false;
        }
        let Some(place) = record.place else { return false };
        push(&mut record.span, place);
        record.keeps_back()
    })
    .unwrap_or(false)
}

/// Leaves the record because of work on `main`, or beside it, of a kind that is not recorded.
///
/// # Errors
/// Those of enqueuing what was kept back.
pub(crate) fn leave_for_work(main: &Arc<Stream>, what: &'static str) -> Result<()> {
    with(|record| if Arc::ptr_eq(&record.main, main) { record.leave(what, Needs::Nothing) } else { Ok(()) })
        .unwrap_or(Ok(()))
}

/// Leaves the record because of a call on its device.
///
/// # Errors
/// Those of enqueuing what was kept back; [`Error::NeedsRun`] if the call waits for results and nothing runs.
pub(crate) fn leave(device: &Device, what: &'static str, needs: Needs) -> Result<()> {
    with(|record| if record.main.device().is(device) { record.leave(what, needs) } else { Ok(()) }).unwrap_or(Ok(()))
}

/// As [`leave`], for a drop; the break then returns the error.
pub(crate) fn leave_in_drop(device: &Device, what: &'static str) {
    // A thread that ends has no record any more, and a drop inside the record itself frees nothing of the device.
    let _ = RECORD.try_with(|record| {
        if let Ok(mut record) = record.try_borrow_mut()
            && let Some(record) = record.as_mut()
            && record.main.device().is(device)
            && let Err(error) = record.leave(what, Needs::Nothing)
        {
            record.error.get_or_insert(error);
        }
    });
}
