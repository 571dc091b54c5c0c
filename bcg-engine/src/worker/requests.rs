//! Accepted requests: those on their way to the worker, and those in its hands until they end.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bcg_models::SamplingParams;

use super::super::choice::Choice;
use super::super::metrics::Metrics;
use super::super::output::Output;
use super::super::sequence::{Sequence, SequenceId};
use super::super::{ClientId, RequestError};
use super::open::OpenAnswer;
use super::shared::{Message, MessageReceiver};

/// An accepted request: on its way to the worker, then in its hands until it ends.
#[derive(Debug)]
pub struct Accepted {
    /// Token ids, at least one, shared with the other answers to them.
    pub prompt: Arc<[u32]>,
    /// Whose it is.
    pub client: ClientId,
    /// Orders the waiting requests of one client, greater ones first.
    pub priority: i32,
    /// Whether it only asks if the engine works.
    pub is_probe: bool,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// What is asked of their logits before.
    pub choice: Choice,
    /// Log probabilities: `None` for none, else how many alternatives.
    pub top_logprobs: Option<usize>,
    /// Where tokens go.
    pub output: Output,
    /// What is known of it outside the worker, with its places in the queue until it runs first.
    pub open: OpenAnswer,
    /// When it was accepted.
    pub arrived: Instant,
    /// When its latest token was chosen; `None` before the first one.
    pub last_token: Option<Instant>,
}

impl Accepted {
    /// Makes the sequence that runs for it.
    pub(super) fn sequence(&self, id: SequenceId) -> Sequence {
        let (max_tokens, waits_for_tokens) = (self.output.max_tokens(), self.choice.waits_for_tokens());
        let sequence = Sequence::new(id, Arc::clone(&self.prompt), max_tokens, waits_for_tokens);
        let sequence = sequence.of(self.client.clone(), self.priority);
        if self.is_probe { sequence.as_probe() } else { sequence }
    }
}

/// The requests of a worker, which outlive its model.
#[derive(Debug)]
pub struct Requests {
    pub(super) arriving: MessageReceiver,
    pub(super) active: HashMap<SequenceId, Accepted>,
    /// Sequences that had not begun when the model was lost.
    pub(super) kept: Vec<Sequence>,
    /// How long a request may wait before it begins.
    queue_timeout: Option<Duration>,
    /// Whether any step of their model may capture a graph.
    pub(super) captures_lazily: bool,
    next_id: u64,
}

impl Requests {
    /// Makes one that has nothing to do yet.
    pub fn new(arriving: MessageReceiver, queue_timeout: Option<Duration>, captures_lazily: bool) -> Self {
        Self { arriving, active: HashMap::new(), kept: Vec::new(), queue_timeout, captures_lazily, next_id: 0 }
    }

    /// Takes a request and returns its sequence.
    pub(super) fn take(&mut self, request: Accepted) -> Sequence {
        self.next_id += 1;
        let id = SequenceId(self.next_id);
        let sequence = request.sequence(id);
        self.active.insert(id, request);
        sequence
    }

    /// Takes a request that the prefill role is done with, and returns its number here.
    pub(super) fn take_moved(&mut self, request: Accepted) -> SequenceId {
        self.next_id += 1;
        let id = SequenceId(self.next_id);
        self.active.insert(id, request);
        id
    }

    /// Returns the sequences whose clients left.
    pub(super) fn cancelled(&self) -> Vec<SequenceId> {
        self.active.iter().filter(|(_, active)| active.output.is_cancelled()).map(|(&id, _)| id).collect()
    }

    /// Returns the sequences that have waited too long, and why they fail. One that ran before and waits again is none.
    pub(super) fn overdue(&self, now: Instant) -> (Vec<SequenceId>, RequestError) {
        let timeout = self.queue_timeout.unwrap_or(Duration::MAX);
        let is_overdue = |active: &Accepted| active.open.waits() && now - active.arrived >= timeout;
        let overdue = self.active.iter().filter(|(_, active)| is_overdue(active)).map(|(&id, _)| id).collect();
        (overdue, RequestError::QueueTimeout { seconds: timeout.as_secs() })
    }

    /// Ends every request, also those that were not taken yet.
    pub fn fail_all(&mut self, metrics: &Metrics, message: &str) {
        let mut left: Vec<Accepted> = self.active.drain().map(|(_, active)| active).collect();
        while let Ok(message) = self.arriving.try_recv() {
            match message {
                Message::Requests(requests) => left.extend(requests),
                Message::Moved(moved) => left.push(moved.request),
                Message::Wake => {}
            }
        }
        for request in left {
            request.output.fail(RequestError::Engine(message.to_owned()));
            metrics.count_finished("failed");
        }
    }
}
