//! Sequences that begin in one scheduler and go on in another one: see [`roles`](super::super::roles).

use super::super::prefix_cache::SequencePages;
use super::super::roles::{DecodeRoom, Destination};
use super::super::sequence::{Sequence, SequenceId};
use super::Scheduler;

impl Scheduler {
    /// Makes it that of the prefill role: it runs sequences up to the first token of their answers, and those that go on in
    /// the decode role only once that has room for them.
    #[must_use]
    pub fn prefilling_for(self, room: DecodeRoom) -> Self {
        Self { room: Some(room), ..self }
    }

    /// Runs a sequence that was prefilled elsewhere from now on: all tokens but the newest lie in the pages of its destination.
    ///
    /// # Panics
    /// If it is not newer than all before it, or more sequences run than may: it has a place among them.
    pub fn adopt(&mut self, mut sequence: Sequence, destination: Destination) {
        assert!(self.running.len() < self.limits.max_running_requests, "sequence {} has a place", sequence.id);
        let Destination { lease, place } = destination;
        let launched = sequence.tokens().len() - 1;
        if let Some(state) = lease.state() {
            state.commit(launched);
        }
        let (id, pages) = (sequence.id, SequencePages::filled(lease));
        (sequence.place, sequence.under_way) = (Some(place), 0);
        self.add(sequence);
        if let Some(mut sequence) = self.waiting.begin(id) {
            (sequence.launched, sequence.pages) = (launched, Some(pages));
            self.running.push(sequence);
        }
    }

    /// In the prefill role, takes room in the decode role for a waiting sequence that goes on there; `false` if there is none
    /// yet.
    pub(super) fn take_room(&mut self, id: SequenceId) -> bool {
        let (Some(room), Some(sequence)) = (&self.room, self.waiting.get_mut(id)) else { return true };
        if sequence.moves() && sequence.destination.is_none() {
            sequence.destination = room.take(sequence.runs_to);
        }
        !sequence.moves() || sequence.destination.is_some()
    }

    /// Lets others have the room of a sequence that waits, so that nobody waits for who waits; one whose last step here is
    /// under way moves when it ends.
    pub(super) fn leave_room(&mut self, id: SequenceId) {
        if let Some(sequence) = self.waiting.get_mut(id).filter(|sequence| sequence.unread == 0) {
            sequence.destination = None;
        }
    }
}
