//! Parts of a step, for those who time them. They leave a sequence's state where it was, so that a batch can be run
//! again.

use std::time::{Duration, Instant};

use bcg_runtime::{Decision, ReplayMode, Timeline};

use super::ModelRunner;
use crate::batch::{Phase, SequenceInput};
use crate::error::Result;

/// How a forward is run, for [`ModelRunner::forward_only`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForwardPath {
    /// It is the replay of a graph where there is one, as in [`ModelRunner::step`].
    Graph,
    /// It is the replay of a graph where there is one, launched segment by segment.
    Chain,
    /// It runs eagerly, whatever is captured.
    Eager,
}

impl ModelRunner {
    /// Uploads a batch and enqueues its forward, up to the hidden states: no logits, no tokens. Does not wait for it.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn forward_only(&mut self, batch: &[SequenceInput<'_>], path: ForwardPath) -> Result<()> {
        self.check(batch)?;
        match path {
            ForwardPath::Graph => self.run(batch)?,
            ForwardPath::Chain => {
                self.runtime.set_replay_mode(ReplayMode::Chain);
                let ran = self.run(batch);
                self.runtime.set_replay_mode(ReplayMode::default());
                ran?
            }
            ForwardPath::Eager => {
                let rows = batch.iter().map(SequenceInput::num_new).sum();
                self.run_eagerly(batch, Phase::of(batch), rows)?
            }
        };
        Ok(())
    }

    /// Times the steps of a batch's replay, without upload, logits and tokens. It replays the batch several times.
    ///
    /// # Errors
    /// As [`step`](Self::step); [`bcg_runtime::Error::NotCaptured`] if no graph is captured for this batch.
    pub fn timeline(&mut self, batch: &[SequenceInput<'_>]) -> Result<Timeline> {
        let (phase, size) = self.upload_only(batch)?;
        let live = self.inputs.fill(&mut self.runtime, batch, phase, size, true)?;
        let (graphs, runtime) = self.graphs_and_runtime(phase);
        Ok(graphs.timeline(size, runtime, &live)?)
    }

    /// Decides how a batch would be run, uploads it, and returns its phase and padded rows.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn upload_only(&mut self, batch: &[SequenceInput<'_>]) -> Result<(Phase, usize)> {
        self.check(batch)?;
        let (phase, rows) = (Phase::of(batch), batch.iter().map(SequenceInput::num_new).sum());
        let size = match self.graphs_and_runtime(phase).0.decide(rows) {
            Decision::Replay { size } | Decision::Capture { size } => size,
            Decision::Eager(_) => rows,
        };
        self.inputs.fill(&mut self.runtime, batch, phase, size, true)?;
        Ok((phase, size))
    }

    /// Runs a greedy step and returns for how long the host worked: until all was enqueued, and, once the device had
    /// finished, until the tokens were read.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_host_time(&mut self, batch: &[SequenceInput<'_>]) -> Result<Duration> {
        let begun = Instant::now();
        self.check(batch)?;
        let (live, hidden) = self.run(batch)?;
        let pending = self.choose_tokens(&live, &hidden, batch)?;
        let enqueued = begun.elapsed();
        self.synchronize()?;
        let begun = Instant::now();
        self.collect(pending)?;
        Ok(enqueued + begun.elapsed())
    }

    /// Waits until what was enqueued has run.
    ///
    /// # Errors
    /// The first error of that work.
    pub fn synchronize(&self) -> Result<()> {
        Ok(self.runtime.synchronize()?)
    }
}
