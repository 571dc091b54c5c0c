//! The thread that owns the model: takes requests, asks the scheduler what to run, runs it, hands tokens to the outputs.
//!
//! Host and device overlap: while the device runs step k, the host plans and launches step k + 1, then waits for the tokens
//! of step k and, while the device goes on, turns them into text. An answer that turns out to have ended in step k has a
//! token of step k + 1 under way, which is dropped. A model that is a pipeline of S stages has S steps under way instead.
//!
//! Invariants:
//! - it never waits for a client: every event channel has room for all the events of its answer;
//! - it sleeps only when no step is under way and none can be planned, and a message wakes it;
//! - a request that never began fails once it has waited too long;
//! - a step that fails, by an error or by a panic, ends the request that is to blame and no other (`trials`);
//! - after an error of the device what runs fails, and the model is loaded anew, once, for the requests that wait.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use bcg_models::{SampledToken, SequenceInput};

pub use self::open::{OpenAnswer, OpenAnswers, QueuePlaces};
pub use self::requests::{Accepted, Requests};
pub use self::shared::{EngineEnd, Message, MessageReceiver, MessageSender, Shared, channel};
use super::RequestError;
use super::choice::Choice;
use super::metrics::PhaseLabel;
use super::model::{Damage, GraphCounters, StepError, StepModel};
use super::roles::{Destination, Moved, Partner, RoleName};
use super::scheduler::{Scheduler, StepPlan};
use super::sequence::{Lane, SequenceId};
use super::watchdog::{Doing, StepName};
use pace::Pace;
use trials::Trials;

mod blame;
mod moves;
mod open;
mod pace;
mod requests;
mod shared;
mod trials;

/// How long an idle worker sleeps before it looks whether it must stop.
const IDLE_TICK: Duration = Duration::from_millis(200);

/// How often it looks at those that wait, whether their clients left or they waited too long.
const LOOK_AFTER: Duration = Duration::from_millis(50);

/// A step on the device.
#[derive(Debug)]
struct InFlight<P> {
    plan: StepPlan,
    pending: P,
    launched: Instant,
    name: StepName,
    /// Whether it may capture a graph or load kernels.
    may_capture: bool,
    /// In the prefill role, where its rows go.
    destinations: Vec<Arc<Destination>>,
}

/// Why a worker ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// It was told to, or no more requests can come.
    Stopped,
    /// The model is broken and must be loaded anew, and why.
    ModelLost(String),
    /// The device's context is lost for good, and why: only another process can go on.
    ContextLost(String),
}

/// What a step has broken, and how.
struct Broken {
    damage: Damage,
    message: String,
}

/// The worker's state; [`Worker::run`] is its thread.
#[derive(Debug)]
pub struct Worker<'a, M: StepModel> {
    model: M,
    scheduler: Scheduler,
    requests: &'a mut Requests,
    shared: Arc<Shared>,
    /// In the order of their launches: no more than the model wants ahead, once a turn is over.
    in_flight: VecDeque<InFlight<M::Pending>>,
    /// What the metrics hold of what the model did.
    counted: GraphCounters,
    /// When the device's last step was collected.
    last_step: Instant,
    /// Requests of failed steps, until it is known who of them is to blame.
    trials: Trials,
    /// Whether the last step was one of those on trial.
    was_trial: bool,
    /// Steps that were launched.
    num_launched: u64,
    pace: Pace,
    captures_lazily: bool,
    /// Whether the last turn found nothing to launch.
    is_resting: bool,
    /// When it looked at all requests last.
    last_look: Instant,
    /// Sequences that are held until the mask of their next token is there.
    held: Vec<SequenceId>,
    /// With how many tokens each of them is held, and since when.
    held_since: HashMap<SequenceId, (usize, Instant)>,
    /// The other role, in a pair.
    partner: Option<Partner>,
}

impl<'a, M: StepModel> Worker<'a, M> {
    /// Makes a worker that goes on with the requests of the one before it.
    pub fn new(mut model: M, mut scheduler: Scheduler, requests: &'a mut Requests, shared: Arc<Shared>) -> Self {
        shared.metrics.kv_pages.set(gauge(scheduler.cache().pool().num_pages()));
        shared.metrics.take_ranks(&model.rank_bytes());
        requests.kept.drain(..).for_each(|sequence| scheduler.add(sequence));
        let (counted, last_step) = (GraphCounters::default(), Instant::now());
        let held = requests.active.keys().copied().filter(|id| scheduler.set_held(*id, true)).collect();
        Self {
            model,
            scheduler,
            shared,
            in_flight: VecDeque::new(),
            counted,
            last_step,
            trials: Trials::default(),
            was_trial: false,
            num_launched: 0,
            pace: Pace::default(),
            captures_lazily: requests.captures_lazily,
            is_resting: true,
            last_look: last_step,
            held,
            held_since: HashMap::new(),
            partner: None,
            requests,
        }
    }

    /// Makes it the worker of one role of a pair.
    #[must_use]
    pub fn beside(self, partner: Partner) -> Self {
        Self { partner: Some(partner), ..self }
    }

    /// Works until every handle is gone and nothing is left, until it is told to stop, or until the device is lost.
    pub fn run(mut self) -> Exit {
        let exit = self.work();
        self.shared.pulse.beat(Doing::Nothing, false);
        exit
    }

    fn work(&mut self) -> Exit {
        self.take_stats();
        while !self.shared.stop.load(Ordering::Relaxed) {
            if let Some(exit) = self.partner.as_ref().and_then(Partner::ended) {
                return self.end_as_partner(exit);
            }
            let early = self.collect_early();
            let open = self.take_arrived();
            self.reap();
            self.release_ready();
            if self.shared.flush_cache.swap(false, Ordering::Relaxed) {
                let pages = self.scheduler.flush_cache();
                tracing::info!(pages, "emptied the prefix cache");
            }
            self.publish();
            let is_done = !open && self.scheduler.is_idle() && self.in_flight.is_empty();
            if let Err(Broken { damage, message }) = early.and_then(|()| self.check()).and_then(|()| self.turn()) {
                self.keep_waiting();
                self.fail_all_but_kept(&format!("the device was lost while it worked on this request: {message}"));
                return if damage == Damage::Context { Exit::ContextLost(message) } else { Exit::ModelLost(message) };
            }
            if is_done {
                break;
            }
        }
        self.fail_all_but_kept("the engine was stopped before the answer was complete");
        Exit::Stopped
    }

    /// Looks, while it rests, whether the model was lost meanwhile: what has just arrived need not fail for that.
    fn check(&mut self) -> Result<(), Broken> {
        if !self.is_resting || !self.in_flight.is_empty() {
            return Ok(());
        }
        let Err(StepError { message, damage }) = self.model.check() else { return Ok(()) };
        tracing::error!(error = message, "the model was lost while it rested");
        if let Damage::Rank(rank) = damage {
            self.shared.metrics.count_lost_rank(rank);
        }
        Err(Broken { damage, message })
    }

    /// Ends the steps under way before the next one is planned, where several clients share a device that does nothing while
    /// the host waits: it gains nothing from a step ahead.
    fn collect_early(&mut self) -> Result<(), Broken> {
        if self.model.overlaps() || !self.pace.is_shared(Instant::now()) {
            return Ok(());
        }
        self.collect_all()
    }

    /// Launches the next step, then ends the oldest one under way, if those ahead of it keep the device busy.
    fn turn(&mut self) -> Result<(), Broken> {
        let plan = self.next_plan();
        let launched = plan.map_or(Ok(None), |plan| {
            self.note(&plan);
            self.launch(plan)
        });
        match launched {
            Ok(Some(next)) => {
                self.in_flight.push_back(next);
                if self.in_flight.len() <= self.model.steps_ahead() { Ok(()) } else { self.collect_oldest() }
            }
            Ok(None) => self.collect_oldest(),
            Err((plan, error)) if error.damage != Damage::Nothing => {
                // Those under way fail with all others, who lost the device at work.
                self.in_flight.clear();
                self.step_failed(&plan, error)
            }
            Err((plan, error)) => {
                self.collect_all()?;
                self.step_failed(&plan, error)
            }
        }
    }

    fn collect_oldest(&mut self) -> Result<(), Broken> {
        self.in_flight.pop_front().map_or(Ok(()), |step| self.collect(step))
    }

    fn collect_all(&mut self) -> Result<(), Broken> {
        while !self.in_flight.is_empty() {
            self.collect_oldest()?;
        }
        Ok(())
    }

    /// Plans the next step. While requests are on trial, each step is collected before the next one is launched, every
    /// other one is theirs, and nobody begins to run in the others: those on trial ran before.
    fn next_plan(&mut self) -> Option<StepPlan> {
        let must_wait = self.trials.is_on() && !self.in_flight.is_empty();
        let plan = match self.trials.is_on() {
            _ if must_wait => None,
            false => self.scheduler.plan(),
            true => {
                self.begin_trial();
                let lanes = if self.was_trial { [Lane::Open, Lane::Trial] } else { [Lane::Trial, Lane::Open] };
                lanes.into_iter().find_map(|lane| self.scheduler.plan_lane(lane, lane == Lane::Trial))
            }
        };
        self.was_trial = plan.as_ref().is_some_and(|plan| plan.lane == Lane::Trial);
        self.is_resting = plan.is_none() && !must_wait;
        plan
    }

    /// Takes what has arrived, waiting for it only when idle; `false` once no more can come.
    fn take_arrived(&mut self) -> bool {
        if self.is_resting && self.in_flight.is_empty() {
            self.publish();
            self.shared.pulse.beat(Doing::Nothing, false);
            let message = self.requests.arriving.recv(IDLE_TICK);
            self.shared.pulse.beat(Doing::Between, false);
            match message {
                Ok(message) => self.take(message),
                Err(RecvTimeoutError::Timeout) => return true,
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        } else if let Some(rest) = self.rest()
            && let Ok(message) = self.requests.arriving.recv(rest)
        {
            self.take(message);
        }
        loop {
            match self.requests.arriving.try_recv() {
                Ok(message) => self.take(message),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// How long the next step may wait for requests: for none while a stage of the model's pipeline has nothing to do.
    fn rest(&self) -> Option<Duration> {
        let step = self.in_flight.front().filter(|_| self.in_flight.len() >= self.model.steps_ahead())?;
        let began = step.launched.max(self.last_step);
        self.pace.rest(step.name.kind, step.name.tokens, began, Instant::now())
    }

    fn take(&mut self, message: Message) {
        let requests = match message {
            Message::Requests(requests) => requests,
            Message::Moved(moved) => return self.adopt(*moved),
            Message::Wake => return,
        };
        let now = Instant::now();
        for request in requests {
            if !request.is_probe {
                self.pace.arrived(&request.client, now);
            }
            self.shared.metrics.prompt_tokens.inc_by(request.prompt.len() as u64);
            self.scheduler.add(self.requests.take(request));
        }
    }

    /// Ends what nobody waits for any more, and what waited too long. Those that wait may be many, and are looked at now
    /// and then only.
    fn reap(&mut self) {
        let now = Instant::now();
        if now - self.last_look < LOOK_AFTER {
            let active = &self.requests.active;
            let is_cancelled = |id: &SequenceId| active.get(id).is_some_and(|active| active.output.is_cancelled());
            let cancelled: Vec<SequenceId> = self.scheduler.running_ids().filter(is_cancelled).collect();
            return cancelled.into_iter().for_each(|id| self.cancel(id));
        }
        self.last_look = now;
        self.requests.cancelled().into_iter().for_each(|id| self.cancel(id));
        let (overdue, error) = self.requests.overdue(now);
        for id in overdue {
            tracing::debug!(sequence = %id, "waited too long in the queue");
            self.fail(id, error.clone());
        }
        self.watch_held(now);
    }

    /// Tells the watchdog since when a sequence waits for its grammar.
    fn watch_held(&mut self, now: Instant) {
        let before = std::mem::take(&mut self.held_since);
        for (id, num_tokens) in self.scheduler.held() {
            let since = before.get(&id).filter(|(tokens, _)| *tokens == num_tokens).map_or(now, |(_, since)| *since);
            self.held_since.insert(id, (num_tokens, since));
        }
        self.shared.pulse.set_held_since(self.held_since.values().map(|(_, since)| *since).min());
    }

    fn cancel(&mut self, id: SequenceId) {
        tracing::debug!(sequence = %id, "cancelled by the client");
        self.end(id, "cancelled");
    }

    /// Lets sequences run whose next token can be chosen.
    fn release_ready(&mut self) {
        for id in std::mem::take(&mut self.held) {
            let Some(active) = self.requests.active.get_mut(&id) else { continue };
            match active.choice.is_ready() {
                Ok(true) => {
                    self.scheduler.set_held(id, false);
                }
                Ok(false) => self.held.push(id),
                Err(error) => self.fail(id, RequestError::Refused(error)),
            }
        }
    }

    /// Counts what a plan did to the queue.
    fn note(&mut self, plan: &StepPlan) {
        let metrics = &self.shared.metrics;
        for id in &plan.admitted {
            let Some(active) = self.requests.active.get_mut(id) else { continue };
            // A sequence that comes back from a preemption has given its places in the queue back already.
            if active.open.begin()
                && let Some(sequence) = self.scheduler.running(*id)
            {
                active.output.set_cached_tokens(sequence.num_cached());
                metrics.cached_prompt_tokens.inc_by(sequence.num_cached() as u64);
            }
        }
        metrics.preemptions.inc_by(plan.preempted.len() as u64);
        metrics.retried_steps.inc_by(u64::from(plan.lane == Lane::Trial));
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
        let (launched, kind, tokens) = (Instant::now(), plan.kind(), plan.num_tokens());
        self.num_launched += 1;
        let name = StepName { number: self.num_launched, kind, sequences: plan.entries.len(), tokens };
        let may_capture = self.captures_lazily || !self.pace.knows(kind, tokens);
        self.shared.pulse.beat(Doing::Launching(name), may_capture);
        self.partner.iter().for_each(|partner| partner.launching(name.number));
        let destinations = self.destinations(&plan);
        let pending = self.try_launch(&plan);
        self.shared.pulse.beat(Doing::Between, false);
        match pending {
            Ok(pending) => {
                self.pace.launched(launched.elapsed());
                self.scheduler.launch(&plan);
                Ok(Some(InFlight { plan, pending, launched, name, may_capture, destinations }))
            }
            Err(error) => {
                self.shared.pulse.ended(name, launched.elapsed(), false);
                Err((plan, error))
            }
        }
    }

    fn try_launch(&mut self, plan: &StepPlan) -> Result<M::Pending, StepError> {
        let requests = &*self.requests;
        let mut inputs = Vec::with_capacity(plan.entries.len());
        for entry in &plan.entries {
            let Some((sequence, active)) = self.scheduler.running(entry.id).zip(requests.active.get(&entry.id)) else {
                return Err(StepError::harmless(format!("sequence {} is planned but not known", entry.id)));
            };
            let known = entry.num_tokens - usize::from(entry.chosen.is_some());
            let tokens = &sequence.tokens()[entry.past_len..entry.past_len + known];
            // What a prompt's chunk before the last one chooses does not count.
            let choice = entry.samples.then_some(&active.choice);
            inputs.push(SequenceInput {
                chosen: entry.chosen,
                state: sequence.state(),
                num_drawn: sequence.num_generated() as u64,
                logit_bias: choice.map_or(&[], Choice::bias),
                token_mask: choice.and_then(Choice::mask),
                top_logprobs: active.top_logprobs.filter(|_| entry.samples),
                push: sequence.goes_to(entry.samples),
                ..SequenceInput::new(tokens, entry.past_len, sequence.pages(), &active.sampling)
            });
        }
        let model = &mut self.model;
        caught(|| model.launch(&inputs)).unwrap_or_else(|panic| Err(StepError::harmless(panic)))
    }

    /// Waits for a step and hands out what it chose.
    fn collect(&mut self, step: InFlight<M::Pending>) -> Result<(), Broken> {
        let InFlight { plan, pending, launched, name, may_capture, destinations } = step;
        self.shared.pulse.beat(Doing::Collecting(name), may_capture);
        let model = &mut self.model;
        let sampled = caught(|| model.collect(pending)).unwrap_or_else(|panic| Err(StepError::harmless(panic)));
        let sampled = sampled.and_then(|sampled| match sampled.len() {
            len if len == plan.entries.len() => Ok(sampled),
            len => Err(StepError::harmless(format!("{len} tokens for {} sequences", plan.entries.len()))),
        });
        // A step begins on the device when it was launched, or when the one before it ended.
        let now = Instant::now();
        let took = now - launched.max(std::mem::replace(&mut self.last_step, now));
        let phase = PhaseLabel { phase: plan.kind().name() };
        self.shared.metrics.step_time.get_or_create(&phase).observe(took.as_secs_f64());
        self.shared.pulse.beat(Doing::Between, false);
        self.shared.pulse.ended(name, took, sampled.is_ok());
        self.take_stats();
        match sampled {
            Ok(sampled) => {
                drop(destinations);
                self.steps_ended(name.number);
                self.pace.ended(name.kind, name.tokens, took);
                self.shared.num_steps.fetch_add(1, Ordering::Relaxed);
                self.deliver(&plan, &sampled);
                self.clear(&plan);
                Ok(())
            }
            Err(error) => self.step_failed(&plan, error),
        }
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
            // What panics here concerns this request alone.
            let pushed = caught(|| {
                let reason = active.output.push(sampled)?;
                if reason.is_none() {
                    active.choice.accept(sampled.id);
                }
                Ok(reason)
            });
            match pushed.unwrap_or_else(Err) {
                Ok(None) if self.partner.as_ref().is_some_and(|partner| partner.role() == RoleName::Prefill) => {
                    self.move_away(entry.id);
                }
                Ok(None) if active.choice.has_grammar() => {
                    self.scheduler.set_held(entry.id, true);
                    self.held.push(entry.id);
                }
                Ok(None) => {}
                Ok(Some(reason)) => {
                    metrics.request_latency.observe((now - active.arrived).as_secs_f64());
                    self.end(entry.id, reason.as_str());
                }
                Err(error) => self.fail(entry.id, RequestError::Engine(error)),
            }
        }
    }

    fn fail(&mut self, id: SequenceId, error: RequestError) {
        let reason = match error {
            RequestError::QueueTimeout { .. } => "queue_timeout",
            RequestError::Refused(_) | RequestError::Engine(_) => "failed",
        };
        if let Some(active) = self.requests.active.get(&id) {
            active.output.fail(error);
        }
        self.end(id, reason);
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
        self.update_room();
    }
}

fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Calls what may panic, and returns the panic's message then. A model returns its stream and memory to use when a call
/// unwinds, and a request that panicked is not used again; so the thread outlives both.
fn caught<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|panic| {
        let text = panic.downcast_ref::<&str>().copied();
        let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
        format!("panicked: {text}")
    })
}

#[cfg(test)]
mod tests;
