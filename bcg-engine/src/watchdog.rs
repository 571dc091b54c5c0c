//! Notices that the engine hangs: a call of the device, or a grammar, that never returns.
//!
//! The worker beats at every step and says what it does (`Pulse::beat`), and since when a sequence waits for its mask.
//! A thread of its own looks at both. Where something takes longer than the timeout, the engine is *stuck*: health says why,
//! the log names the call and the last steps, and whoever waits for the engine's end learns of it
//! ([`LocalEngine::given_up`](crate::local::LocalEngine::given_up)). A thread within a call cannot be stopped, so only the
//! end of the process helps.
//!
//! Nothing here waits for the worker, and no lock is held while a model is called.

use std::collections::VecDeque;
use std::fmt::{self, Write as _};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::masks::MASK_WAIT_MAX;
use super::scheduler::PlanKind;

/// How many times longer a step may take that may capture graphs, or load kernels because it is the first of its size.
const CAPTURE_PATIENCE: u32 = 10;

/// Steps that the log shows of a stuck engine.
const STEPS_SHOWN: usize = 16;

/// The longest time between two looks.
const LOOK_AFTER_MAX: Duration = Duration::from_secs(1);

/// How closely an engine is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WatchdogOptions {
    /// How long a step, or a grammar's work, may take; `None` does not watch.
    pub timeout: Option<Duration>,
    /// Whether any step may capture a graph.
    pub captures_lazily: bool,
}

/// A step, as the log names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StepName {
    /// Counts the steps that were launched.
    pub number: u64,
    pub kind: PlanKind,
    pub sequences: usize,
    pub tokens: usize,
}

impl fmt::Display for StepName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, kind, sequences, tokens } = self;
        write!(f, "step {number} ({}, {sequences} sequences, {tokens} tokens)", kind.name())
    }
}

/// What the worker does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Doing {
    /// It waits for work, loads a model, or has ended: as long as it likes.
    #[default]
    Nothing,
    /// It works between two calls of the model.
    Between,
    /// It enqueues a step.
    Launching(StepName),
    /// It waits for a step.
    Collecting(StepName),
}

#[derive(Debug)]
struct State {
    doing: Doing,
    since: Instant,
    /// How many timeouts it may take.
    patience: u32,
    /// Since when a sequence waits for the mask of its grammar.
    held_since: Option<Instant>,
    /// The last steps, how long each took, and whether it failed.
    steps: VecDeque<(StepName, Duration, bool)>,
}

/// What the engine does right now. Clones are the same pulse.
#[derive(Debug, Clone)]
pub(crate) struct Pulse(Arc<Mutex<State>>);

impl Default for Pulse {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(State {
            doing: Doing::Nothing,
            since: Instant::now(),
            patience: 1,
            held_since: None,
            steps: VecDeque::with_capacity(STEPS_SHOWN),
        })))
    }
}

impl Pulse {
    /// Says what the worker does from now on, and whether that may capture graphs or load kernels.
    pub(crate) fn beat(&self, doing: Doing, may_capture: bool) {
        let mut state = self.lock();
        (state.doing, state.since) = (doing, Instant::now());
        state.patience = if may_capture { CAPTURE_PATIENCE } else { 1 };
    }

    /// Notes that a step ended.
    pub(crate) fn ended(&self, step: StepName, took: Duration, is_ok: bool) {
        let mut state = self.lock();
        if state.steps.len() == STEPS_SHOWN {
            state.steps.pop_front();
        }
        state.steps.push_back((step, took, is_ok));
    }

    /// Says since when a sequence waits for its grammar.
    pub(crate) fn set_held_since(&self, since: Option<Instant>) {
        self.lock().held_since = since;
    }

    /// Says what has taken too long.
    fn overdue(&self, timeout: Duration) -> Option<String> {
        let state = self.lock();
        let now = Instant::now();
        let is_late = |since: Instant, patience: u32| now.saturating_duration_since(since) >= timeout * patience;
        let late = |what: String, since: Instant| {
            let seconds = now.saturating_duration_since(since).as_secs_f64();
            Some(format!("the engine is stuck: {what} has not ended for {seconds:.1} s"))
        };
        let doing = match state.doing {
            Doing::Nothing => None,
            Doing::Between => Some("the work between two steps".to_owned()),
            Doing::Launching(step) => Some(format!("the launch of {step}")),
            Doing::Collecting(step) => Some(format!("the wait for {step}")),
        };
        if let Some(doing) = doing.filter(|_| is_late(state.since, state.patience)) {
            return late(doing, state.since);
        }
        // A mask that takes long fails its own request first, so that no grammar of a client ends the process.
        let patience = timeout.max(MASK_WAIT_MAX * 2);
        let held = state.held_since.filter(|since| now.saturating_duration_since(*since) >= patience)?;
        late("the mask of a grammar".to_owned(), held)
    }

    /// The last steps, the newest last.
    fn last_steps(&self) -> String {
        let mut text = String::new();
        for (step, took, is_ok) in &self.lock().steps {
            let outcome = if *is_ok { "" } else { ", failed" };
            // Writing to a string cannot fail.
            let _ = write!(text, "{step} {:.1} ms{outcome}; ", took.as_secs_f64() * 1e3);
        }
        text
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No call in here panics half way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread that looks at a pulse. Dropping it ends the thread.
#[derive(Debug)]
pub(crate) struct Watchdog {
    /// `None` once it ends.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Looks at `pulse` until something takes longer than `timeout`, and says so to `stuck` once.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub(crate) fn start(
        pulse: Pulse,
        timeout: Duration,
        stuck: impl FnOnce(String) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (stop, stopped) = channel();
        let thread = std::thread::Builder::new().name("bcg-watchdog".into());
        // What it logs names the engine as the caller's lines do.
        let span = tracing::Span::current();
        let thread = thread.spawn(move || span.in_scope(|| watch(&pulse, timeout, &stopped, stuck)))?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

fn watch(pulse: &Pulse, timeout: Duration, stopped: &Receiver<()>, stuck: impl FnOnce(String)) {
    let look_after = (timeout / 4).min(LOOK_AFTER_MAX);
    while stopped.recv_timeout(look_after) == Err(RecvTimeoutError::Timeout) {
        if let Some(reason) = pulse.overdue(timeout) {
            tracing::error!(
                reason,
                last_steps = pulse.last_steps(),
                "the engine is stuck; only a new process can help"
            );
            return stuck(reason);
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // It panicked, or it ended: nothing is left to do for either.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_millis(50);

    fn step(number: u64) -> StepName {
        StepName { number, kind: PlanKind::Decode, sequences: 3, tokens: 3 }
    }

    #[test]
    fn what_takes_too_long_is_named_and_what_may_take_long_is_not() {
        let pulse = Pulse::default();
        let after_a_while = |doing, may_capture| {
            pulse.beat(doing, may_capture);
            std::thread::sleep(TIMEOUT * 2);
            pulse.overdue(TIMEOUT)
        };
        assert_eq!(after_a_while(Doing::Nothing, false), None);
        assert_eq!(after_a_while(Doing::Launching(step(7)), true), None, "a capture may take longer");
        let reason = after_a_while(Doing::Collecting(step(7)), false).expect("stuck");
        assert!(reason.contains("the wait for step 7 (decode, 3 sequences, 3 tokens) has not ended for"), "{reason}");
        pulse.beat(Doing::Collecting(step(8)), false);
        assert_eq!(pulse.overdue(TIMEOUT), None, "each beat counts anew");
    }

    #[test]
    fn a_mask_that_is_never_there_is_named_after_its_own_bound() {
        let pulse = Pulse::default();
        let held_for = |time: Duration| {
            pulse.set_held_since(Instant::now().checked_sub(time));
            pulse.overdue(TIMEOUT)
        };
        assert_eq!(held_for(MASK_WAIT_MAX), None, "its request fails by itself");
        assert!(held_for(MASK_WAIT_MAX * 2).expect("late").contains("the mask of a grammar"));
        pulse.set_held_since(None);
        assert_eq!(pulse.overdue(TIMEOUT), None);
    }

    #[test]
    fn only_the_last_steps_are_kept() {
        let pulse = Pulse::default();
        (0..100).for_each(|number| pulse.ended(step(number), TIMEOUT, number != 99));
        let text = pulse.last_steps();
        assert_eq!(text.matches("step ").count(), STEPS_SHOWN);
        assert!(
            text.starts_with("step 84 ") && text.contains("step 99 (decode, 3 sequences, 3 tokens) 50.0 ms, failed")
        );
    }
}
