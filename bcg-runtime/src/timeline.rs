//! The timeline of a replay: what each step cost on the host, and when the GPU ran what.
//!
//! - While no timeline is taken, a replay pays one test of an `Option` for each step, and allocates nothing.
//! - The host's times are those of a replay that nothing watched. The GPU's times are of another replay, which CUPTI
//!   watched and so slowed; they come with the host's times of that same replay, on one clock.
//!
//! - Of several ranks, all replay alike, and rank 0 watches the GPUs of all.
//!
//! [`crate::replay`] marks the steps; [`take`] is called by [`crate::BreakableCudaGraph::timeline`] alone.

use std::time::Instant;

use crate::device::KernelTrace;
use crate::stream::steps::{Part, StepLog};
use crate::{Error, Result, Runner, StepKind, StepTime};

/// Replays that nothing watches; the median one is kept.
const REPLAYS: usize = 5;

/// One forward, step by step. Times are in microseconds from the beginning of its replay.
///
/// # Example
/// ```
/// use bcg_runtime::{BreakableCudaGraph, Context, DType, Device, Eager, Result, Runner, RunnerOptions, StepKind, Tensor, eager_on_graph};
///
/// #[eager_on_graph]
/// fn seven(cx: &mut Eager<'_, ()>, x: &Tensor) -> Result<()> {
///     cx.fill_bytes(x, 7)
/// }
///
/// let mut runner = Runner::new(&Device::host(), RunnerOptions::default())?;
/// let mut graph = BreakableCudaGraph::new("fill");
/// graph.capture(&mut runner, &(), |cx: &mut Context<'_, ()>| {
///     let x = cx.empty(&[4], DType::U8)?;
///     seven(cx, &x)?;
///     Ok(x)
/// })?;
/// let timeline = graph.timeline(&mut runner, &())?;
/// assert!(timeline.steps.iter().any(|step| step.kind == StepKind::Break(0)));
/// assert!(timeline.gpu.is_err(), "the host device runs nothing on a GPU");
/// assert_eq!(graph.describe().blocks[0].offset, 0);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Timeline {
    /// What the host did, step by step.
    pub steps: Vec<StepTime>,
    /// When the host had enqueued everything, in microseconds.
    pub host_us: f64,
    /// When the device had run everything, in microseconds.
    pub wall_us: f64,
    /// The GPU's part, or why it is not known.
    pub gpu: Result<GpuTimeline, String>,
}

/// What the GPU did during a replay that was watched.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GpuTimeline {
    /// The host's steps in that replay.
    pub steps: Vec<StepTime>,
    /// The kernels, in the order of their starts.
    pub kernels: Vec<KernelTime>,
}

/// A kernel on the GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelTime {
    /// The kernel's entry point, as the compiler named it.
    pub name: String,
    /// The rank whose GPU ran it; the first of those that share that GPU.
    pub rank: usize,
    /// The number that the driver gave to the kernel's stream.
    pub stream_id: u32,
    /// Of a collective, how much longer it ran than on the rank where it ran shortest: this rank waited for that one. Known
    /// where each rank has a GPU of its own.
    pub wait_us: Option<f64>,
    /// When the kernel began, in microseconds.
    pub begin_us: f64,
    /// How long the kernel ran, in microseconds.
    pub duration_us: f64,
    /// The index in [`GpuTimeline::steps`] of the step that launched it.
    pub step: Option<usize>,
    /// The segment or break that the kernel belongs to. In a healed launch it is known only if the launch ran one
    /// kernel for each of its kernel nodes.
    pub part: Option<StepKind>,
}

impl GpuTimeline {
    /// Returns the microseconds from the first kernel's begin to the last one's end.
    pub fn span_us(&self) -> f64 {
        let begin = self.kernels.iter().map(|kernel| kernel.begin_us).fold(f64::INFINITY, f64::min);
        (self.kernels.iter().map(KernelTime::end_us).fold(0.0, f64::max) - begin).max(0.0)
    }

    /// Returns the number of ranks that kernels ran on; at least 1.
    pub fn num_ranks(&self) -> usize {
        self.kernels.iter().map(|kernel| kernel.rank + 1).max().unwrap_or(1)
    }

    /// Returns the microseconds in which at least one kernel of a rank ran.
    pub fn busy_us(&self, rank: usize) -> f64 {
        let (mut busy, mut until) = (0.0, f64::NEG_INFINITY);
        for kernel in self.kernels.iter().filter(|kernel| kernel.rank == rank) {
            busy += (kernel.end_us() - kernel.begin_us.max(until)).max(0.0);
            until = kernel.end_us().max(until);
        }
        busy
    }

    /// Puts what was traced on the clock of the replay that `log` is of. `gpus` are the numbers of the ranks' GPUs, in order.
    fn new(trace: KernelTrace, log: &StepLog, gpus: &[i32]) -> Self {
        let steps = log.steps();
        let (at, at_ns) = trace.clock;
        let since = log.begun.saturating_duration_since(at).as_secs_f64() * 1e6;
        let us = |ns: u64| (i128::from(ns) - i128::from(at_ns)) as f64 / 1e3 - since;
        let kernels = trace.runs.into_iter().filter_map(|run| {
            let launch_us = us(run.launch_ns?);
            let (begin_us, end_us) = (us(run.start_ns), us(run.end_ns));
            // Kernels of the replay that warmed the tracing up were launched earlier.
            let is_of = |gpu: &i32| u32::try_from(*gpu) == Ok(run.device_id);
            (launch_us >= 0.0).then(|| KernelTime {
                name: run.name,
                rank: gpus.iter().position(is_of).unwrap_or(0),
                stream_id: run.stream_id,
                wait_us: None,
                begin_us,
                duration_us: end_us - begin_us,
                step: steps.partition_point(|step| step.begin_us <= launch_us).checked_sub(1),
                part: None,
            })
        });
        Self { kernels: kernels.collect(), steps }
    }

    /// Says how long each rank waited in each collective, if every rank ran as many.
    fn note_waits(&mut self, num_ranks: usize, is_collective: impl Fn(&str) -> bool) {
        let of_rank = |rank| {
            let all = self.kernels.iter().enumerate();
            let own = all.filter(|(_, kernel)| kernel.rank == rank && is_collective(&kernel.name));
            own.map(|(at, _)| at).collect::<Vec<_>>()
        };
        let places: Vec<Vec<usize>> = (0..num_ranks).map(of_rank).collect();
        if num_ranks < 2 || places.iter().any(|own| own.len() != places[0].len()) {
            return;
        }
        for turn in 0..places[0].len() {
            let duration = |own: &Vec<usize>| self.kernels[own[turn]].duration_us;
            let shortest = places.iter().map(duration).fold(f64::INFINITY, f64::min);
            for own in &places {
                let kernel = &mut self.kernels[own[turn]];
                kernel.wait_us = Some(kernel.duration_us - shortest);
            }
        }
    }

    /// Says which part each kernel belongs to, given the parts of each merged executable, in order. All ranks' executables
    /// have the same parts.
    pub(crate) fn assign(&mut self, merged: &[Vec<Part>]) {
        let ranks = 0..self.num_ranks();
        for ((index, step), rank) in
            self.steps.iter().enumerate().flat_map(|step| ranks.clone().map(move |rank| (step, rank)))
        {
            let is_own = |kernel: &&mut KernelTime| kernel.step == Some(index) && kernel.rank == rank;
            let kernels = self.kernels.iter_mut().filter(is_own).collect::<Vec<_>>();
            if let StepKind::Healed { first_segment, num_segments } = step.kind {
                let ends =
                    [first_segment, first_segment + num_segments - 1].map(|index| Some(StepKind::Segment(index)));
                let is_launched = |parts: &&Vec<Part>| {
                    [parts.first(), parts.last()].map(|part| part.map(|part| part.0)) == ends
                        && parts.iter().map(|part| part.1).sum::<usize>() == kernels.len()
                };
                let parts = merged.iter().find(is_launched).into_iter().flatten();
                let owners = parts.flat_map(|&(kind, count)| std::iter::repeat_n(kind, count));
                kernels.into_iter().zip(owners).for_each(|(kernel, kind)| kernel.part = Some(kind));
            } else {
                kernels.into_iter().for_each(|kernel| kernel.part = Some(step.kind));
            }
        }
    }
}

impl KernelTime {
    /// Returns when the kernel had ended, in microseconds.
    pub fn end_us(&self) -> f64 {
        self.begin_us + self.duration_us
    }
}

/// A replay and its times.
struct Timed {
    log: StepLog,
    host_us: f64,
    wall_us: f64,
}

/// Takes the timeline of what `replay` runs, which it calls several times.
pub(crate) fn take(runner: &mut Runner, replay: &mut dyn FnMut(&mut Runner) -> Result<()>) -> Result<Timeline> {
    replay(runner)?;
    let mut timed = (0..REPLAYS).map(|_| timed(runner, replay)).collect::<Result<Vec<_>>>()?;
    timed.sort_by(|a, b| a.host_us.total_cmp(&b.host_us));
    let Timed { log, host_us, wall_us } = timed.swap_remove(REPLAYS / 2);
    let gpu = match watched(runner, replay) {
        Ok(gpu) => Ok(gpu),
        Err(Error::Trace(why)) => Err(why),
        Err(error) => return Err(error),
    };
    Ok(Timeline { steps: log.steps(), host_us, wall_us, gpu })
}

fn timed(runner: &mut Runner, replay: &mut dyn FnMut(&mut Runner) -> Result<()>) -> Result<Timed> {
    runner.synchronize()?;
    runner.stream_mut().step_log = Some(StepLog::begin());
    let result = replay(runner);
    let enqueued = Instant::now();
    let log = runner.stream_mut().step_log.take().unwrap_or_else(StepLog::begin);
    result?;
    runner.synchronize()?;
    let us = |at: Instant| at.duration_since(log.begun).as_secs_f64() * 1e6;
    Ok(Timed { host_us: us(enqueued), wall_us: us(Instant::now()), log })
}

fn watched(runner: &mut Runner, replay: &mut dyn FnMut(&mut Runner) -> Result<()>) -> Result<GpuTimeline> {
    let device = runner.device().clone();
    let ranks = runner.stream_mut().ranks().cloned();
    let mut run = || {
        replay(runner)?; // the first one that is watched is slow
        let timed = timed(runner, replay)?;
        // Rank 0 watches until the others' GPUs have ended too.
        ranks.as_ref().map_or(Ok(()), |ranks| ranks.come("a watched replay"))?;
        Ok::<_, Error>(timed)
    };
    let Some(ranks) = ranks.as_ref().filter(|ranks| ranks.world.num_local() > 1) else {
        let (timed, trace) = device.trace(true, run)?;
        return Ok(GpuTimeline::new(trace, &timed?.log, &[]));
    };
    if ranks.local() != 0 {
        run()?;
        return Err(Error::Trace("rank 0 watches the GPUs of all ranks".to_owned()));
    }
    let gpus = ranks.world.ordinals();
    let (timed, trace) = match gpus.is_empty() {
        // The ranks replay all the same: the others do.
        true => return run().and(Err(Error::Trace(format!("{} runs no kernel on a GPU", device.name())))),
        false => device.trace(true, &mut run)?,
    };
    let mut gpu = GpuTimeline::new(trace, &timed?.log, &gpus);
    let has_own = gpus.iter().enumerate().all(|(rank, gpu)| !gpus[..rank].contains(gpu));
    if let (true, Some(told)) = (has_own, runner.stream_mut().told()) {
        gpu.note_waits(gpus.len(), |kernel| told.names(kernel));
    }
    Ok(gpu)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::KernelRun;

    fn kernel(begin_us: f64, duration_us: f64) -> KernelTime {
        let (name, wait_us) = ("k".to_owned(), None);
        KernelTime { name, rank: 0, stream_id: 7, wait_us, begin_us, duration_us, step: None, part: None }
    }

    #[test]
    fn overlapping_kernels_count_once_as_busy_and_gaps_do_not() {
        let kernels = vec![kernel(10.0, 10.0), kernel(15.0, 3.0), kernel(18.0, 7.0), kernel(40.0, 1.0)];
        let gpu = GpuTimeline { steps: Vec::new(), kernels };
        assert_eq!((gpu.busy_us(0), gpu.busy_us(1), gpu.span_us()), (16.0, 0.0, 31.0));
        assert_eq!((GpuTimeline::default().busy_us(0), GpuTimeline::default().span_us()), (0.0, 0.0));
    }

    #[test]
    fn a_rank_waits_in_a_collective_as_long_as_it_runs_longer_than_the_last_to_come() {
        let on = |rank: usize, name: &str, duration_us: f64| KernelTime {
            name: name.to_owned(),
            rank,
            ..kernel(0.0, duration_us)
        };
        let kernels = vec![on(0, "sum", 5.0), on(1, "k", 9.0), on(1, "sum", 2.0), on(0, "sum", 3.0), on(1, "sum", 7.0)];
        let mut gpu = GpuTimeline { steps: Vec::new(), kernels };
        gpu.note_waits(2, |name| name == "sum");
        let waits: Vec<_> = gpu.kernels.iter().map(|kernel| kernel.wait_us).collect();
        assert_eq!(waits, [Some(3.0), None, Some(0.0), Some(0.0), Some(4.0)]);
        gpu.kernels.pop();
        gpu.kernels.iter_mut().for_each(|kernel| kernel.wait_us = None);
        gpu.note_waits(2, |name| name == "sum");
        assert!(gpu.kernels.iter().all(|kernel| kernel.wait_us.is_none()), "nobody knows which of them met");
    }

    #[test]
    fn kernels_belong_to_the_step_that_launched_them_whenever_they_ran() {
        let at = Instant::now();
        let begun = at + Duration::from_micros(100);
        let us = |us: u64| begun + Duration::from_micros(us);
        let done = vec![(StepKind::Segment(0), us(1), us(5)), (StepKind::Break(0), us(6), us(9))];
        let log = StepLog { begun, done, open: None };
        let run = |launch_us: u64, start_us: u64| KernelRun {
            name: launch_us.to_string(),
            start_ns: 1_000_000 + start_us * 1000,
            end_ns: 1_000_000 + start_us * 1000 + 500,
            stream_id: 7,
            device_id: 0,
            launch_ns: Some(1_000_000 + launch_us * 1000),
        };
        // Microsecond 100 of the trace is microsecond 0 of the replay; the first kernel is of an earlier replay.
        let runs = vec![run(50, 60), run(103, 110), run(103, 120), run(108, 130)];
        let gpu = GpuTimeline::new(KernelTrace { runs, clock: (at, 1_000_000) }, &log, &[]);
        let seen: Vec<_> = gpu.kernels.iter().map(|kernel| (kernel.begin_us.round(), kernel.step)).collect();
        assert_eq!(seen, [(10.0, Some(0)), (20.0, Some(0)), (30.0, Some(1))]);
    }

    #[test]
    fn kernels_of_a_healed_launch_belong_to_its_parts_in_order_if_their_number_is_right() {
        let (segment, one) = (StepKind::Segment, StepKind::Break(1));
        let merged = [
            vec![(segment(1), 2), (one, 2), (segment(2), 0)], // made for other work of the break
            vec![(segment(1), 2), (one, 1), (segment(2), 0)],
        ];
        let healed = StepKind::Healed { first_segment: 1, num_segments: 2 };
        let parts_of = |kind: StepKind, count: usize| {
            let steps = vec![StepTime { kind, begin_us: 0.0, duration_us: 1.0 }];
            let kernels = vec![KernelTime { step: Some(0), ..kernel(1.0, 1.0) }; count];
            let mut gpu = GpuTimeline { steps, kernels };
            gpu.assign(&merged);
            gpu.kernels.iter().map(|kernel| kernel.part).collect::<Vec<_>>()
        };
        assert_eq!(parts_of(healed, 3), [Some(segment(1)), Some(segment(1)), Some(one)]);
        assert_eq!(parts_of(healed, 5), [None; 5]);
        assert_eq!(parts_of(one, 2), [Some(one); 2]);
    }
}
