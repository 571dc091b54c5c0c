//! Replay: the segments and breaks of a graph, in order, on the live batch.
//!
//! [`heal`] makes one launch of segments and the recorded work of the breaks between them; [`chain`] alternates graph
//! launches and breaks; [`verify`] compares a replay with an eager run. All three run a break in the same way.

pub(crate) mod chain;
pub(crate) mod heal;
pub(crate) mod record;
pub(crate) mod verify;

use std::fmt;

use crate::arena::Arena;
use crate::bridge::scrub;
use crate::capture::step::Break;
use crate::error::catch_panic;
use crate::freeze::Thaw;
use crate::graph::Recording;
use crate::{Eager, Freeze, LiveBatch, OpStream, Result};

/// How a runner replays.
///
/// # Example
/// ```
/// use bcg_runtime::{Device, ReplayMode, Runner, RunnerOptions};
/// let options = RunnerOptions { replay: ReplayMode::Chain, ..RunnerOptions::default() };
/// let runner = Runner::new(&Device::host(), options)?; // launches segment by segment, break by break
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReplayMode {
    /// What breaks enqueue is patched into executables that do the work of several segments in one launch, wherever that
    /// is possible.
    #[default]
    Healed,
    /// Each segment is launched, and each break run, in order.
    Chain,
}

/// How one replay went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ReplayPath {
    /// Everything between two breaks that cannot be healed was one launch.
    Healed,
    /// At least some of it was launched segment by segment.
    Chain(ChainReason),
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
    /// A break did what cannot be recorded, for the first time.
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

/// Replays a recording in the way that its runner and its breaks allow.
pub(crate) fn replay<L: LiveBatch, O: Freeze>(
    recording: &mut Recording<L, O>,
    stream: &mut OpStream,
    live: &L,
) -> Result<(O, ReplayPath)> {
    match chain_reason(recording, stream) {
        Some(reason) => Ok((chain::replay(recording, stream, live)?, ReplayPath::Chain(reason))),
        None => heal::replay(recording, stream, live),
    }
}

/// Returns why a replay is a chain from its beginning on, if so.
fn chain_reason<L: LiveBatch, O: Freeze>(recording: &Recording<L, O>, stream: &OpStream) -> Option<ChainReason> {
    match stream.replay_mode() {
        ReplayMode::Chain => Some(ChainReason::Mode),
        ReplayMode::Healed => (!recording.may_heal()).then_some(ChainReason::NoBreakHeals),
    }
}

/// Begins a forward at the recorded addresses.
fn begin<L: LiveBatch, O: Freeze>(recording: &Recording<L, O>, stream: &mut OpStream, live: &L) -> Result<()> {
    recording.stamps.iter().try_for_each(crate::generation::Stamp::check)?;
    stream.begin_forward(live.rows(), recording.extent_bytes)?;
    stream.poison_extent(recording.extent_bytes)
}

/// Runs a break with its frozen arguments, and scrubs the padded rows of its outputs.
fn run_break<L: LiveBatch>(step: &Break<L>, arena: &Arena, stream: &mut OpStream, live: &L) -> Result<()> {
    let span = tracing::trace_span!("break", name = step.site.name);
    let _entered = span.enter();
    let mut probe = stream.probe.take();
    if let Some(probe) = &mut probe {
        probe.snapshot_args(stream, step.site.to_string(), &step.args)?;
    }
    // Until the next break or the end of the replay, nothing else is allocated.
    arena.begin_recorded(&step.blocks);
    let result = catch_panic(|| (step.run)(&mut Eager::from_parts(stream, live), arena));
    stream.probe = probe;
    result?;
    scrub(stream, &step.outputs, live.rows())
}

fn thaw_output<L, O: Freeze>(recording: &Recording<L, O>) -> O {
    O::thaw(&recording.output, &Thaw { arena: &recording.arena })
}
