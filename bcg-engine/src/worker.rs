//! The thread that owns the model: takes requests, asks the scheduler what to run, runs it, hands tokens to the outputs.
//!
//! Host and device overlap: while the device runs step k, the host plans and launches step k + 1, then waits for the tokens
//! of step k and, while the device goes on, turns them into text. An answer that turns out to have ended in step k has a
//! token of step k + 1 under way, which is dropped.
//!
//! Invariants:
//! - it never waits for a client: every event channel has room for all the events of its answer;
//! - it sleeps only when no step is under way and none can be planned, and a message wakes it;
//! - a step that fails, by an error or by a panic, ends the requests that are under way and no other;
//! - after an error of the device the model is loaded anew, once; requests that had not begun are kept.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use bcg_models::{SampledToken, SamplingParams, SequenceInput};
use tokio::sync::{Notify, OwnedSemaphorePermit};

use super::RequestError;
use super::choice::Choice;
use super::metrics::{Metrics, PhaseLabel};
use super::model::{GraphCounters, StepError, StepModel};
use super::output::Output;
use super::scheduler::{Scheduler, StepPlan};
use super::sequence::{Sequence, SequenceId};

/// Failed steps in a row after which the device is held to be lost, whatever they say.
const FAILED_STEPS_MAX: u32 = 3;

/// How long an idle worker sleeps before it looks whether it must stop.
const IDLE_TICK: Duration = Duration::from_millis(200);

/// An accepted request: on its way to the worker, then in its hands until it ends.
#[derive(Debug)]
pub struct Accepted {
    /// Token ids, at least one; the worker moves them into the request's sequence.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// What is asked of their logits before.
    pub choice: Choice,
    /// Log probabilities: `None` for none, else how many alternatives.
    pub top_logprobs: Option<usize>,
    /// Where tokens go.
    pub output: Output,
    /// Its place in the queue, given back when it runs first.
    pub slot: Option<OwnedSemaphorePermit>,
    /// When it was accepted.
    pub arrived: Instant,
    /// When its latest token was chosen; `None` before the first one.
    pub last_token: Option<Instant>,
}

/// What reaches the worker from other threads.
#[derive(Debug)]
pub enum Message {
    /// A request, accepted.
    Request(Box<Accepted>),
    /// Nothing but the news that something else changed, so that an idle worker looks.
    Wake,
}

/// The sending end of the worker's channel.
///
/// The channel holds no more requests than may wait, and one wake-up, so sending never waits.
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
    fn recv(&self, timeout: Duration) -> Result<Message, RecvTimeoutError> {
        self.receiver.recv_timeout(timeout).inspect(|message| self.note(message))
    }

    fn try_recv(&self) -> Result<Message, TryRecvError> {
        self.receiver.try_recv().inspect(|message| self.note(message))
    }

    /// From here on another wake-up is sent again: whoever changes something after this wakes the worker anew.
    fn note(&self, message: &Message) {
        if matches!(message, Message::Wake) {
            self.is_waking.store(false, Ordering::Release);
        }
    }
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
    failure: Mutex<Option<String>>,
    /// Held while a request is sent, so that none comes after those that the end of the engine fails.
    gave_up: RwLock<bool>,
    failed: Notify,
}

impl Shared {
    /// Returns why the engine cannot serve any more, or not now.
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says why the engine cannot serve, or that it can again.
    pub fn set_failure(&self, failure: Option<String>) {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = failure;
    }

    /// Sends a request to the worker; `false` if there is none any more.
    pub fn send(&self, worker: &MessageSender, request: Accepted) -> bool {
        let gave_up = self.gave_up.read().unwrap_or_else(PoisonError::into_inner);
        !*gave_up && worker.sender.send(Message::Request(Box::new(request))).is_ok()
    }

    /// Says that the engine will never serve again. No request is sent from now on.
    pub fn give_up(&self, why: String) {
        *self.gave_up.write().unwrap_or_else(PoisonError::into_inner) = true;
        self.set_failure(Some(why));
        self.failed.notify_one();
    }

    /// Resolves when the engine will never serve again. For one waiter.
    pub async fn given_up(&self) {
        self.failed.notified().await;
    }
}

/// A step on the device.
#[derive(Debug)]
struct InFlight<P> {
    plan: StepPlan,
    pending: P,
    launched: Instant,
}

/// Why a worker ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// It was told to, or no more requests can come.
    Stopped,
    /// The device is lost, and why.
    DeviceLost(String),
}

/// The requests of a worker, which outlive its model.
#[derive(Debug)]
pub struct Requests {
    arriving: MessageReceiver,
    active: HashMap<SequenceId, Accepted>,
    /// Sequences that had not begun when the model was lost.
    kept: Vec<Sequence>,
    next_id: u64,
}

impl Requests {
    /// Makes one that has nothing to do yet.
    pub fn new(arriving: MessageReceiver) -> Self {
        Self { arriving, active: HashMap::new(), kept: Vec::new(), next_id: 0 }
    }

    /// Ends every request, also those that were not taken yet.
    pub fn fail_all(&mut self, metrics: &Metrics, message: &str) {
        let arriving = self.arriving.receiver.try_iter().filter_map(|message| match message {
            Message::Request(request) => Some(request.output),
            Message::Wake => None,
        });
        for output in self.active.drain().map(|(_, active)| active.output).chain(arriving) {
            output.fail(RequestError::Engine(message.to_owned()));
            metrics.count_finished("failed");
        }
    }
}

/// The worker's state; [`Worker::run`] is its thread.
#[derive(Debug)]
pub struct Worker<'a, M: StepModel> {
    model: M,
    scheduler: Scheduler,
    requests: &'a mut Requests,
    shared: Arc<Shared>,
    in_flight: Option<InFlight<M::Pending>>,
    /// What the metrics hold of what the model did.
    counted: GraphCounters,
    /// When the device's last step was collected.
    last_step: Instant,
    failed_steps: u32,
    /// Whether the last turn found nothing to launch.
    is_resting: bool,
}

impl<'a, M: StepModel> Worker<'a, M> {
    /// Makes a worker that goes on with the requests of the one before it.
    pub fn new(model: M, mut scheduler: Scheduler, requests: &'a mut Requests, shared: Arc<Shared>) -> Self {
        shared.metrics.kv_pages.set(gauge(scheduler.cache().pool().num_pages()));
        requests.kept.drain(..).for_each(|sequence| scheduler.add(sequence));
        let (counted, last_step) = (GraphCounters::default(), Instant::now());
        Self {
            model,
            scheduler,
            requests,
            shared,
            in_flight: None,
            counted,
            last_step,
            failed_steps: 0,
            is_resting: true,
        }
    }

    /// Works until every handle is gone and nothing is left, until it is told to stop, or until the device is lost.
    pub fn run(mut self) -> Exit {
        self.take_stats();
        while !self.shared.stop.load(Ordering::Relaxed) {
            let open = self.take_arrived();
            self.reap_cancelled();
            if self.shared.flush_cache.swap(false, Ordering::Relaxed) {
                let pages = self.scheduler.flush_cache();
                tracing::info!(pages, "emptied the prefix cache");
            }
            self.publish();
            let is_done = !open && self.scheduler.is_idle() && self.in_flight.is_none();
            if let Err(error) = self.turn() {
                self.requests.kept = self.scheduler.take_waiting();
                self.fail_all_but_kept(&format!("the device was lost while it worked on this request: {error}"));
                return Exit::DeviceLost(error);
            }
            if is_done {
                break;
            }
        }
        self.fail_all_but_kept("the engine was stopped before the answer was complete");
        Exit::Stopped
    }

    /// Launches the next step, then ends the one before. An error means that the device is lost.
    fn turn(&mut self) -> Result<(), String> {
        let plan = self.scheduler.plan();
        self.is_resting = plan.is_none();
        let launched = plan.map_or(Ok(None), |plan| {
            self.note(&plan);
            self.launch(plan)
        });
        let before = self.in_flight.take();
        match launched {
            Ok(next) => self.in_flight = next,
            Err((plan, error)) => self.step_failed(&plan, error)?,
        }
        before.map_or(Ok(()), |step| self.collect(step))
    }

    /// Takes what has arrived, waiting for it only when idle; `false` once no more can come.
    fn take_arrived(&mut self) -> bool {
        if self.is_resting && self.in_flight.is_none() {
            self.publish();
            match self.requests.arriving.recv(IDLE_TICK) {
                Ok(message) => self.take(message),
                Err(RecvTimeoutError::Timeout) => return true,
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
        loop {
            match self.requests.arriving.try_recv() {
                Ok(message) => self.take(message),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn take(&mut self, message: Message) {
        let Message::Request(request) = message else { return };
        let mut request = *request;
        self.requests.next_id += 1;
        let (id, prompt) = (SequenceId(self.requests.next_id), std::mem::take(&mut request.prompt));
        self.shared.metrics.prompt_tokens.inc_by(prompt.len() as u64);
        let (max_tokens, waits_for_tokens) = (request.output.max_tokens(), request.choice.waits_for_tokens());
        self.scheduler.add(Sequence::new(id, prompt, max_tokens, waits_for_tokens));
        self.requests.active.insert(id, request);
    }

    fn reap_cancelled(&mut self) {
        let active = self.requests.active.iter();
        let cancelled: Vec<SequenceId> =
            active.filter(|(_, active)| active.output.is_cancelled()).map(|(&id, _)| id).collect();
        for id in cancelled {
            tracing::debug!(sequence = %id, "cancelled by the client");
            self.end(id, "cancelled");
        }
    }

    /// Counts what a plan did to the queue.
    fn note(&mut self, plan: &StepPlan) {
        let metrics = &self.shared.metrics;
        for id in &plan.admitted {
            let Some(active) = self.requests.active.get_mut(id) else { continue };
            // A sequence that comes back from a preemption has given its place in the queue back already.
            if active.slot.take().is_some()
                && let Some(sequence) = self.scheduler.running(*id)
            {
                active.output.set_cached_tokens(sequence.num_cached());
                metrics.cached_prompt_tokens.inc_by(sequence.num_cached() as u64);
            }
        }
        metrics.preemptions.inc_by(plan.preempted.len() as u64);
        for id in &plan.preempted {
            tracing::debug!(sequence = %id, "preempted: pages or a place went to others");
        }
    }

    /// Enqueues a step; nothing if it has no entries.
    #[allow(clippy::type_complexity)] // what happened, or to whom it did not
    fn launch(&mut self, plan: StepPlan) -> Result<Option<InFlight<M::Pending>>, (StepPlan, StepError)> {
        if plan.entries.is_empty() {
            return Ok(None);
        }
        let launched = Instant::now();
        match self.try_launch(&plan) {
            Ok(pending) => {
                self.scheduler.launch(&plan);
                Ok(Some(InFlight { plan, pending, launched }))
            }
            Err(error) => Err((plan, error)),
        }
    }

    fn try_launch(&mut self, plan: &StepPlan) -> Result<M::Pending, StepError> {
        let requests = &*self.requests;
        let mut inputs = Vec::with_capacity(plan.entries.len());
        for entry in &plan.entries {
            let Some((sequence, active)) = self.scheduler.running(entry.id).zip(requests.active.get(&entry.id)) else {
                let message = format!("sequence {} is planned but not known", entry.id);
                return Err(StepError { message, is_device_lost: false });
            };
            let known = entry.num_tokens - usize::from(entry.chosen_row.is_some());
            let tokens = &sequence.tokens()[entry.past_len..entry.past_len + known];
            // What a prompt's chunk before the last one chooses does not count.
            let choice = entry.samples.then_some(&active.choice);
            inputs.push(SequenceInput {
                chosen_row: entry.chosen_row,
                state: sequence.state(),
                num_drawn: sequence.num_generated() as u64,
                logit_bias: choice.map_or(&[], Choice::bias),
                token_mask: choice.and_then(Choice::mask),
                top_logprobs: active.top_logprobs.filter(|_| entry.samples),
                ..SequenceInput::new(tokens, entry.past_len, sequence.pages(), &active.sampling)
            });
        }
        let model = &mut self.model;
        caught(|| model.launch(&inputs))
    }

    /// Waits for a step and hands out what it chose. An error means that the device is lost.
    fn collect(&mut self, step: InFlight<M::Pending>) -> Result<(), String> {
        let InFlight { plan, pending, launched } = step;
        let model = &mut self.model;
        let sampled = caught(|| model.collect(pending)).and_then(|sampled| match sampled.len() {
            len if len == plan.entries.len() => Ok(sampled),
            len => {
                let message = format!("{len} tokens for {} sequences", plan.entries.len());
                Err(StepError { message, is_device_lost: false })
            }
        });
        // A step begins on the device when it was launched, or when the one before it ended.
        let now = Instant::now();
        let took = now - launched.max(std::mem::replace(&mut self.last_step, now));
        let phase = PhaseLabel { phase: plan.kind().name() };
        self.shared.metrics.step_time.get_or_create(&phase).observe(took.as_secs_f64());
        self.take_stats();
        match sampled {
            Ok(sampled) => {
                self.failed_steps = 0;
                self.shared.num_steps.fetch_add(1, Ordering::Relaxed);
                self.deliver(&plan, &sampled);
                Ok(())
            }
            Err(error) => self.step_failed(&plan, error),
        }
    }

    /// Ends the requests that are under way: those of a step that failed, and those of the step after it, which may have
    /// read what it left. An error means that the device is lost.
    fn step_failed(&mut self, plan: &StepPlan, error: StepError) -> Result<(), String> {
        self.failed_steps += 1;
        self.shared.metrics.failed_steps.inc();
        let phase = plan.kind().name();
        tracing::error!(phase, requests = plan.entries.len(), error = error.message, "a step failed");
        let after = self.in_flight.take();
        let message = format!("the {phase} step of this request failed: {}", error.message);
        for entry in plan.entries.iter().chain(after.iter().flat_map(|step| &step.plan.entries)) {
            self.fail(entry.id, RequestError::Engine(message.clone()));
        }
        if error.is_device_lost || self.failed_steps >= FAILED_STEPS_MAX { Err(error.message) } else { Ok(()) }
    }

    fn deliver(&mut self, plan: &StepPlan, sampled: &[SampledToken]) {
        let ids: Vec<u32> = sampled.iter().map(|sampled| sampled.id).collect();
        self.scheduler.collect(plan, &ids);
        let now = Instant::now();
        for (entry, sampled) in plan.entries.iter().zip(sampled).filter(|(entry, _)| entry.samples) {
            // One that ended in the step before has a token too many.
            let Some(active) = self.requests.active.get_mut(&entry.id) else { continue };
            let metrics = &self.shared.metrics;
            metrics.generated_tokens.inc();
            match active.last_token.replace(now) {
                None => metrics.time_to_first_token.observe((now - active.arrived).as_secs_f64()),
                Some(last) => metrics.inter_token_latency.observe((now - last).as_secs_f64()),
            }
            let pushed = active.output.push(sampled).map_err(RequestError::Engine).and_then(|reason| match reason {
                None => active.choice.accept(sampled.id).map(|()| None).map_err(RequestError::Refused),
                Some(reason) => Ok(Some(reason)),
            });
            match pushed {
                Ok(None) => {}
                Ok(Some(reason)) => {
                    metrics.request_latency.observe((now - active.arrived).as_secs_f64());
                    self.end(entry.id, reason.as_str());
                }
                Err(error) => self.fail(entry.id, error),
            }
        }
    }

    fn fail(&mut self, id: SequenceId, error: RequestError) {
        if let Some(active) = self.requests.active.get(&id) {
            active.output.fail(error);
        }
        self.end(id, "failed");
    }

    fn fail_all_but_kept(&mut self, message: &str) {
        let is_kept = |id: &SequenceId| self.requests.kept.iter().any(|sequence| sequence.id == *id);
        let left: Vec<SequenceId> = self.requests.active.keys().copied().filter(|id| !is_kept(id)).collect();
        left.into_iter().for_each(|id| self.fail(id, RequestError::Engine(message.to_owned())));
    }

    fn end(&mut self, id: SequenceId, reason: &'static str) {
        self.scheduler.remove(id);
        if self.requests.active.remove(&id).is_some() {
            self.shared.metrics.count_finished(reason);
        }
    }

    fn take_stats(&mut self) {
        let stats = self.model.stats();
        self.shared.metrics.take_stats(&stats, &self.counted);
        self.counted = stats;
    }

    fn publish(&self) {
        let (metrics, scheduler) = (&self.shared.metrics, &self.scheduler);
        metrics.running.set(gauge(scheduler.num_running()));
        metrics.kv_pages_used.set(gauge(scheduler.num_used_pages()));
        metrics.kv_pages_cached.set(gauge(scheduler.cache().num_cached()));
    }
}

fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Calls into a model, which returns its stream and memory to use when a call unwinds; the thread outlives that.
fn caught<T>(call: impl FnOnce() -> Result<T, StepError>) -> Result<T, StepError> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().copied();
        let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
        Err(StepError { message: format!("panicked: {text}"), is_device_lost: false })
    })
}

#[cfg(test)]
mod tests {
    use bcg_models::state::PagePool;
    use serde_json::Value;

    use super::super::local::{LocalEngine, LocalOptions};
    use super::super::prefix_cache::PrefixCache;
    use super::super::scheduler::Limits;
    use super::super::{Engine, GenerationRequest, ModelInfo, Prompt, SubmitError};
    use super::*;
    use crate::metrics::ReasonLabel;

    /// Loses its device at every step.
    struct Lost;

    impl StepModel for Lost {
        type Pending = ();

        fn launch(&mut self, _: &[SequenceInput<'_>]) -> Result<(), StepError> {
            Err(StepError { message: "device lost".into(), is_device_lost: true })
        }

        fn collect(&mut self, (): ()) -> Result<Vec<SampledToken>, StepError> {
            Ok(Vec::new())
        }

        fn stats(&self) -> GraphCounters {
            GraphCounters::default()
        }
    }

    fn engine() -> LocalEngine {
        let engine = LocalEngine::start(|| {
            let (name, has_tokenizer) = ("lost".to_owned(), false);
            let info = ModelInfo { name, created: 0, context_length: 16, vocab_size: 8, has_tokenizer };
            let (max_queued_requests, settings) = (64, Value::Null);
            let options =
                LocalOptions { info, tokenizer: None, chat: None, eos: vec![2], max_queued_requests, settings };
            let limits = Limits { max_running_requests: 2, chunked_prefill_size: 16, context_length: 16 };
            Ok((Lost, Scheduler::new(limits, PrefixCache::new(PagePool::new(4, 16), true)), options))
        });
        engine.expect("starts")
    }

    #[test]
    fn wake_ups_that_nobody_has_seen_count_as_one() {
        let (sender, receiver) = channel();
        for _ in 0..2 {
            (0..3).for_each(|_| sender.wake());
            assert!(matches!(receiver.recv(IDLE_TICK), Ok(Message::Wake)));
            assert!(matches!(receiver.try_recv(), Err(TryRecvError::Empty)));
        }
    }

    #[test]
    fn requests_that_come_while_the_engine_gives_up_end_too() {
        for _ in 0..200 {
            let engine = engine();
            let submit = || {
                let mut accepted = 0;
                loop {
                    match engine.submit(GenerationRequest::greedy(Prompt::Tokens(vec![1]))) {
                        Ok(_) => accepted += 1,
                        Err(SubmitError::QueueFull { .. }) => std::thread::yield_now(),
                        Err(_) => return accepted,
                    }
                }
            };
            let accepted: u64 = std::thread::scope(|scope| {
                let threads = [(); 4].map(|()| scope.spawn(submit));
                threads.map(|thread| thread.join().expect("no panic")).iter().sum()
            });
            let count = |reason| engine.metrics().finished.get_or_create(&ReasonLabel { reason }).get();
            let ended = || count("failed") + count("cancelled");
            // The thread may still be telling those that wait.
            let deadline = Instant::now() + Duration::from_secs(10);
            while ended() < accepted && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(ended(), accepted);
        }
    }
}
