//! What reaches the worker's thread from others, and what they see of it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::Notify;

use super::super::metrics::Metrics;
use super::super::roles::Moved;
use super::super::watchdog::Pulse;
use super::open::OpenAnswers;
use super::requests::Accepted;

/// What reaches the worker from other threads.
#[derive(Debug)]
pub enum Message {
    /// Accepted requests, all those of a submission.
    Requests(Vec<Accepted>),
    /// A request that the prefill role is done with.
    Moved(Box<Moved>),
    /// Nothing but the news that something else changed, so that an idle worker looks.
    Wake,
}

/// The sending end of the worker's channel.
///
/// The channel holds no more answers than may wait, or than the decode role has places for, and one wake-up; so it needs no
/// bound of its own.
#[derive(Debug, Clone)]
pub struct MessageSender {
    sender: Sender<Message>,
    /// Whether a wake-up is in the channel.
    is_waking: Arc<AtomicBool>,
}

impl MessageSender {
    /// Lets the worker look for what changed, if it sleeps. Cheap, from any thread, and as often as one likes: wake-ups
    /// that the worker has not seen yet count as one.
    pub fn wake(&self) {
        if !self.is_waking.swap(true, Ordering::AcqRel) {
            // Without a worker there is nobody to wake.
            let _ = self.sender.send(Message::Wake);
        }
    }

    /// Gives a request to the decode role.
    pub(crate) fn hand_over(&self, moved: Box<Moved>) {
        // Without a receiver, the end of its output tells the client.
        let _ = self.sender.send(Message::Moved(moved));
    }
}

/// The receiving end of the worker's channel.
#[derive(Debug)]
pub struct MessageReceiver {
    receiver: Receiver<Message>,
    is_waking: Arc<AtomicBool>,
}

/// Makes the channel of a worker.
pub fn channel() -> (MessageSender, MessageReceiver) {
    let (sender, receiver) = std::sync::mpsc::channel();
    let is_waking = Arc::new(AtomicBool::new(false));
    (MessageSender { sender, is_waking: Arc::clone(&is_waking) }, MessageReceiver { receiver, is_waking })
}

impl MessageReceiver {
    /// Waits no longer than `timeout`; an error if nothing came, or nothing can.
    pub(super) fn recv(&self, timeout: Duration) -> Result<Message, RecvTimeoutError> {
        self.receiver.recv_timeout(timeout).inspect(|message| self.note(message))
    }

    pub(super) fn try_recv(&self) -> Result<Message, TryRecvError> {
        self.receiver.try_recv().inspect(|message| self.note(message))
    }

    /// From here on another wake-up is sent again: whoever changes something after this wakes the worker anew.
    fn note(&self, message: &Message) {
        if matches!(message, Message::Wake) {
            self.is_waking.store(false, Ordering::Release);
        }
    }
}

/// How an engine ended that nobody stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EngineEnd {
    /// It gave up, for this reason; its thread has ended or soon will.
    GaveUp(String),
    /// A call of its thread does not return, for this reason: the thread cannot be waited for, and only the end of the
    /// process helps.
    Stuck(String),
}

/// What the worker shares with the engine's handle.
#[derive(Debug, Default)]
pub struct Shared {
    /// Counters and gauges.
    pub metrics: Metrics,
    /// Ends the worker at once; what runs fails.
    pub stop: AtomicBool,
    /// Asks the worker to empty the prefix cache.
    pub flush_cache: AtomicBool,
    /// Steps that were collected without an error.
    pub num_steps: AtomicU64,
    /// The answers that are not complete.
    pub open: OpenAnswers,
    pub(crate) pulse: Pulse,
    failure: Mutex<Option<String>>,
    /// Held while a request is sent, so that none comes after those that the end of the engine fails.
    end: RwLock<Option<EngineEnd>>,
    ended: Notify,
}

impl Shared {
    /// What an engine with these metrics shares.
    pub fn new(metrics: Metrics) -> Self {
        Self { metrics, ..Self::default() }
    }

    /// Returns why the engine cannot serve any more, or not now.
    pub fn failure(&self) -> Option<String> {
        match self.end() {
            Some(EngineEnd::GaveUp(why) | EngineEnd::Stuck(why)) => Some(why),
            None => self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// Says why the engine cannot serve for now, or that it can again.
    pub fn set_failure(&self, failure: Option<String>) {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = failure;
    }

    /// Returns how the engine ended, if it did.
    pub fn end(&self) -> Option<EngineEnd> {
        self.end.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sends requests to the worker; `false` if there is none any more.
    pub fn send(&self, worker: &MessageSender, requests: Vec<Accepted>) -> bool {
        let end = self.end.read().unwrap_or_else(PoisonError::into_inner);
        end.is_none() && worker.sender.send(Message::Requests(requests)).is_ok()
    }

    /// Says that the worker hangs, and why: nobody waits any longer for an answer of it.
    pub fn end_stuck(&self, why: &str) {
        self.end_with(EngineEnd::Stuck(why.to_owned()));
        self.open.fail_all(why);
    }

    /// Says that the engine will never serve again, and why; the first one who does is right. No request is sent from now
    /// on, and the worker ends as soon as it can.
    pub fn end_with(&self, end: EngineEnd) {
        self.end.write().unwrap_or_else(PoisonError::into_inner).get_or_insert(end);
        self.stop.store(true, Ordering::Relaxed);
        self.ended.notify_one();
    }

    /// Resolves when the engine will never serve again. For one waiter.
    pub async fn given_up(&self) -> EngineEnd {
        loop {
            if let Some(end) = self.end() {
                return end;
            }
            self.ended.notified().await;
        }
    }
}
