//! What the engines of one server have in common.

use std::sync::{Arc, Mutex, PoisonError};

use super::super::compilers::Compilers;
use super::super::metrics::QueueMetrics;
use super::super::{FairPlaces, QueueOptions};
use super::LocalOptions;

/// What the replicas of one server have in common, so that limits hold for the server, not for each of them: the places in
/// the queue, the threads that compile grammars, and what is counted of both. Clones are of the same server.
#[derive(Debug, Clone)]
pub struct Siblings {
    /// Submissions that wait.
    pub(super) submissions: FairPlaces,
    /// Answers that wait.
    pub(super) answers: FairPlaces,
    pub(super) metrics: QueueMetrics,
    compilers: Arc<Mutex<Option<Arc<Compilers>>>>,
}

impl Siblings {
    /// Makes the queue of a server.
    pub fn new(queue: QueueOptions) -> Self {
        Self {
            submissions: FairPlaces::new(queue.max_queued_requests),
            answers: FairPlaces::new(queue.max_queued_choices),
            metrics: QueueMetrics::default(),
            compilers: Arc::default(),
        }
    }

    /// The compilers of grammars, which the first engine that is loaded starts; `None` without a tokenizer.
    pub(super) fn compilers(&self, options: &LocalOptions) -> anyhow::Result<Option<Arc<Compilers>>> {
        let Some(tokenizer) = &options.tokenizer else { return Ok(None) };
        let mut compilers = self.compilers.lock().unwrap_or_else(PoisonError::into_inner);
        if compilers.is_none() {
            *compilers = Some(Arc::new(Compilers::start(tokenizer, &options.eos, options.info.vocab_size)?));
        }
        Ok(compilers.clone())
    }
}

/// Which replica of its server an engine is.
#[derive(Debug, Clone)]
pub struct Replica {
    /// Its number, from 0.
    pub index: usize,
    /// What it shares with the others.
    pub siblings: Siblings,
}
