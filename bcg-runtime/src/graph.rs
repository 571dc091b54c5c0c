//! A breakable CUDA graph: segments and breaks, in order.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Instant;

use crate::capture::context::Forward;
use crate::capture::freeze::Freezer;
use crate::capture::step::Step;
use crate::capture::writer::{CaptureGuard, TapeWriter};
use crate::device::watch::Hold;
use crate::error::catch_panic;
use crate::op::Op;
use crate::replay::tape::{self, Tape};
use crate::replay::{self, ReplayPath, verify};
use crate::stream::work_list;
use crate::{
    BlockLifetime, Context, Description, Error, Freeze, LiveBatch, OpStream, Result, Runner, Timeline, timeline,
};

/// What a graph checks when it captures.
///
/// # Example
/// ```
/// use bcg_runtime::{BreakableCudaGraph, Device, Error, GraphOptions, Runner, RunnerOptions};
/// let mut runner = Runner::new(&Device::host(), RunnerOptions::default())?;
/// let mut options = GraphOptions::default();
/// options.expected_breaks = Some(1);
/// let mut graph = BreakableCudaGraph::with_options("forgotten", options);
/// let refused = graph.capture(&mut runner, &(), |_| Ok(())); // nobody annotated a break
/// assert!(matches!(refused, Err(Error::Census { expected: 1, got: 0, .. })));
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct GraphOptions {
    /// The number of breaks that a capture must have; any other number is an error. It catches a function that
    /// somebody forgot to annotate.
    pub expected_breaks: Option<usize>,
}

/// A forward captured as segments with eager breaks between them.
///
/// `L` is the live batch and `O` the forward's output. The output's tensors are valid until the next forward of the
/// runner begins.
///
/// # Example
/// ```
/// use bcg_runtime::{BreakableCudaGraph, Context, DType, Device, Eager, LiveBatch, Result, Runner, RunnerOptions, Tensor, eager_on_graph};
///
/// struct Batch(u8);
/// impl LiveBatch for Batch {}
///
/// #[eager_on_graph]
/// fn fill_live(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<()> {
///     let byte = cx.live().0;
///     cx.fill_bytes(x, byte)
/// }
///
/// let mut runner = Runner::new(&Device::host(), RunnerOptions::default())?;
/// let mut graph = BreakableCudaGraph::new("fill");
/// graph.capture(&mut runner, &Batch(1), |cx: &mut Context<'_, Batch>| {
///     let x = cx.empty(&[4], DType::U8)?;
///     fill_live(cx, &x)?;
///     Ok(x)
/// })?;
/// let x = graph.replay(&mut runner, &Batch(7))?;
/// assert_eq!(runner.read::<u8>(&x)?, [7; 4]);
/// assert_eq!(graph.describe().breaks[0].name, "fill_live");
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub struct BreakableCudaGraph<L: LiveBatch, O: Freeze> {
    name: String,
    options: GraphOptions,
    last_replay: Option<ReplayPath>,
    captured: Result<Captured<L, O>, &'static str>,
}

/// What a successful capture keeps.
pub(crate) struct Captured<L, O: Freeze> {
    pub(crate) forward: Box<Forward<L, O>>,
    pub(crate) tape: Box<Tape<L, O>>,
}

impl<L: LiveBatch, O: Freeze> BreakableCudaGraph<L, O> {
    /// Names a graph that holds no capture yet.
    pub fn new(name: impl Into<String>) -> Self {
        Self::with_options(name, GraphOptions::default())
    }

    /// As [`BreakableCudaGraph::new`], with options.
    pub fn with_options(name: impl Into<String>, options: GraphOptions) -> Self {
        Self { name: name.into(), options, last_replay: None, captured: Err("it was never captured") }
    }

    /// Returns the graph's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Captures `forward` and runs it: each segment is launched as soon as it is complete and each break runs on real
    /// data, so the returned output is that of `live`. Of several ranks, all capture, nothing runs before all have, and the
    /// first replay gives the output (law L17).
    ///
    /// An earlier capture of this graph is dropped first.
    ///
    /// # Errors
    /// With several ranks, [`Error::Ranks`] on all of them if one fails, or captures other work than rank 0, and
    /// [`Error::CaptureForbidden`] for a break without a stub that waits or reads back; then no rank has captured, and all
    /// go on.
    ///
    /// The first error, located by segment or break; what was captured is discarded and the runner stays usable.
    /// [`Error::ArenaFull`] if a segment needs more memory than the arena has: run the forward eagerly once before.
    pub fn capture(
        &mut self,
        runner: &mut Runner,
        live: &L,
        forward: impl Fn(&mut Context<'_, L>) -> Result<O> + Send + Sync + 'static,
    ) -> Result<O> {
        self.captured = Err("its last capture failed");
        let span = tracing::info_span!("capture", graph = %self.name);
        let _entered = span.enter();
        let is_dry = runner.stream_mut().ranks().is_some();
        let (tape, output) = capture(runner.stream_mut(), live, self.options, &forward, is_dry)?;
        self.captured = Ok(Captured { forward: Box::new(forward), tape: Box::new(tape) });
        if is_dry { self.replay(runner, live) } else { Ok(output) }
    }

    /// Captures `forward` ahead of its first use, and runs nothing where that is possible: if every break only
    /// allocates, launches, fills and copies within the device. Otherwise it captures and runs, as
    /// [`capture`](Self::capture) does.
    ///
    /// # Errors
    /// As [`capture`](Self::capture).
    ///
    /// # Example
    /// ```
    /// use bcg_runtime::{BreakableCudaGraph, Device, Runner, RunnerOptions};
    /// let device = Device::host();
    /// let mut runner = Runner::new(&device, RunnerOptions::default())?;
    /// let (x, written) = (device.tensor(&[2], &[1i32, 2])?, device.tensor(&[2], &[0i32, 0])?);
    /// let mut graph = BreakableCudaGraph::new("copy");
    /// let to = written.clone();
    /// graph.capture_ahead(&mut runner, &(), move |cx| cx.copy(&to, &x))?;
    /// assert_eq!(device.read::<i32>(&written)?, [0, 0]); // nothing ran
    /// graph.replay(&mut runner, &())?;
    /// assert_eq!(device.read::<i32>(&written)?, [1, 2]);
    /// # Ok::<(), bcg_runtime::Error>(())
    /// ```
    pub fn capture_ahead(
        &mut self,
        runner: &mut Runner,
        live: &L,
        forward: impl Fn(&mut Context<'_, L>) -> Result<O> + Send + Sync + 'static,
    ) -> Result<()> {
        self.captured = Err("its last capture failed");
        let span = tracing::info_span!("capture", graph = %self.name);
        let _entered = span.enter();
        let taped = match capture(runner.stream_mut(), live, self.options, &forward, true) {
            Err(error @ Error::NeedsRun { .. }) if runner.stream_mut().ranks().is_none() => {
                tracing::debug!(%error, "captured with a run");
                capture(runner.stream_mut(), live, self.options, &forward, false)
            }
            taped => taped,
        };
        self.captured = Ok(Captured { forward: Box::new(forward), tape: Box::new(taped?.0) });
        Ok(())
    }

    /// Replays the segments and breaks in order, on the live batch of this run.
    ///
    /// # Errors
    /// [`Error::NotCaptured`] without a successful capture; [`Error::Generation`] if something the graph uses was
    /// replaced; [`Error::Break`] or [`Error::Segment`] for what fails on the way. After an error there is no output.
    pub fn replay(&mut self, runner: &mut Runner, live: &L) -> Result<O> {
        let captured = Self::captured(&mut self.captured, &self.name)?;
        let tape = &mut captured.tape;
        check_arena(&self.name, &tape.arena, runner)?;
        let (output, path) = replay::replay(tape, runner.stream_mut(), live)?;
        self.last_replay = Some(path);
        Ok(output)
    }

    /// Replays, then runs the same forward eagerly, and compares them bit for bit at every break and at the end.
    ///
    /// The output is that of the eager run, which is the same.
    ///
    /// # Errors
    /// [`Error::Mismatch`] naming the first segment or output that differs; those of both runs.
    pub fn replay_verified(&mut self, runner: &mut Runner, live: &L) -> Result<O> {
        let Captured { forward, tape } = Self::captured(&mut self.captured, &self.name)?;
        check_arena(&self.name, &tape.arena, runner)?;
        let (output, path) = verify::replay(&self.name, forward, tape, runner, live)?;
        self.last_replay = Some(path);
        Ok(output)
    }

    /// Returns how the last replay that succeeded went, if there was one.
    pub fn last_replay(&self) -> Option<ReplayPath> {
        self.last_replay
    }

    /// Returns the nodes of all executables that are there now: what the graph takes of the device is proportional.
    pub(crate) fn num_exec_nodes(&self) -> usize {
        match &self.captured {
            Ok(Captured { tape, .. }) => tape.num_exec_nodes(),
            Err(_) => 0,
        }
    }

    /// Times the steps of a replay, on the host and, where kernels can be traced, on the GPU. It replays the batch
    /// several times.
    ///
    /// # Errors
    /// As [`replay`](Self::replay).
    pub fn timeline(&mut self, runner: &mut Runner, live: &L) -> Result<Timeline> {
        let mut timeline = timeline::take(runner, &mut |runner| self.replay(runner, live).map(drop))?;
        if let (Ok(gpu), Ok(Captured { tape, .. })) = (&mut timeline.gpu, &self.captured) {
            gpu.assign(&tape.healer.parts(&tape.steps));
        }
        Ok(timeline)
    }

    /// Drops the capture: its executables, its frozen arguments and its share of what they use.
    pub fn reset(&mut self) {
        self.captured = Err("it was reset");
    }

    /// Tells whether a replay is possible.
    pub fn is_captured(&self) -> bool {
        self.captured.is_ok()
    }

    /// Describes segments, breaks and memory.
    pub fn describe(&self) -> Description {
        let mut description = Description { name: self.name.clone(), ..Description::default() };
        if let Ok(Captured { tape, .. }) = &self.captured {
            tape.describe(&mut description);
        }
        description
    }

    fn captured<'a>(
        captured: &'a mut Result<Captured<L, O>, &'static str>,
        name: &str,
    ) -> Result<&'a mut Captured<L, O>> {
        captured.as_mut().map_err(|reason| Error::NotCaptured { name: name.to_owned(), reason })
    }
}

fn check_arena(graph: &str, captured_on: &crate::arena::Arena, runner: &mut Runner) -> Result<()> {
    let arena = runner.stream_mut().arena();
    if arena.is(captured_on) {
        return Ok(());
    }
    Err(Error::foreign(&format!("graph `{graph}` on {captured_on:?}"), &format!("{arena:?}")))
}

impl<L: LiveBatch, O: Freeze> fmt::Debug for BreakableCudaGraph<L, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BreakableCudaGraph")
            .field("name", &self.name)
            .field("is_captured", &self.is_captured())
            .finish_non_exhaustive()
    }
}

/// Says what to do about a break that needs a run, which a capture of several ranks does not have.
fn needs_stub(error: Error) -> Error {
    match error {
        Error::NeedsRun { what } => {
            let remedy =
                "nothing runs while several ranks capture; give the break a stub: `#[eager_on_graph(stub = …)]`";
            Error::CaptureForbidden { what: format!("{what} in a break: {remedy}") }
        }
        error => error,
    }
}

/// What a capture has on its tape, before any executable of it is made.
struct Recorded<L, O: Freeze> {
    writer: TapeWriter<L>,
    blocks: Vec<BlockLifetime>,
    output: O,
    frozen_output: O::Frozen,
}

/// Captures a forward; with `is_dry`, nothing of it runs. Several ranks meet before they begin, and compare what they have
/// when they have captured and when they can launch it.
fn capture<L: LiveBatch, O: Freeze>(
    stream: &mut OpStream,
    live: &L,
    options: GraphOptions,
    forward: &Forward<L, O>,
    is_dry: bool,
) -> Result<(Tape<L, O>, O)> {
    const WHAT: &str = "a capture";
    let begun = Instant::now();
    let ranks = stream.ranks().cloned();
    if let Some(ranks) = &ranks {
        ranks.come(WHAT)?;
    }
    let main = Arc::clone(stream.main());
    let hold = Hold::begin(main.device());
    let mut recorded = record(stream, live, options, forward, is_dry, &hold);
    if let Some(ranks) = &ranks {
        recorded = ranks.agree(WHAT, recorded.map_err(needs_stub), Recorded::number);
    }
    let Recorded { writer, blocks, output, frozen_output } = recorded?;
    let TapeWriter { mut steps, spans, retained, pinned, stamps, .. } = writer;
    let mut healer = tape::prepare(stream, &mut steps, spans);
    if let Some(ranks) = &ranks {
        healer = ranks.agree(WHAT, healer, |_| 0);
    }
    let healer = healer?;
    drop(hold);
    let arena = stream.arena().clone();
    let tape = Tape {
        healer,
        blocks,
        steps,
        output: frozen_output,
        stamps,
        extent_bytes: arena.stats().extent_bytes,
        arena,
        capture_time: begun.elapsed(),
        _retained: retained,
        _transport: stream.transport().cloned(),
        _pinned: pinned,
    };
    tracing::debug!(
        steps = tape.steps.len(),
        micros = tape.capture_time.as_micros() as u64,
        extent_bytes = tape.extent_bytes,
        is_dry,
        "captured"
    );
    Ok((tape, output))
}

fn record<L: LiveBatch, O: Freeze>(
    stream: &mut OpStream,
    live: &L,
    options: GraphOptions,
    forward: &Forward<L, O>,
    is_dry: bool,
    hold: &Hold<'_>,
) -> Result<Recorded<L, O>> {
    stream.begin_forward(live.rows(), 0)?;
    stream.arena().begin_log();
    let mut guard = CaptureGuard::begin(stream, is_dry, hold)?;
    let run = || {
        let mut cx = Context { stream: guard.stream, live, writer: Some(&mut guard.writer) };
        forward(&mut cx)
    };
    let result = catch_panic(run).map_err(|error| error.in_segment(guard.writer.segment_index()));
    if let Some(what) = work_list::needs_run() {
        return Err(Error::NeedsRun { what });
    }
    let output = result?;
    let mut freezer = Freezer::new(guard.stream);
    let frozen_output = output.freeze(&mut freezer).map_err(|error| error.in_segment(guard.writer.segment_index()))?;
    let arena = guard.stream.arena().clone();
    let writer = guard.seal()?;
    check_census(&writer.steps, options.expected_breaks)?;
    let blocks = arena.end_log(writer.steps.len());
    Ok(Recorded { writer, blocks, output, frozen_output })
}

impl<L, O: Freeze> Recorded<L, O> {
    /// Returns a number that differs, as good as surely, between captures of different work: of other kernels or
    /// geometries, of other breaks, or at other places of the arena (law L14).
    fn number(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for step in &self.writer.steps {
            match step {
                Step::Segment(segment) => (&segment.kernels, segment.geometry, segment.nodes.total()).hash(&mut hasher),
                Step::Break(step) => (step.site.name, step.launches, step.not_healable).hash(&mut hasher),
            }
        }
        for block in &self.blocks {
            (block.offset, block.bytes, block.from, block.to).hash(&mut hasher);
        }
        for span in &self.writer.spans {
            (span.num_launches(), span.first_and_last()).hash(&mut hasher);
            for listed in span.ops() {
                if let Op::Launch(launch) = &listed.op {
                    (launch.kernel.name(), launch.dims).hash(&mut hasher);
                }
            }
        }
        hasher.finish()
    }
}

fn check_census<L>(steps: &[Step<L>], expected: Option<usize>) -> Result<()> {
    let names: Vec<&str> = steps
        .iter()
        .filter_map(|step| match step {
            Step::Break(step) => Some(step.site.name),
            Step::Segment(_) => None,
        })
        .collect();
    match expected {
        Some(expected) if expected != names.len() => {
            Err(Error::Census { expected, got: names.len(), names: names.join(", ") })
        }
        _ => Ok(()),
    }
}
