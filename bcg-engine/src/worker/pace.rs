//! When the next step is launched.
//!
//! With one client, as soon as the step before it was launched: the device then never waits for the host. A request that
//! arrives meanwhile waits for two steps. So with several clients the next step is planned as late as the device allows,
//! just before the step under way is expected to end, and at once if a request arrives: it waits for one step at most.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::ClientId;
use crate::scheduler::PlanKind;

/// How long the requests of another client make the engine a shared one.
const SHARED_FOR: Duration = Duration::from_secs(30);
/// What is left to the host beside twice the time of a launch: to wake up, to hand out tokens, and to plan.
const MARGIN: Duration = Duration::from_micros(500);

/// What is known of the times of steps, and of who sends requests.
#[derive(Debug, Default)]
pub(super) struct Pace {
    latest: Option<ClientId>,
    /// When a request came from another client than the one before it.
    alternated: Option<Instant>,
    /// How long the last two steps of a kind with so many tokens took.
    took: HashMap<(PlanKind, usize), [Duration; 2]>,
    launch: Duration,
}

impl Pace {
    /// Notes whose request arrived.
    pub(super) fn arrived(&mut self, client: &ClientId, now: Instant) {
        if self.latest.as_ref() == Some(client) {
            return;
        }
        if self.latest.replace(client.clone()).is_some() {
            self.alternated = Some(now);
        }
    }

    /// Whether several clients send requests.
    pub(super) fn is_shared(&self, now: Instant) -> bool {
        self.alternated.is_some_and(|at| now.saturating_duration_since(at) < SHARED_FOR)
    }

    /// Notes how long the host took to launch a step.
    pub(super) fn launched(&mut self, took: Duration) {
        // A slow launch counts for a while.
        self.launch = took.max(self.launch * 7 / 8);
    }

    /// Notes how long a step took on the device.
    pub(super) fn ended(&mut self, kind: PlanKind, tokens: usize, took: Duration) {
        let last = self.took.entry((kind, tokens)).or_insert([took; 2]);
        *last = [last[1], took];
    }

    /// Whether a step of this kind and size ended before.
    pub(super) fn knows(&self, kind: PlanKind, tokens: usize) -> bool {
        self.took.contains_key(&(kind, tokens))
    }

    /// How long the next step may wait while one of this kind and size, which began then, is under way.
    pub(super) fn rest(&self, kind: PlanKind, tokens: usize, began: Instant, now: Instant) -> Option<Duration> {
        let [before, last] = self.took.get(&(kind, tokens)).filter(|_| self.is_shared(now))?;
        let ready = began + (*before.min(last)).checked_sub(self.launch * 2 + MARGIN)?;
        Some(ready.saturating_duration_since(now)).filter(|rest| !rest.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: (PlanKind, usize) = (PlanKind::Decode, 8);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn only_a_shared_engine_waits_and_only_for_steps_that_it_knows() {
        let (mut pace, now) = (Pace::default(), Instant::now());
        pace.ended(STEP.0, STEP.1, ms(20));
        pace.arrived(&ClientId::new("a"), now);
        pace.arrived(&ClientId::new("a"), now);
        assert_eq!(pace.rest(STEP.0, STEP.1, now, now), None, "one client");
        pace.arrived(&ClientId::new("b"), now);
        assert_eq!(pace.rest(STEP.0, STEP.1, now, now), Some(ms(20) - MARGIN));
        assert_eq!(pace.rest(STEP.0, STEP.1 + 1, now, now), None, "no such step");
        assert_eq!(pace.rest(STEP.0, STEP.1, now, now + SHARED_FOR), None, "long ago");
    }

    #[test]
    fn the_rest_leaves_time_for_a_slow_launch_after_the_faster_of_two_steps() {
        let (mut pace, now) = (Pace::default(), Instant::now());
        pace.arrived(&ClientId::new("a"), now);
        pace.arrived(&ClientId::new("b"), now);
        pace.ended(STEP.0, STEP.1, ms(10));
        pace.ended(STEP.0, STEP.1, ms(90));
        pace.launched(ms(2));
        pace.launched(ms(1));
        let margin = MARGIN + ms(2) * 7 / 4;
        assert_eq!(pace.rest(STEP.0, STEP.1, now, now + ms(3)), Some(ms(7) - margin));
        assert_eq!(pace.rest(STEP.0, STEP.1, now, now + ms(8)), None, "it is time");
        pace.ended(STEP.0, STEP.1, ms(1));
        assert_eq!(pace.rest(STEP.0, STEP.1, now, now), None, "the step is shorter than a launch");
    }
}
