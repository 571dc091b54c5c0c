//! The thread that owns the runner: takes jobs, asks the scheduler what to run, runs it, hands tokens to the outputs.
//!
//! Invariants:
//! - it never waits for a client: every event channel has room for all the events of its answer;
//! - it sleeps only when nothing waits or runs;
//! - a step that fails, by an error or by a panic, ends the requests of that step and no other.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bcg_models::{SampledToken, SamplingParams, SequenceInput};
use tokio::sync::OwnedSemaphorePermit;

use super::output::Output;
use super::runner::StepRunner;
use super::scheduler::{Scheduler, StepPlan};
use super::sequence::{Sequence, SequenceId};
use crate::metrics::{Metrics, PhaseLabel};

/// Failed steps in a row after which the engine calls itself unhealthy.
const FAILED_STEPS_MAX: u32 = 3;

/// How long an idle worker sleeps before it looks whether it must stop.
const IDLE_TICK: Duration = Duration::from_millis(200);

/// An accepted request on its way to the worker.
#[derive(Debug)]
pub struct Job {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Log probabilities: `None` for none, else how many alternatives.
    pub top_logprobs: Option<usize>,
    /// Where tokens go.
    pub output: Output,
    /// Its place in the queue, given back when it runs first.
    pub slot: OwnedSemaphorePermit,
    /// When it was accepted.
    pub arrived: Instant,
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
    failed_steps: AtomicU32,
    last_error: Mutex<Option<String>>,
}

impl Shared {
    /// Returns the last error once several steps in a row failed.
    pub fn failure(&self) -> Option<String> {
        if self.failed_steps.load(Ordering::Relaxed) < FAILED_STEPS_MAX {
            return None;
        }
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note_step(&self, error: Option<&str>) {
        match error {
            None => self.failed_steps.store(0, Ordering::Relaxed),
            Some(error) => {
                self.failed_steps.fetch_add(1, Ordering::Relaxed);
                self.metrics.failed_steps.inc();
                *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_owned());
            }
        }
    }
}

#[derive(Debug)]
struct Active {
    sampling: SamplingParams,
    top_logprobs: Option<usize>,
    output: Output,
    slot: Option<OwnedSemaphorePermit>,
    arrived: Instant,
    last_token: Option<Instant>,
}

/// The worker's state; [`Worker::run`] is its thread.
#[derive(Debug)]
pub struct Worker<R> {
    runner: R,
    scheduler: Scheduler,
    active: HashMap<SequenceId, Active>,
    jobs: Receiver<Job>,
    shared: Arc<Shared>,
    next_id: u64,
}

impl<R: StepRunner> Worker<R> {
    /// Makes a worker that has nothing to do yet.
    pub fn new(runner: R, scheduler: Scheduler, jobs: Receiver<Job>, shared: Arc<Shared>) -> Self {
        shared.metrics.kv_pages.set(i64::try_from(scheduler.num_pages()).unwrap_or(i64::MAX));
        Self { runner, scheduler, active: HashMap::new(), jobs, shared, next_id: 0 }
    }

    /// Works until every handle is gone and nothing is left, or until it is told to stop.
    pub fn run(mut self) {
        self.shared.metrics.take_stats(&self.runner.stats());
        while !self.shared.stop.load(Ordering::Relaxed) {
            let open = self.take_jobs();
            self.reap_cancelled();
            if let Some(plan) = self.scheduler.plan() {
                self.start(&plan);
                self.step(&plan);
            } else if !open {
                break;
            }
            self.publish();
        }
        let left: Vec<SequenceId> = self.active.keys().copied().collect();
        for id in left {
            self.fail(id, "the server shut down before the answer was complete");
        }
    }

    /// Takes what has arrived, waiting for it only when idle; `false` once no more can come.
    fn take_jobs(&mut self) -> bool {
        if self.scheduler.is_idle() {
            self.publish();
            match self.jobs.recv_timeout(IDLE_TICK) {
                Ok(job) => self.accept(job),
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => return true,
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return false,
            }
        }
        loop {
            match self.jobs.try_recv() {
                Ok(job) => self.accept(job),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn accept(&mut self, job: Job) {
        self.next_id += 1;
        let id = SequenceId(self.next_id);
        self.shared.metrics.prompt_tokens.inc_by(job.prompt.len() as u64);
        self.scheduler.add(Sequence::new(id, job.prompt));
        let Job { sampling, top_logprobs, output, slot, arrived, .. } = job;
        self.active.insert(id, Active { sampling, top_logprobs, output, slot: Some(slot), arrived, last_token: None });
    }

    fn reap_cancelled(&mut self) {
        let cancelled: Vec<SequenceId> =
            self.active.iter().filter(|(_, active)| active.output.is_cancelled()).map(|(&id, _)| id).collect();
        for id in cancelled {
            tracing::debug!(request = %id, "cancelled by the client");
            self.end(id, "cancelled");
        }
    }

    fn start(&mut self, plan: &StepPlan) {
        for id in &plan.admitted {
            if let Some(active) = self.active.get_mut(id) {
                active.slot = None;
            }
        }
        self.shared.metrics.preemptions.inc_by(plan.preempted.len() as u64);
        for id in &plan.preempted {
            tracing::debug!(request = %id, "preempted: the KV cache is full");
        }
    }

    fn step(&mut self, plan: &StepPlan) {
        let began = Instant::now();
        let result = self.run_step(plan);
        let phase = PhaseLabel { phase: plan.phase.as_str() };
        self.shared.metrics.step_time.get_or_create(&phase).observe(began.elapsed().as_secs_f64());
        self.shared.metrics.take_stats(&self.runner.stats());
        self.shared.note_step(result.as_ref().err().map(String::as_str));
        match result {
            Ok(sampled) => self.deliver(plan, &sampled),
            Err(error) => {
                tracing::error!(phase = phase.phase, requests = plan.entries.len(), %error, "a step failed");
                for entry in &plan.entries {
                    self.fail(entry.id, &format!("the {} step of this request failed: {error}", phase.phase));
                }
            }
        }
    }

    fn run_step(&mut self, plan: &StepPlan) -> Result<Vec<SampledToken>, String> {
        let mut inputs = Vec::with_capacity(plan.entries.len());
        for entry in &plan.entries {
            let (Some(sequence), Some(active)) = (self.scheduler.running(entry.id), self.active.get(&entry.id)) else {
                return Err(format!("sequence {} is planned but not known", entry.id));
            };
            let past_len = sequence.computed();
            let tokens = &sequence.tokens()[past_len..past_len + entry.num_tokens];
            inputs.push(SequenceInput {
                state: sequence.state(),
                step: sequence.num_generated() as u64,
                top_logprobs: active.top_logprobs,
                ..SequenceInput::new(tokens, past_len, sequence.pages(), &active.sampling)
            });
        }
        let runner = &mut self.runner;
        // The runner returns its stream and memory to use when a step unwinds; this thread outlives the step.
        let sampled = catch_unwind(AssertUnwindSafe(|| runner.step(&inputs)))
            .unwrap_or_else(|panic| Err(format!("panicked: {}", panic_message(panic.as_ref()))))?;
        if sampled.len() != inputs.len() {
            return Err(format!("{} tokens for {} sequences", sampled.len(), inputs.len()));
        }
        Ok(sampled)
    }

    fn deliver(&mut self, plan: &StepPlan, sampled: &[SampledToken]) {
        let ids: Vec<u32> = sampled.iter().map(|sampled| sampled.id).collect();
        self.scheduler.commit(plan, &ids);
        let now = Instant::now();
        for (entry, sampled) in plan.entries.iter().zip(sampled).filter(|(entry, _)| entry.samples) {
            let Some(active) = self.active.get_mut(&entry.id) else { continue };
            let metrics = &self.shared.metrics;
            metrics.generated_tokens.inc();
            match active.last_token.replace(now) {
                None => metrics.time_to_first_token.observe((now - active.arrived).as_secs_f64()),
                Some(last) => metrics.inter_token_latency.observe((now - last).as_secs_f64()),
            }
            match active.output.push(sampled) {
                Ok(None) => {}
                Ok(Some(reason)) => {
                    metrics.request_latency.observe((now - active.arrived).as_secs_f64());
                    self.end(entry.id, reason.as_str());
                }
                Err(error) => self.fail(entry.id, &error),
            }
        }
    }

    fn fail(&mut self, id: SequenceId, message: &str) {
        if let Some(active) = self.active.get(&id) {
            active.output.fail(message);
        }
        self.end(id, "failed");
    }

    fn end(&mut self, id: SequenceId, reason: &'static str) {
        self.scheduler.remove(id);
        if self.active.remove(&id).is_some() {
            self.shared.metrics.count_finished(reason);
        }
    }

    fn publish(&self) {
        let metrics = &self.shared.metrics;
        let gauge = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        metrics.running.set(gauge(self.scheduler.num_running()));
        metrics.kv_pages_used.set(gauge(self.scheduler.num_used_pages()));
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
