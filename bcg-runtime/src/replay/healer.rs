//! Merged executables: how they are made, patched and launched.
//!
//! A *merged* executable holds the nodes of some segments and one node for each piece of work of the breaks between
//! them. If a span holds the same kernels, fills and copies, the nodes whose geometry, arguments or addresses differ
//! from the last launch are patched, and all of it is one launch. A merged executable is never read back: the list that
//! it was made from, kept up to date with each patch, says what its nodes do. Patching changes later launches only:
//! those that are queued or running keep their arguments.

use std::sync::Arc;

use super::ChainReason;
use super::world::{self, Launched, Request, WorldExec};
use crate::capture::step::Step;
use crate::device::traits::NodeHandle;
use crate::device::{Graph, GraphExec, Stream};
use crate::op::Op;
use crate::stream::steps;
use crate::stream::work_list::{ListMode, Listed, Origin, Span, WorkList};
use crate::world::Ranks;
use crate::{Error, Result, StepKind};

/// The merged executables that a graph tries to make, one for each span and each sequence of work in it.
const MERGED_MAX: usize = 16;

/// The merged executables of a graph, and what making and patching them needs.
#[derive(Debug)]
pub(crate) struct Healer {
    merged: Vec<Merged>,
    /// How many more executables are tried, whether they succeed or not: making one takes milliseconds.
    tries_left: usize,
    /// The list is kept between replays, so that listing allocates nothing.
    list: Option<WorkList>,
    /// How many nodes were patched so far, by the step of their break.
    patched: Vec<u64>,
    /// This rank, if it is one of several.
    ranks: Option<Ranks>,
}

/// One executable for the segments and the work of a span.
#[derive(Debug)]
struct Merged {
    exec: Exec,
    /// The indices of its first and its last segment.
    segments: (usize, usize),
    /// The nodes of the segments and of the work between them.
    num_nodes: usize,
    /// The nodes of the work between the segments.
    nodes: Vec<NodeHandle>,
    /// What the nodes of that work do, as they were patched last.
    holds: Vec<Listed>,
}

/// What launches a merged executable's nodes.
#[derive(Debug)]
enum Exec {
    /// This device alone; the graph owns the nodes.
    Own { exec: GraphExec, _graph: Graph },
    /// All ranks, of which these nodes are one's.
    World(Arc<WorldExec>),
}

impl Healer {
    /// Makes the merged executables of the spans that a capture listed. Of several ranks, all do.
    pub(crate) fn new(main: &Arc<Stream>, num_steps: usize, spans: &[Span], ranks: Option<&Ranks>) -> Result<Self> {
        let list = Some(WorkList::new(main, ListMode::Replay));
        let patched = vec![0; num_steps];
        let mut healer = Self { merged: Vec::new(), tries_left: MERGED_MAX, list, patched, ranks: ranks.cloned() };
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
    pub(crate) fn parts<L>(&self, steps: &[Step<L>]) -> Vec<Vec<steps::Part>> {
        self.merged.iter().map(|merged| merged.parts(steps)).collect()
    }

    /// Keeps a merged executable for a span, if there is room, more than one launch to save, and no node that cannot be
    /// copied.
    fn merge(&mut self, span: &Span, main: &Arc<Stream>) -> Result<()> {
        let num_least = if self.ranks.is_some() { 1 } else { 2 };
        if self.tries_left == 0 || span.num_launches() < num_least {
            return Ok(());
        }
        self.tries_left -= 1;
        if let Some(ranks) = &self.ranks
            && let Some((exec, nodes)) = world::merge(ranks, main, span)?
        {
            self.merged.push(Merged::with(Exec::World(exec), nodes, span));
            return Ok(());
        }
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

    /// Returns the list for the next replay's work, which is empty.
    pub(super) fn take_list(&mut self, main: &Arc<Stream>) -> WorkList {
        self.list.take().unwrap_or_else(|| WorkList::new(main, ListMode::Replay))
    }

    /// Takes the list back after a replay.
    pub(super) fn keep_list(&mut self, list: Option<WorkList>) {
        self.list = list;
    }

    /// Drops the executables that hold work of the break after this segment.
    pub(super) fn forget_break_after(&mut self, segment: usize) {
        self.merged.retain(|merged| !(merged.segments.0..merged.segments.1).contains(&segment));
    }

    /// Launches a span, and returns why it was not one launch, if so.
    pub(super) fn launch(&mut self, span: &Span, main: &Arc<Stream>) -> Result<Option<ChainReason>> {
        if let Some(ranks) = self.ranks.clone() {
            return self.launch_in_world(&ranks, span, main);
        }
        if span.num_launches() <= 1 {
            return span.enqueue(main).map(|()| None);
        }
        let Some(at) = self.merged.iter().position(|merged| merged.does(span)) else {
            span.enqueue(main)?;
            self.merge(span, main)?;
            return Ok(Some(ChainReason::WorkChanged));
        };
        self.launch_own(at, span, main)
    }

    /// Launches an executable of this device alone.
    fn launch_own(&mut self, at: usize, span: &Span, main: &Stream) -> Result<Option<ChainReason>> {
        match self.merged[at].launch(span, main, &mut self.patched) {
            Ok(true) => Ok(None),
            Ok(false) => {
                self.merged.remove(at);
                span.enqueue(main).map(|()| Some(ChainReason::PatchRefused))
            }
            Err(error) => {
                // Some nodes may be patched and others not.
                self.merged.remove(at);
                Err(error)
            }
        }
    }
}

/// With several ranks.
impl Healer {
    /// As [`Healer::launch`], for the spans of all ranks, which come here too.
    fn launch_in_world(&mut self, ranks: &Ranks, span: &Span, main: &Arc<Stream>) -> Result<Option<ChainReason>> {
        let at = self.merged.iter().position(|merged| merged.does(span));
        let mut request = Request {
            exec: None,
            changes: Vec::new(),
            has_none: at.is_none(),
            is_spent: self.tries_left == 0 || span.num_launches() == 0,
        };
        if let Some(at) = at
            && let Exec::World(exec) = &self.merged[at].exec
        {
            exec.get_ready(ranks.local())?;
            (request.exec, request.changes) = (Some(Arc::clone(exec)), self.merged[at].changes(span));
        }
        let outcome = ranks.meet("a launch", request, |requests| world::launch_all(&requests))?;
        if outcome.launched != Launched::AsOne && ranks.world.shares_gpus() {
            // To make an executable may wait for the GPU, where a collective may wait for the rank that makes it.
            ranks.agree_here("the executables of a chain", span.prepare())?;
        }
        if span.num_launches() == 0 {
            return Ok(None);
        }
        match (outcome.launched, at) {
            (Launched::AsOne, Some(at)) => {
                self.merged[at].hold(span, &mut self.patched);
                match &self.merged[at].exec {
                    Exec::World(exec) => exec.follow(ranks.local()).map(|()| None),
                    Exec::Own { .. } => Ok(None),
                }
            }
            (Launched::Refused, Some(at)) => {
                self.merged.remove(at);
                span.enqueue(main).map(|()| Some(ChainReason::PatchRefused))
            }
            (_, Some(at)) if !outcome.merges && matches!(self.merged[at].exec, Exec::Own { .. }) => {
                self.launch_own(at, span, main)
            }
            _ => {
                span.enqueue(main)?;
                if outcome.merges {
                    self.merged.retain(|merged| !merged.does(span));
                    self.merge(span, main)?;
                }
                Ok(Some(ChainReason::WorkChanged))
            }
        }
    }
}

impl Merged {
    /// Makes the executable; nothing if a segment has a node that cannot be copied.
    fn new(span: &Span, main: &Stream) -> Result<Option<Self>> {
        let segments = span.first_and_last();
        let Some((graph, nodes)) = Graph::merge(main, &span.parts()).map_err(|error| error.in_segment(segments.0))?
        else {
            return Ok(None);
        };
        let exec = graph.instantiate().map_err(|error| error.in_segment(segments.0))?;
        Ok(Some(Self::with(Exec::Own { exec, _graph: graph }, nodes, span)))
    }

    fn with(exec: Exec, nodes: Vec<NodeHandle>, span: &Span) -> Self {
        let captured = span.segments.iter().map(|(_, segment)| segment.nodes.total());
        let num_nodes = captured.sum::<usize>() + span.ops().len();
        Self { exec, segments: span.first_and_last(), num_nodes, nodes, holds: span.ops().to_vec() }
    }

    /// Returns the nodes whose work in `span` differs from what they do.
    fn changes(&self, span: &Span) -> Vec<(NodeHandle, Listed)> {
        let all = self.holds.iter().zip(span.ops()).zip(&self.nodes);
        all.filter(|((held, listed), _)| !held.op.is_same(&listed.op))
            .map(|((_, listed), node)| (*node, listed.clone()))
            .collect()
    }

    /// Notes that the nodes do the work of `span`: they were patched.
    fn hold(&mut self, span: &Span, patched: &mut [u64]) {
        for (held, listed) in self.holds.iter_mut().zip(span.ops()) {
            if !held.op.is_same(&listed.op) {
                held.clone_from(listed);
                patched[listed.origin.step] += 1;
            }
        }
    }

    /// Tells whether it does the work of `span`, once it is patched.
    fn does(&self, span: &Span) -> bool {
        self.segments == span.first_and_last()
            && self.holds.len() == span.ops().len()
            && self.holds.iter().zip(span.ops()).all(|(held, listed)| held.op.is_like(&listed.op))
    }

    fn parts<L>(&self, steps: &[Step<L>]) -> Vec<steps::Part> {
        let is_kernel_of = |held: &Listed, step| held.origin.step == step && matches!(held.op, Op::Launch(_));
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
        let Exec::Own { exec, .. } = &self.exec else { return Ok(false) };
        for ((held, listed), node) in self.holds.iter_mut().zip(span.ops()).zip(&self.nodes) {
            if held.op.is_same(&listed.op) {
                continue;
            }
            let Origin { step, segment, site } = listed.origin;
            if !exec.patch(*node, &listed.op).map_err(|error| error.in_break(site, segment))? {
                return Ok(false);
            }
            held.clone_from(listed);
            patched[step] += 1;
        }
        exec.launch(main).map_err(|error| error.in_segment(self.segments.0))?;
        Ok(true)
    }
}
