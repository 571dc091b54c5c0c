//! How a request gets from the worker of the prefill role to that of the decode role, and how both end together.

use std::sync::Arc;

use super::super::model::{Damage, StepError, StepModel};
use super::super::roles::Destination;
use super::super::scheduler::StepPlan;
use super::super::sequence::{Lane, SequenceId};
use super::{Exit, Moved, Partner, RequestError, RoleName, Worker};

impl<M: StepModel> Worker<'_, M> {
    /// Hands a request over whose first token is chosen. Its last step here was collected, so all that it pushed is there.
    pub(super) fn move_away(&mut self, id: SequenceId) {
        let (Some(partner), Some(mut sequence)) = (&self.partner, self.scheduler.remove(id)) else { return };
        // No step that pushes there is under way any more.
        let Some(destination) = sequence.destination.take().and_then(Arc::into_inner) else {
            return self.fail(id, RequestError::Engine("it has no place in the decode role".to_owned()));
        };
        if let Some(request) = self.requests.active.remove(&id) {
            (sequence.lane, sequence.is_held) = (Lane::Open, false);
            self.shared.metrics.moved_requests.inc();
            self.shared.metrics.moved_bytes.inc_by(partner.moved_bytes(sequence.num_prompt) as u64);
            partner.send(Moved { request, sequence, destination });
        }
    }

    /// Where the rows of a step go. Held while the step is under way: nobody else gets those pages before it has ended.
    pub(super) fn destinations(&self, plan: &StepPlan) -> Vec<Arc<Destination>> {
        let of = |id| self.scheduler.running(id).and_then(|sequence| sequence.destination.clone());
        plan.entries.iter().filter_map(|entry| of(entry.id)).collect()
    }

    /// Notes that the worker's steps up to this number have ended on the device.
    pub(super) fn steps_ended(&self, number: u64) {
        self.partner.iter().for_each(|partner| partner.steps_ended(number));
    }

    /// In a pair, waits for what a failed step and those after it have left on the device, before the other role gets the pages
    /// that they write. A device that cannot tell is lost.
    pub(super) fn settle(&mut self, error: StepError) -> StepError {
        if self.partner.is_none() || error.damage != Damage::Nothing {
            return error;
        }
        let model = &mut self.model;
        let settled = super::caught(|| model.settle()).unwrap_or_else(|panic| Err(StepError::harmless(panic)));
        match settled {
            Ok(()) => {
                self.steps_ended(self.num_launched);
                error
            }
            Err(StepError { message, damage: Damage::Nothing }) => StepError { message, damage: Damage::Model },
            Err(lost) => lost,
        }
    }

    /// Takes over a request that the prefill role is done with; it runs at once, or when its grammar allows.
    pub(super) fn adopt(&mut self, moved: Moved) {
        let Moved { request, mut sequence, destination } = moved;
        let has_grammar = request.choice.has_grammar();
        let id = self.requests.take_moved(request);
        sequence.id = id;
        self.scheduler.adopt(sequence, destination);
        if has_grammar {
            self.scheduler.set_held(id, true);
            self.held.push(id);
        }
    }

    /// In the decode role, says what is left of it to others.
    pub(super) fn update_room(&self) {
        if let Some(partner) = self.partner.as_ref().filter(|partner| partner.role() == RoleName::Decode) {
            partner.update_room(self.scheduler.num_waiting() > 0);
        }
    }

    /// Keeps the sequences that wait for the next model. Those of the decode role ran before, and end with those that run.
    pub(super) fn keep_waiting(&mut self) {
        if self.partner.as_ref().map(Partner::role) != Some(RoleName::Decode) {
            self.requests.kept = self.scheduler.take_waiting();
        }
    }

    /// Ends as the other role did: what it holds for this one is gone, or this one needs it for all that comes.
    pub(super) fn end_as_partner(&mut self, exit: Exit) -> Exit {
        let message = match &exit {
            Exit::Stopped => "the engine was stopped before the answer was complete",
            Exit::ModelLost(why) | Exit::ContextLost(why) => {
                self.keep_waiting();
                why
            }
        };
        self.fail_all_but_kept(message);
        exit
    }
}
