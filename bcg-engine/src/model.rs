//! What the worker needs of a model: run a step, say how it went.
//!
//! [`StepModel`] is implemented for [`ModelRunner`] here, and by fakes in tests, so that batching, cancelling and
//! failing are tested without a model.

use bcg_models::{ModelRunner, PendingStep, RankMemory, SampledToken, SequenceInput};
use bcg_runtime::DeviceKind;

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

/// What a failed step has broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// Nothing: the model works on, and the step can be tried again.
    Nothing,
    /// The model: no later step can be trusted, and it must be loaded anew, which this process can do.
    Model,
    /// This rank, and with it the model: it must be loaded anew, which this process can do.
    Rank(usize),
    /// The device's context: nothing that this process does will work on the device again.
    Context,
}

/// Why a step failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepError {
    /// One line.
    pub message: String,
    /// What it has broken.
    pub damage: Damage,
}

impl StepError {
    /// The error of a step that broke nothing.
    pub fn harmless(message: impl Into<String>) -> Self {
        Self { message: message.into(), damage: Damage::Nothing }
    }
}

/// Runs steps of a model. Lives on the worker's thread.
pub trait StepModel {
    /// A step that was launched and not collected.
    type Pending;

    /// Enqueues one step. It may be launched before the steps before it are collected, as many of them as
    /// [`steps_ahead`](Self::steps_ahead) says.
    ///
    /// # Errors
    /// [`StepError`]; if it broke nothing, the model must be usable afterwards.
    fn launch(&mut self, batch: &[SequenceInput<'_>]) -> Result<Self::Pending, StepError>;

    /// Waits for a step and returns one token for each sequence, in order.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    fn collect(&mut self, step: Self::Pending) -> Result<Vec<SampledToken>, StepError>;

    /// How many steps, launched and not collected, keep the model busy while the host plans the next one: one for each
    /// stage of a pipeline.
    fn steps_ahead(&self) -> usize {
        1
    }

    /// Says whether the model is still whole, while no step is under way.
    ///
    /// # Errors
    /// [`StepError`] of a part of it that was lost meanwhile.
    fn check(&mut self) -> Result<(), StepError> {
        Ok(())
    }

    /// Whether a step runs while the host does something else, so that a launch ahead saves time.
    fn overlaps(&self) -> bool {
        true
    }

    /// Waits until nothing that was launched runs any more.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    fn settle(&mut self) -> Result<(), StepError> {
        Ok(())
    }

    /// Returns the counters.
    fn stats(&self) -> GraphCounters;

    /// Returns what each rank takes of its device's memory, in bytes; nothing of a model that has none.
    fn rank_bytes(&mut self) -> Vec<usize> {
        Vec::new()
    }
}

impl StepModel for ModelRunner {
    type Pending = PendingStep;

    fn launch(&mut self, batch: &[SequenceInput<'_>]) -> Result<PendingStep, StepError> {
        Self::launch(self, batch).map_err(StepError::from)
    }

    fn collect(&mut self, step: PendingStep) -> Result<Vec<SampledToken>, StepError> {
        Self::collect(self, step).map(|output| output.tokens).map_err(StepError::from)
    }

    fn steps_ahead(&self) -> usize {
        self.num_stages()
    }

    fn settle(&mut self) -> Result<(), StepError> {
        self.synchronize().map_err(StepError::from)
    }

    fn check(&mut self) -> Result<(), StepError> {
        self.world().lost().map_or(Ok(()), |lost| Err(bcg_models::Error::from(lost).into()))
    }

    fn overlaps(&self) -> bool {
        self.device().kind() != DeviceKind::Host
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

    fn rank_bytes(&mut self) -> Vec<usize> {
        // Of a lost rank the next step tells.
        self.rank_memory().unwrap_or_default().iter().map(RankMemory::total).collect()
    }
}

impl From<bcg_models::Error> for StepError {
    /// An error of the driver, or of memory that a kernel must not touch, is the device's, and a lost rank is as a lost
    /// device. Some errors of the driver end all work of the process on it.
    fn from(error: bcg_models::Error) -> Self {
        let damage = match &error {
            bcg_models::Error::Runtime(error) if error.is_context_lost() => Damage::Context,
            bcg_models::Error::Runtime(error) => match error.root() {
                bcg_runtime::Error::Driver { .. } | bcg_runtime::Error::Memory { .. } => Damage::Model,
                bcg_runtime::Error::RankLost { rank, .. } => Damage::Rank(*rank),
                _ => Damage::Nothing,
            },
            _ => Damage::Nothing,
        };
        Self { message: format!("{:#}", anyhow::Error::from(error)), damage }
    }
}
