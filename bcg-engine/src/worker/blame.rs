//! What the worker does about a step that failed.

use super::super::model::{Damage, StepError, StepModel};
use super::super::scheduler::StepPlan;
use super::super::sequence::{Lane, SequenceId};
use super::{Broken, RequestError, Worker};

impl<M: StepModel> Worker<'_, M> {
    /// Puts the requests of a step that failed under suspicion, to be computed again; one that was alone in it a second
    /// time fails. Those of the steps after it, which may have read what it left, are computed again too. If the step broke
    /// something, all of them fail.
    pub(super) fn step_failed(&mut self, plan: &StepPlan, error: StepError) -> Result<(), Broken> {
        self.shared.metrics.failed_steps.inc();
        let error = self.settle(error);
        let phase = plan.kind().name();
        let is_trial = plan.lane == Lane::Trial;
        tracing::error!(phase, requests = plan.entries.len(), is_trial, error = error.message, "a step failed");
        let after = std::mem::take(&mut self.in_flight);
        self.scheduler.forget_under_way();
        let message = format!("the {phase} step of this request failed: {}", error.message);
        if let Damage::Rank(rank) = error.damage {
            self.shared.metrics.count_lost_rank(rank);
        }
        let entries = plan.entries.iter().chain(after.iter().flat_map(|step| &step.plan.entries));
        if error.damage != Damage::Nothing {
            entries.for_each(|entry| self.fail(entry.id, RequestError::Engine(message.clone())));
            return Err(Broken { damage: error.damage, message: error.message });
        }
        entries.for_each(|entry| self.scheduler.rewind(entry.id));
        // Some may have ended since, and some may be suspects already, from the step before.
        let ids = plan.entries.iter().map(|entry| entry.id);
        let suspects: Vec<SequenceId> = ids.filter(|id| self.scheduler.lane(*id) == Some(plan.lane)).collect();
        suspects.iter().for_each(|id| self.trials.clear(*id));
        match suspects[..] {
            [guilty] if is_trial => self.fail(guilty, RequestError::Engine(message)),
            _ => {
                suspects.iter().for_each(|id| self.scheduler.set_lane(*id, Lane::Bench));
                self.trials.suspect(suspects);
            }
        }
        Ok(())
    }

    /// Lets those on trial take part in the steps of a trial. Who left or is held is not on trial any more.
    pub(super) fn begin_trial(&mut self) {
        while self.trials.is_on() {
            for id in self.trials.current().to_vec() {
                let is_free = self.scheduler.is_free(id);
                self.scheduler.set_lane(id, if is_free { Lane::Trial } else { Lane::Open });
                if !is_free {
                    self.trials.clear(id);
                }
            }
            if !self.trials.is_idle() {
                return;
            }
        }
    }

    /// Clears those on trial that got through a step that chose a token for them.
    pub(super) fn clear(&mut self, plan: &StepPlan) {
        if plan.lane == Lane::Trial {
            for entry in plan.entries.iter().filter(|entry| entry.samples) {
                self.scheduler.set_lane(entry.id, Lane::Open);
                self.trials.clear(entry.id);
            }
        }
    }
}
