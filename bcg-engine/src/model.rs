//! What the worker needs of a model: run a step, say how it went.
//!
//! [`StepModel`] is implemented for [`ModelRunner`] here, and by fakes in tests, so that batching, cancelling and
//! failing are tested without a model.

use bcg_models::{ModelRunner, PendingStep, SampledToken, SequenceInput};

/// What the graphs of a model did since it was made, and what its graphs take.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GraphCounters {
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

/// Why a step failed. Its sequences are lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepError {
    /// One line.
    pub message: String,
    /// Whether the device is to blame: then no later step can be trusted, and the model must be loaded anew.
    pub is_device_lost: bool,
}

/// Runs steps of a model. Lives on the worker's thread.
pub trait StepModel {
    /// A step that was launched and not collected.
    type Pending;

    /// Enqueues one step. It may be launched before the step before it is collected.
    ///
    /// # Errors
    /// [`StepError`]; unless the device is lost, the model must be usable afterwards.
    fn launch(&mut self, batch: &[SequenceInput<'_>]) -> Result<Self::Pending, StepError>;

    /// Waits for a step and returns one token for each sequence, in order.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    fn collect(&mut self, step: Self::Pending) -> Result<Vec<SampledToken>, StepError>;

    /// Returns the counters.
    fn stats(&self) -> GraphCounters;
}

impl StepModel for ModelRunner {
    type Pending = PendingStep;

    fn launch(&mut self, batch: &[SequenceInput<'_>]) -> Result<PendingStep, StepError> {
        Self::launch(self, batch).map_err(StepError::from)
    }

    fn collect(&mut self, step: PendingStep) -> Result<Vec<SampledToken>, StepError> {
        Self::collect(self, step).map(|output| output.tokens).map_err(StepError::from)
    }

    fn stats(&self) -> GraphCounters {
        let stats = Self::stats(self);
        GraphCounters {
            replays: stats.num_replays,
            chained: stats.chained.iter().map(|(reason, &count)| (reason.name(), count)).collect(),
            captures: stats.num_captures,
            evictions: stats.num_evictions,
            graph_bytes: self.graph_bytes(),
            eager: stats.eager.iter().map(|(reason, &count)| (reason.name(), count)).collect(),
        }
    }
}

impl From<bcg_models::Error> for StepError {
    /// An error of the driver, or of memory that a kernel must not touch, is the device's.
    fn from(error: bcg_models::Error) -> Self {
        let is_device_lost = match &error {
            bcg_models::Error::Runtime(error) => {
                matches!(error.root(), bcg_runtime::Error::Driver { .. } | bcg_runtime::Error::Memory { .. })
            }
            _ => false,
        };
        Self { message: format!("{:#}", anyhow::Error::from(error)), is_device_lost }
    }
}
