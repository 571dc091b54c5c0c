//! Replay: the segments and breaks of a graph, in order, on the live batch.
//!
//! A [`tape::Tape`] is what they are on. [`heal`] makes one launch of segments and the work of the breaks between them,
//! with the executables of [`healer`]; [`chain`] alternates graph launches and breaks; [`verify`] compares a replay
//! with an eager run. All three run a break in the same way.

mod chain;
pub(crate) mod description;
mod heal;
mod healer;
pub(crate) mod tape;
pub(crate) mod verify;
mod world;

use std::fmt;

use crate::arena::Arena;
use crate::capture::bridge::scrub;
use crate::capture::freeze::Thaw;
use crate::capture::step::Break;
use crate::error::catch_panic;
use crate::{Eager, Freeze, LiveBatch, OpStream, ReplayMode, Result};
use tape::Tape;

/// How one replay went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ReplayPath {
    /// Each stretch between two breaks that cannot be healed was one launch.
    Healed,
    /// At least one stretch was launched segment by segment.
    Chain(ChainReason),
}

impl ReplayPath {
    /// Keeps the first reason why something was not one launch.
    fn note(&mut self, chained: Option<ChainReason>) {
        if let (Self::Healed, Some(reason)) = (*self, chained) {
            *self = Self::Chain(reason);
        }
    }
}

/// Why a replay was, at least in part, a chain. Closed: a metric counts each of them.
///
/// # Example
/// ```
/// use bcg_runtime::ChainReason;
/// assert_eq!(ChainReason::WorkChanged.name(), "work_changed");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ChainReason {
    /// The runner replays as a chain: [`ReplayMode::Chain`].
    Mode,
    /// No break of the graph can be healed.
    NoBreakHeals,
    /// The breaks enqueued other kernels, fills or copies than any merged executable holds.
    WorkChanged,
    /// A break did what cannot be listed, for the first time.
    BreakLeft,
    /// The driver refused to patch a node.
    PatchRefused,
}

impl ChainReason {
    /// All reasons, for metrics.
    pub const ALL: [Self; 5] = [Self::Mode, Self::NoBreakHeals, Self::WorkChanged, Self::BreakLeft, Self::PatchRefused];

    /// Returns the reason's name in metrics, such as `work_changed`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mode => "mode",
            Self::NoBreakHeals => "no_break_heals",
            Self::WorkChanged => "work_changed",
            Self::BreakLeft => "break_left",
            Self::PatchRefused => "patch_refused",
        }
    }
}

impl fmt::Display for ChainReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Replays a tape in the way that its runner and its breaks allow.
pub(crate) fn replay<L: LiveBatch, O: Freeze>(
    tape: &mut Tape<L, O>,
    stream: &mut OpStream,
    live: &L,
) -> Result<(O, ReplayPath)> {
    match chain_reason(tape, stream) {
        Some(reason) => Ok((chain::replay(tape, stream, live)?, ReplayPath::Chain(reason))),
        None => heal::replay(tape, stream, live),
    }
}

/// Returns why a replay is a chain from its beginning on, if so.
fn chain_reason<L: LiveBatch, O: Freeze>(tape: &Tape<L, O>, stream: &OpStream) -> Option<ChainReason> {
    match stream.replay_mode() {
        ReplayMode::Chain => Some(ChainReason::Mode),
        ReplayMode::Healed => (!tape.may_heal()).then_some(ChainReason::NoBreakHeals),
    }
}

/// Begins a forward at the addresses of the capture.
fn begin<L: LiveBatch, O: Freeze>(tape: &Tape<L, O>, stream: &mut OpStream, live: &L) -> Result<()> {
    tape.stamps.iter().try_for_each(crate::generation::Stamp::check)?;
    stream.begin_forward(live.rows(), tape.extent_bytes)?;
    stream.poison_extent(tape.extent_bytes)
}

/// Runs a break with its frozen arguments, and scrubs the padded rows of its outputs.
fn run_break<L: LiveBatch>(step: &Break<L>, arena: &Arena, stream: &mut OpStream, live: &L) -> Result<()> {
    let span = tracing::trace_span!("break", name = step.site.name);
    let _entered = span.enter();
    let mut probe = stream.probe.take();
    if let Some(probe) = &mut probe {
        probe.snapshot_args(stream.main(), step.site.to_string(), &step.args)?;
    }
    // Until the next break or the end of the replay, nothing else is allocated.
    arena.serve_claims(&step.claims);
    let result = catch_panic(|| (step.run)(&mut Eager::from_parts(stream, live), arena));
    stream.probe = probe;
    result?;
    scrub(stream, &step.outputs, live.rows())
}

fn thaw_output<L, O: Freeze>(tape: &Tape<L, O>) -> O {
    O::thaw(&tape.output, &Thaw { arena: &tape.arena })
}
