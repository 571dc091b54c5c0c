//! The work list: what the breaks of a forward enqueue, in order, between its segments.
//!
//! A capture lists the work of each break beside doing it. A healed replay keeps it back, with the segments, until the
//! span is launched as one. What cannot be listed makes the thread *leave* the list: what was kept back is enqueued at
//! once, in order, and the rest of the break runs as in a chain. So whatever a body does, it finds the device as in an
//! eager run.
//!
//! [`OpStream`](crate::OpStream) says in a field of its own whether its work is listed ([`Destination`]). The list
//! itself belongs to the thread and not to the stream: a body may reach the device past its context (`Device::read`,
//! freeing memory), and those calls, which hold no stream, must leave the list too. A list that stream and thread
//! shared would put a lock on each launch of a healed replay.
//!
//! Invariants:
//! - A forward runs on one thread.
//! - While work is kept back, nothing of the forward that comes after it was enqueued.
//! - Work of another runner inside a break is not listed: nothing orders the two streams.
//! - What kept-back work names is not freed before it is enqueued, whichever thread drops the last handle: see `watch.rs`.

use std::cell::RefCell;
use std::sync::Arc;

use crate::break_site::BreakSite;
use crate::device::Stream;
use crate::device::watch::{self, Hold, Needs, Watcher};
use crate::launch::{AnyKernel, Launch};
use crate::op::Op;
use crate::segment::Segment;
use crate::{Device, Dims, Error, PinnedBuffer, Result, StepKind};

thread_local! {
    static WORK_LIST: RefCell<Option<WorkList>> = const { RefCell::new(None) };
}

/// The break that enqueued a piece of work.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Origin {
    /// Index among the steps of its graph.
    pub(crate) step: usize,
    /// Index of the segment before it.
    pub(crate) segment: usize,
    pub(crate) site: &'static BreakSite,
}

/// A piece of work and where it comes from.
#[derive(Clone, Debug)]
pub(crate) struct Listed {
    pub(crate) op: Op,
    pub(crate) origin: Origin,
    /// The page-locked memory that it reads. A node of an executable knows more of such memory than its address, so the
    /// memory must be there until the node is patched to read another.
    reads: Option<Arc<PinnedBuffer>>,
}

/// Segments in a row and the work of the breaks between them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Span {
    /// The first `num_ops` are there; the others are places to write the next ones to, without moving large values.
    slots: Vec<Listed>,
    num_ops: usize,
    /// The segments, each with the number of ops before it.
    pub(crate) segments: Vec<(usize, Arc<Segment>)>,
}

/// Where the work of a stream's main queue goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Destination {
    /// To the device, or into the segment that is being captured.
    #[default]
    Device,
    /// To this thread's work list, which notes it or keeps it back: a break of a capture or of a healed replay runs.
    WorkList,
}

/// What the list is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ListMode {
    /// Work is noted and runs.
    Capture,
    /// Work is noted and nothing runs.
    CaptureAhead,
    /// Work is kept back.
    Replay,
}

/// The work list of one forward.
#[derive(Debug)]
pub(crate) struct WorkList {
    main: Arc<Stream>,
    mode: ListMode,
    /// The number of the hold that keeps what its work names from being freed.
    hold: Option<u64>,
    /// The break that runs.
    origin: Option<Origin>,
    /// How many ops there were when that break began.
    break_begin: usize,
    /// Why that break cannot be healed, once it cannot.
    left: Option<&'static str>,
    /// A call that a capture ahead could not serve.
    needs_run: Option<&'static str>,
    /// The error of a flush whose caller could not return one.
    error: Option<Error>,
    span: Span,
}

impl WorkList {
    pub(crate) fn new(main: &Arc<Stream>, mode: ListMode) -> Self {
        Self {
            main: Arc::clone(main),
            mode,
            hold: None,
            origin: None,
            break_begin: 0,
            left: None,
            needs_run: None,
            error: None,
            span: Span::default(),
        }
    }

    /// Work that is enqueued now would be kept back.
    fn keeps_back(&self) -> bool {
        self.mode == ListMode::Replay && self.left.is_none()
    }

    fn leave(&mut self, what: &'static str, needs: Needs) -> Result<()> {
        match self.mode {
            ListMode::Replay if self.left.is_none() => {
                if self.origin.is_some() {
                    self.left = Some(what);
                }
                self.span.flush(&self.main)
            }
            ListMode::Capture | ListMode::CaptureAhead if self.origin.is_some() => {
                self.left = self.left.or(Some(what));
                if self.mode == ListMode::CaptureAhead && needs == Needs::Results {
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
    pub(crate) fn ops(&self) -> &[Listed] {
        &self.slots[..self.num_ops]
    }

    /// Returns how many driver calls a chain makes for it.
    pub(crate) fn num_launches(&self) -> usize {
        self.ops().len() + self.segments.iter().filter(|(_, segment)| !segment.is_empty()).count()
    }

    /// Returns what launching it is in a timeline, if it holds a segment.
    pub(crate) fn step_kind(&self) -> Option<StepKind> {
        let first = self.segments.first()?.1.index;
        let is_alone = self.segments.len() == 1 && self.ops().is_empty();
        let healed = StepKind::Healed { first_segment: first, num_segments: self.segments.len() };
        Some(if is_alone { StepKind::Segment(first) } else { healed })
    }

    /// Returns the indices of its first and last segment.
    pub(crate) fn first_and_last(&self) -> (usize, usize) {
        let index = |segment: Option<&(usize, Arc<Segment>)>| segment.map_or(usize::MAX, |(_, segment)| segment.index);
        (index(self.segments.first()), index(self.segments.last()))
    }

    fn push(&mut self, op: &Op, origin: Origin) {
        match self.slots.get_mut(self.num_ops) {
            Some(slot) => (slot.op, slot.origin, slot.reads) = (op.clone(), origin, None),
            None => self.slots.push(Listed { op: op.clone(), origin, reads: None }),
        }
        self.num_ops += 1;
    }

    fn push_launch(&mut self, kernel: &'static dyn AnyKernel, dims: Dims, args: &[u8], origin: Origin) {
        match self.slots.get_mut(self.num_ops) {
            Some(Listed { op: Op::Launch(launch), origin: slot_place, .. }) => {
                (launch.kernel, launch.dims, launch.plane, *slot_place) = (kernel, dims, None, origin);
                launch.args.set(args);
            }
            Some(slot) => {
                (slot.op, slot.origin) = (Op::Launch(Launch::from_bytes(kernel, dims, args)), origin);
                slot.reads = None;
            }
            None => {
                let op = Op::Launch(Launch::from_bytes(kernel, dims, args));
                self.slots.push(Listed { op, origin, reads: None });
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
        let enqueue = |ops: &[Listed]| {
            ops.iter().try_for_each(|Listed { op, origin, .. }| {
                let enqueued = main.device().backend().enqueue(main.handle(), op);
                enqueued.map_err(|error| error.in_break(origin.site, origin.segment))
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

    /// Makes the executables that [`Span::enqueue`] launches.
    pub(crate) fn prepare(&self) -> Result<()> {
        self.segments
            .iter()
            .try_for_each(|(_, segment)| segment.prepare().map_err(|error| error.in_segment(segment.index)))
    }

    pub(crate) fn clear(&mut self) {
        self.num_ops = 0;
        self.segments.clear();
    }
}

/// Calls `f` with the list of this thread, if there is one.
fn with<R>(f: impl FnOnce(&mut WorkList) -> R) -> Option<R> {
    WORK_LIST.with_borrow_mut(|list| list.as_mut().map(f))
}

/// Makes a list the thread's until it is dropped. An outer one of the same device is left before, and waits meanwhile.
#[derive(Debug)]
pub(crate) struct Active {
    outer: Option<(Option<WorkList>, Option<Watcher>)>,
}

/// What the device tells while a list is active.
const WATCHER: Watcher = Watcher { before_call: leave, before_free: leave_in_drop };

impl Active {
    /// Begins the listing. `hold` lasts longer: until nothing uses what was listed.
    ///
    /// # Errors
    /// Those of leaving the outer list.
    pub(crate) fn begin(mut list: WorkList, hold: &Hold<'_>) -> Result<Self> {
        leave(list.main.device(), "a replay or capture of another graph", Needs::Results)?;
        list.hold = Some(hold.number());
        Ok(Self { outer: Some((WORK_LIST.replace(Some(list)), watch::install(Some(WATCHER)))) })
    }

    /// Ends the listing and returns the list, empty.
    pub(crate) fn end(mut self) -> Option<WorkList> {
        let (outer, watcher) = self.outer.take()?;
        watch::install(watcher);
        let mut list = WORK_LIST.replace(outer)?;
        (list.hold, list.origin, list.left, list.error) = (None, None, None, None);
        list.span.clear();
        Some(list)
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        if let Some((outer, watcher)) = self.outer.take() {
            watch::install(watcher);
            WORK_LIST.set(outer);
        }
    }
}

/// Adds a segment to the span.
pub(crate) fn pass(segment: &Arc<Segment>) {
    with(|list| list.span.segments.push((list.span.num_ops, Arc::clone(segment))));
}

/// Begins a break. At a replay, one that cannot be healed keeps nothing back.
pub(crate) fn begin_break(origin: Origin, not_healable: Option<&'static str>) {
    with(|list| {
        list.origin = Some(origin);
        list.left = not_healable;
        list.break_begin = list.span.num_ops;
    });
}

/// Ends a break and returns why it cannot be healed, if so. At a capture, a span ends before such a break.
///
/// # Errors
/// That of enqueuing what was kept back, if that failed where no error could be returned.
pub(crate) fn end_break() -> Result<Option<&'static str>> {
    with(|list| {
        list.origin = None;
        let left = list.left.take();
        if left.is_some() && list.mode != ListMode::Replay {
            list.span.num_ops = list.break_begin;
        }
        list.error.take().map_or(Ok(left), Err)
    })
    .unwrap_or(Ok(None))
}

/// Takes the span that ends here.
pub(crate) fn take_span() -> Span {
    with(|list| std::mem::take(&mut list.span)).unwrap_or_default()
}

/// Calls `f` with the span that ends here, which is empty afterwards.
pub(crate) fn end_span<R>(f: impl FnOnce(&Span, &Arc<Stream>) -> R) -> Option<R> {
    with(|list| {
        let result = f(&list.span, &list.main);
        list.span.clear();
        result
    })
}

/// Returns the call that a capture ahead could not serve.
pub(crate) fn needs_run() -> Option<&'static str> {
    with(|list| list.needs_run).flatten()
}

/// Notes work of a break that goes to `main`; `true` if it is kept back and must not be enqueued.
pub(crate) fn keep(main: &Arc<Stream>, op: &Op) -> bool {
    note(main, |span, origin| span.push(op, origin))
}

/// As [`keep`], for a copy that reads `memory`.
pub(crate) fn keep_copy(main: &Arc<Stream>, op: &Op, memory: &Arc<PinnedBuffer>) -> bool {
    note(main, |span, origin| {
        span.push(op, origin);
        span.slots[span.num_ops - 1].reads = Some(Arc::clone(memory));
    })
}

/// As [`keep`], for a launch of `kernel` with the argument struct in `args`.
pub(crate) fn keep_launch(main: &Arc<Stream>, kernel: &'static dyn AnyKernel, dims: Dims, args: &[u8]) -> bool {
    note(main, |span, origin| span.push_launch(kernel, dims, args, origin))
}

fn note(main: &Arc<Stream>, push: impl FnOnce(&mut Span, Origin)) -> bool {
    with(|list| {
        if !Arc::ptr_eq(&list.main, main) || list.left.is_some() {
            return false;
        }
        let Some(origin) = list.origin else { return false };
        push(&mut list.span, origin);
        list.keeps_back()
    })
    .unwrap_or(false)
}

/// Leaves the list because of work on `main`, or beside it, of a kind that is not listed.
///
/// # Errors
/// Those of enqueuing what was kept back.
pub(crate) fn leave_for_work(main: &Arc<Stream>, what: &'static str) -> Result<()> {
    with(|list| if Arc::ptr_eq(&list.main, main) { list.leave(what, Needs::Nothing) } else { Ok(()) }).unwrap_or(Ok(()))
}

/// Leaves the list because of a call on its device.
///
/// # Errors
/// Those of enqueuing what was kept back; [`Error::NeedsRun`] if the call waits for results and nothing runs.
pub(crate) fn leave(device: &Device, what: &'static str, needs: Needs) -> Result<()> {
    with(|list| if list.main.device().is(device) { list.leave(what, needs) } else { Ok(()) }).unwrap_or(Ok(()))
}

/// As [`leave`], for a drop; the break then returns the error. Returns the number of the list's hold if its work does not
/// name what is dropped any more: it was enqueued, or will not be part of a graph.
pub(crate) fn leave_in_drop(device: &Device, what: &'static str) -> Option<u64> {
    // A thread that ends has no list any more, and a drop inside the list itself frees nothing of the device.
    let left = WORK_LIST.try_with(|list| {
        let mut list = list.try_borrow_mut().ok()?;
        let list = list.as_mut().filter(|list| list.main.device().is(device))?;
        if let Err(error) = list.leave(what, Needs::Nothing) {
            list.error.get_or_insert(error);
        }
        if list.mode == ListMode::Replay || list.origin.is_some() { list.hold } else { None }
    });
    left.ok().flatten()
}
