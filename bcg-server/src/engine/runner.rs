//! What the worker needs of a model: run a step, say how it went.
//!
//! [`StepRunner`] is implemented for [`ModelRunner`] here, and by fakes in tests, so that batching, cancelling and
//! failing are tested without a model.

use bcg_models::{ModelRunner, SampledToken, SequenceInput};

use crate::error::one_line;

/// What a runner did since it was made, and what its graphs take.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RunnerStats {
    /// Forwards that replayed a graph.
    pub replays: u64,
    /// Replays that were, at least in part, launched segment by segment, by reason.
    pub chained: Vec<(&'static str, u64)>,
    /// Forwards that captured one.
    pub captures: u64,
    /// Graphs dropped to stay within their budget.
    pub evictions: u64,
    /// Device memory that the graphs held take now, in bytes.
    pub graph_bytes: usize,
    /// Forwards that ran eagerly, by reason.
    pub eager: Vec<(&'static str, u64)>,
}

/// Runs steps of a model. Lives on the worker's thread.
pub trait StepRunner {
    /// Runs one step and returns one token for each sequence, in order.
    ///
    /// # Errors
    /// One line that says what failed. The step's sequences are lost; the runner must be usable afterwards.
    fn step(&mut self, batch: &[SequenceInput<'_>]) -> Result<Vec<SampledToken>, String>;

    /// Returns the counters.
    fn stats(&self) -> RunnerStats;
}

impl StepRunner for ModelRunner {
    fn step(&mut self, batch: &[SequenceInput<'_>]) -> Result<Vec<SampledToken>, String> {
        Self::step(self, batch).map(|output| output.tokens).map_err(|error| one_line(&error))
    }

    fn stats(&self) -> RunnerStats {
        let stats = Self::stats(self);
        RunnerStats {
            replays: stats.num_replays,
            chained: stats.chained.iter().map(|(reason, &count)| (reason.name(), count)).collect(),
            captures: stats.num_captures,
            evictions: stats.num_evictions,
            graph_bytes: self.graph_bytes(),
            eager: stats.eager.iter().map(|(reason, &count)| (reason.name(), count)).collect(),
        }
    }
}
