//! Healed replay: segments, and the work of the breaks between them, as one launch.
//!
//! While a break runs, what it enqueues is kept back and recorded ([`super::record`]). A *merged* executable holds the
//! nodes of the segments and one node for each piece of that work. If the breaks enqueued the same kernels, fills and
//! copies as it holds, the nodes whose geometry, arguments or addresses differ from its last launch are patched, and all
//! of it is one launch. Otherwise what was recorded is enqueued as the chain would have done.
//!
//! - A break that reads back, waits, uses a library that launches by itself, or another stream is *not healable*. It
//!   stays a break, and what stands before and after it becomes spans of their own.
//! - Work of another sequence is launched as a chain the first time; then a merged executable is made for it too, up to
//!   [`MERGED_MAX`] for a graph. A merged executable is never read back: the record says what its nodes do.
//! - Patching changes later launches only: those that are queued or running keep their arguments.

use std::sync::Arc;

use super::record::{self, Active, Place, Record, RecordMode, Recorded, Span};
use super::{ChainReason, ReplayPath, begin, run_break, thaw_output};
use crate::capture::step::Step;
use crate::device::traits::{NodeHandle, Part};
use crate::device::{Graph, GraphExec, Stream};
use crate::graph::Recording;
use crate::op::Op;
use crate::segment::Segment;
use crate::{Error, Freeze, LiveBatch, OpStream, Result, StepKind, timeline};

/// The merged executables that a graph tries to make, one for each span and each sequence of work in it.
const MERGED_MAX: usize = 16;

/// What a graph needs for healed replays.
#[derive(Debug)]
pub(crate) struct Healer {
    merged: Vec<Merged>,
    /// How many more are tried, whether they succeed or not: making one takes milliseconds.
    tries_left: usize,
    /// Kept between replays, so that recording allocates nothing.
    record: Option<Record>,
    /// Nodes patched so far, by the step of their break.
    patched: Vec<u64>,
}

/// One executable for a span.
#[derive(Debug)]
struct Merged {
    exec: GraphExec,
    /// Owns the nodes.
    _graph: Graph,
    /// The first and the last segment.
    segments: (usize, usize),
    /// Of the segments and of the work between them.
    num_nodes: usize,
    /// Of that work.
    nodes: Vec<NodeHandle>,
    /// What these nodes do.
    holds: Vec<Recorded>,
}

/// How the end of a span went.
enum SpanEnd {
    Launched,
    Chained(ChainReason),
}

impl Healer {
    /// Makes the merged executables of the spans that a capture recorded.
    pub(crate) fn new(main: &Arc<Stream>, num_steps: usize, spans: &[Span]) -> Result<Self> {
        let record = Some(Record::new(main, RecordMode::Replay));
        let patched = vec![0; num_steps];
        let mut healer = Self { merged: Vec::new(), tries_left: MERGED_MAX, record, patched };
        for span in spans {
            healer.merge(span, main)?;
        }
        Ok(healer)
    }

    /// Tells whether a merged executable does the work of a segment.
    pub(crate) fn covers(&self, segment: usize) -> bool {
        self.merged.iter().any(|merged| (merged.segments.0..=merged.segments.1).contains(&segment))
    }

    /// Returns how many nodes of a step's break were patched so far.
    pub(crate) fn num_patched(&self, step: usize) -> u64 {
        self.patched[step]
    }

    /// Returns the nodes of all merged executables.
    pub(crate) fn num_nodes(&self) -> usize {
        self.merged.iter().map(|merged| merged.num_nodes).sum()
    }

    pub(crate) fn num_merged(&self) -> usize {
        self.merged.len()
    }

    /// Returns the segments and breaks of each merged executable, in order, with their numbers of kernels.
    pub(crate) fn parts<L>(&self, steps: &[Step<L>]) -> Vec<Vec<timeline::Part>> {
        self.merged.iter().map(|merged| merged.parts(steps)).collect()
    }

    /// Keeps a merged executable for a span, if there is room, more than one launch to save, and no node that cannot be
    /// copied.
    fn merge(&mut self, span: &Span, main: &Stream) -> Result<()> {
        if self.tries_left == 0 || span.num_launches() <= 1 {
            return Ok(());
        }
        self.tries_left -= 1;
        match Merged::new(span, main) {
            Ok(merged) => self.merged.extend(merged),
            // The chain needs less, and what runs must go on.
            Err(error) if matches!(error.root(), Error::OutOfMemory { .. }) => {
                tracing::warn!(%error, "no memory for a merged executable; going on with the chain");
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Launches a span.
    fn launch(&mut self, span: &Span, main: &Stream) -> Result<SpanEnd> {
        if span.num_launches() <= 1 {
            return span.enqueue(main).map(|()| SpanEnd::Launched);
        }
        let Some(at) = self.merged.iter().position(|merged| merged.does(span)) else {
            span.enqueue(main)?;
            self.merge(span, main)?;
            return Ok(SpanEnd::Chained(ChainReason::WorkChanged));
        };
        match self.merged[at].launch(span, main, &mut self.patched) {
            Ok(true) => Ok(SpanEnd::Launched),
            Ok(false) => {
                self.merged.remove(at);
                span.enqueue(main).map(|()| SpanEnd::Chained(ChainReason::PatchRefused))
            }
            Err(error) => {
                // Some nodes may be patched and others not.
                self.merged.remove(at);
                Err(error)
            }
        }
    }
}

impl Span {
    /// Driver calls of the chain.
    fn num_launches(&self) -> usize {
        self.ops().len() + self.segments.iter().filter(|(_, segment)| !segment.is_empty()).count()
    }

    /// Returns what launching it is in a timeline.
    fn step_kind(&self) -> Option<StepKind> {
        let first = self.segments.first()?.1.index;
        let is_alone = self.segments.len() == 1 && self.ops().is_empty();
        let healed = StepKind::Healed { first_segment: first, num_segments: self.segments.len() };
        Some(if is_alone { StepKind::Segment(first) } else { healed })
    }

    fn first_and_last(&self) -> (usize, usize) {
        let index = |segment: Option<&(usize, Arc<Segment>)>| segment.map_or(usize::MAX, |(_, segment)| segment.index);
        (index(self.segments.first()), index(self.segments.last()))
    }
}

impl Merged {
    /// Makes the executable; nothing if a segment has a node that cannot be copied.
    fn new(span: &Span, main: &Stream) -> Result<Option<Self>> {
        let mut parts = Vec::with_capacity(span.num_launches());
        let mut next = 0;
        for (before, segment) in &span.segments {
            parts.extend(span.ops()[next..*before].iter().map(|recorded| Part::Op(&recorded.op)));
            next = *before;
            let graph = segment.graph.as_ref().map(Graph::handle);
            parts.extend(graph.map(|graph| Part::Graph { graph, is_programmatic: segment.is_programmatic }));
        }
        parts.extend(span.ops()[next..].iter().map(|recorded| Part::Op(&recorded.op)));
        let segments = span.first_and_last();
        let Some((graph, nodes)) = Graph::merge(main, &parts).map_err(|error| error.in_segment(segments.0))? else {
            return Ok(None);
        };
        let exec = graph.instantiate().map_err(|error| error.in_segment(segments.0))?;
        let captured = span.segments.iter().map(|(_, segment)| segment.nodes.total());
        let num_nodes = captured.sum::<usize>() + span.ops().len();
        Ok(Some(Self { exec, _graph: graph, segments, num_nodes, nodes, holds: span.ops().to_vec() }))
    }

    /// Tells whether it does the work of `span`, once it is patched.
    fn does(&self, span: &Span) -> bool {
        self.segments == span.first_and_last()
            && self.holds.len() == span.ops().len()
            && self.holds.iter().zip(span.ops()).all(|(held, recorded)| held.op.is_like(&recorded.op))
    }

    fn parts<L>(&self, steps: &[Step<L>]) -> Vec<timeline::Part> {
        let is_kernel_of = |held: &Recorded, step| held.place.step == step && matches!(held.op, Op::Launch(_));
        let kernels_of = |step| self.holds.iter().filter(|held| is_kernel_of(held, step)).count();
        let mut breaks = 0..;
        let parts = steps.iter().enumerate().filter_map(|(index, step)| match step {
            Step::Segment(segment) => Some((StepKind::Segment(segment.index), segment.nodes.kernels)),
            Step::Break(_) => Some((StepKind::Break(breaks.next()?), kernels_of(index))),
        });
        let mut parts: Vec<_> = parts.skip_while(|part| part.0 != StepKind::Segment(self.segments.0)).collect();
        let last = parts.iter().position(|part| part.0 == StepKind::Segment(self.segments.1));
        parts.truncate(last.map_or(0, |last| last + 1));
        parts
    }

    /// Patches what differs and launches. Returns `false`, with nothing enqueued, if the driver refuses a patch.
    fn launch(&mut self, span: &Span, main: &Stream, patched: &mut [u64]) -> Result<bool> {
        for ((held, recorded), node) in self.holds.iter_mut().zip(span.ops()).zip(&self.nodes) {
            if held.op.is_same(&recorded.op) {
                continue;
            }
            let Place { step, segment, site } = recorded.place;
            if !self.exec.patch(*node, &recorded.op).map_err(|error| error.in_break(site, segment))? {
                return Ok(false);
            }
            held.clone_from(recorded);
            patched[step] += 1;
        }
        self.exec.launch(main).map_err(|error| error.in_segment(self.segments.0))?;
        Ok(true)
    }
}

/// Runs the recorded steps and returns the output, and whether every span was one launch.
pub(crate) fn replay<L: LiveBatch, O: Freeze>(
    recording: &mut Recording<L, O>,
    stream: &mut OpStream,
    live: &L,
) -> Result<(O, ReplayPath)> {
    let span = tracing::trace_span!("healed replay");
    let _entered = span.enter();
    begin(recording, stream, live)?;
    let record = recording.healer.record.take().unwrap_or_else(|| Record::new(stream.main(), RecordMode::Replay));
    let active = Active::begin(record);
    let result = run_steps(recording, stream, live);
    stream.arena().end_recorded();
    recording.healer.record = active.end();
    let path = result?;
    if path == ReplayPath::Chain(ChainReason::WorkChanged) {
        recording.forget_covered();
    }
    Ok((thaw_output(recording), path))
}

fn run_steps<L: LiveBatch, O: Freeze>(
    recording: &mut Recording<L, O>,
    stream: &mut OpStream,
    live: &L,
) -> Result<ReplayPath> {
    let Recording { steps, healer, arena, .. } = recording;
    let mut path = ReplayPath::Healed;
    let (mut segment, mut breaks) = (0, 0);
    for (step, what) in steps.iter_mut().enumerate() {
        match what {
            Step::Segment(captured) => {
                segment = captured.index;
                record::pass(captured);
            }
            Step::Break(captured) => {
                if captured.not_healable.is_some() {
                    path.and(end_span(healer, stream)?);
                }
                stream.begin_step(StepKind::Break(breaks));
                breaks += 1;
                record::begin_break(Place { step, segment, site: captured.site }, captured.not_healable);
                let ended = run_break(captured, arena, stream, live).and_then(|()| record::end_break());
                let left = ended.inspect_err(|_| stream.reset_forks());
                let left = left.map_err(|error| error.in_break(captured.site, segment))?;
                stream.end_step();
                if let (Some(why), None) = (left, captured.not_healable) {
                    tracing::debug!(name = captured.site.name, why, "a break cannot be healed any more");
                    captured.not_healable = Some(why);
                    healer.merged.retain(|merged| !(merged.segments.0..merged.segments.1).contains(&segment));
                    path.and(SpanEnd::Chained(ChainReason::BreakLeft));
                }
            }
        }
    }
    path.and(end_span(healer, stream)?);
    Ok(path)
}

fn end_span(healer: &mut Healer, stream: &mut OpStream) -> Result<SpanEnd> {
    let launch = |span: &Span, main: &Stream| {
        if let Some(kind) = span.step_kind() {
            stream.begin_step(kind);
        }
        let ended = healer.launch(span, main);
        stream.end_step();
        ended
    };
    record::end_span(launch).unwrap_or(Ok(SpanEnd::Launched))
}

impl ReplayPath {
    /// Keeps the first reason why something was not one launch.
    fn and(&mut self, end: SpanEnd) {
        if let (Self::Healed, SpanEnd::Chained(reason)) = (*self, end) {
            *self = Self::Chain(reason);
        }
    }
}
