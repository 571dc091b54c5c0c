//! The forward alone, for those who time it.

use bcg_runtime::{Decision, Timeline};

use super::ModelRunner;
use crate::batch::{Phase, SequenceInput};
use crate::error::Result;

/// How a forward is run, for [`ModelRunner::forward_only`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForwardPath {
    /// As [`ModelRunner::step`] would: with a graph where there is one.
    Graph,
    /// Without a graph, whatever is captured.
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
            ForwardPath::Eager => {
                let rows = batch.iter().map(|sequence| sequence.tokens.len()).sum();
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
        self.check(batch)?;
        let (phase, rows) = (Phase::of(batch), batch.iter().map(|sequence| sequence.tokens.len()).sum());
        let size = match self.graphs_and_runner(phase).0.decide(rows) {
            Decision::Replay { size } | Decision::Capture { size } => size,
            Decision::Eager(_) => rows,
        };
        let live = self.inputs.fill(&mut self.runner, batch, phase, size, true)?;
        let (graphs, runner) = self.graphs_and_runner(phase);
        Ok(graphs.timeline(size, runner, &live)?)
    }

    /// Waits until what was enqueued has run.
    ///
    /// # Errors
    /// The first error of that work.
    pub fn synchronize(&self) -> Result<()> {
        Ok(self.runner.synchronize()?)
    }
}
