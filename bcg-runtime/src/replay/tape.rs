//! The tape: what a capture leaves, segments and breaks in order, with all that a replay needs of them.

use std::sync::Arc;
use std::time::Duration;

use super::description::{BreakDescription, Description, SegmentDescription};
use super::healer::Healer;
use crate::arena::Arena;
use crate::capture::step::Step;
use crate::device::PinnedBuffer;
use crate::device::traits::Transport;
use crate::frozen::FrozenTensor;
use crate::generation::Stamp;
use crate::stream::work_list::Span;
use crate::tensor::PersistentBuffer;
use crate::{BlockLifetime, Freeze, LiveBatch, OpStream, ReplayMode, Result};

/// The steps of a graph and what they point at. Field order is teardown order: executables before the memory they use.
pub(crate) struct Tape<L, O: Freeze> {
    pub(crate) healer: Healer,
    pub(crate) steps: Vec<Step<L>>,
    pub(crate) output: O::Frozen,
    pub(crate) stamps: Vec<Stamp>,
    pub(crate) extent_bytes: usize,
    pub(crate) blocks: Vec<BlockLifetime>,
    /// The stream whose arena the addresses belong to.
    pub(crate) arena: Arena,
    pub(crate) capture_time: Duration,
    pub(crate) _retained: Vec<Arc<PersistentBuffer>>,
    /// What carries data to other nodes outlives the graphs that use it.
    pub(crate) _transport: Option<Arc<dyn Transport>>,
    pub(crate) _pinned: Vec<Arc<PinnedBuffer>>,
}

impl<L: LiveBatch, O: Freeze> Tape<L, O> {
    /// Tells whether a healed replay may differ from a chain.
    pub(crate) fn may_heal(&self) -> bool {
        let mut breaks = self.steps.iter().filter_map(|step| match step {
            Step::Break(step) => Some(step.not_healable.is_none()),
            Step::Segment(_) => None,
        });
        breaks.clone().count() == 0 || breaks.any(|is_healable| is_healable)
    }

    pub(crate) fn forget_covered(&mut self) {
        forget_covered(&mut self.steps, &self.healer);
    }

    /// Returns the nodes of all executables that are there now.
    pub(crate) fn num_exec_nodes(&self) -> usize {
        let segments = self.steps.iter().filter_map(|step| match step {
            Step::Segment(segment) => Some(segment.num_exec_nodes()),
            Step::Break(_) => None,
        });
        segments.sum::<usize>() + self.healer.num_nodes()
    }

    pub(crate) fn describe(&self, description: &mut Description) {
        description.extent_bytes = self.extent_bytes;
        description.capture_time = self.capture_time;
        description.num_merged = self.healer.num_merged();
        description.blocks.clone_from(&self.blocks);
        for (index, step) in self.steps.iter().enumerate() {
            match step {
                Step::Segment(segment) => description.segments.push(SegmentDescription {
                    is_empty: segment.is_empty(),
                    num_nodes: segment.nodes.total(),
                    num_copies: segment.nodes.copies,
                    num_fills: segment.nodes.fills,
                    kernels: segment.kernels.clone(),
                }),
                Step::Break(step) => description.breaks.push(BreakDescription {
                    name: step.site.name,
                    file: step.site.file,
                    line: step.site.line,
                    after_segment: description.segments.len() - 1,
                    num_launches: step.launches,
                    num_args: step.args.len(),
                    bridge_bytes: step.outputs.iter().map(FrozenTensor::size_bytes).sum(),
                    not_healable: step.not_healable,
                    num_patched: self.healer.num_patched(index),
                }),
            }
        }
    }
}

/// Makes what replays launch: a merged executable for each span, and one for each segment that none covers.
pub(crate) fn prepare<L>(stream: &OpStream, steps: &mut [Step<L>], spans: Vec<Span>) -> Result<Healer> {
    let is_healed = stream.replay_mode() == ReplayMode::Healed;
    let healer = Healer::new(stream.main(), steps.len(), if is_healed { &spans } else { &[] }, stream.ranks())?;
    drop(spans);
    for step in &*steps {
        if let Step::Segment(segment) = step
            && !healer.covers(segment.index)
        {
            segment.prepare().map_err(|error| error.in_segment(segment.index))?;
        }
    }
    forget_covered(steps, &healer);
    Ok(healer)
}

/// Gives up the executables of segments whose work a merged one does; they are made again should the chain be needed.
fn forget_covered<L>(steps: &mut [Step<L>], healer: &Healer) {
    for step in steps {
        if let Step::Segment(segment) = step
            && healer.covers(segment.index)
            && let Some(segment) = Arc::get_mut(segment)
        {
            segment.forget_executable();
        }
    }
}
