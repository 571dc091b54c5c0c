//! The steps of a replay as they happen, for its timeline: without a log, a step costs one test of an `Option`.

use std::time::Instant;

use crate::OpStream;

/// What the host did in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StepKind {
    /// It launched the executable of this segment.
    Segment(usize),
    /// It ran the body of this break: its work was enqueued, or listed for a healed launch.
    Break(usize),
    /// It patched and launched an executable into which some segments and the breaks between them are merged.
    Healed {
        /// The first of the segments.
        first_segment: usize,
        /// How many segments.
        num_segments: usize,
    },
}

/// The time of one step on the host.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepTime {
    /// What the host did.
    pub kind: StepKind,
    /// When the step began, in microseconds.
    pub begin_us: f64,
    /// How long the host was busy with the step, in microseconds.
    pub duration_us: f64,
}

impl StepTime {
    /// Returns when the host was done with the step, in microseconds.
    pub fn end_us(&self) -> f64 {
        self.begin_us + self.duration_us
    }
}

/// A segment or a break, and its number of kernels.
pub(crate) type Part = (StepKind, usize);

/// The steps of the replay that runs now, as they happen.
#[derive(Debug)]
pub(crate) struct StepLog {
    pub(crate) begun: Instant,
    pub(crate) done: Vec<(StepKind, Instant, Instant)>,
    pub(crate) open: Option<(StepKind, Instant)>,
}

impl StepLog {
    pub(crate) fn begin() -> Self {
        // Room for the steps of most models, so that logging does not allocate either.
        Self { done: Vec::with_capacity(1024), open: None, begun: Instant::now() }
    }

    /// Returns the steps that have ended, in order.
    pub(crate) fn steps(&self) -> Vec<StepTime> {
        let us = |at: Instant| at.duration_since(self.begun).as_secs_f64() * 1e6;
        let step = |&(kind, begin, end): &(StepKind, Instant, Instant)| StepTime {
            kind,
            begin_us: us(begin),
            duration_us: us(end) - us(begin),
        };
        self.done.iter().map(step).collect()
    }
}

impl OpStream {
    /// Says that a replay begins a step.
    pub(crate) fn begin_step(&mut self, kind: StepKind) {
        if let Some(log) = &mut self.step_log {
            log.open = Some((kind, Instant::now()));
        }
    }

    /// Says that the step has ended.
    pub(crate) fn end_step(&mut self) {
        if let Some(log) = &mut self.step_log
            && let Some((kind, begin)) = log.open.take()
        {
            log.done.push((kind, begin, Instant::now()));
        }
    }
}
