//! What the worker of one role knows of the other one: where requests move, what has room, and how the pair ends.

use std::sync::{Arc, Mutex, PoisonError};

use super::super::sequence::Sequence;
use super::super::worker::{Accepted, Exit, MessageSender};
use super::{DecodeRoom, Destination, RoleName};

/// A request that goes over to the decode role, which has its keys, values and state already.
#[derive(Debug)]
pub struct Moved {
    pub(crate) request: Accepted,
    pub(crate) sequence: Sequence,
    pub(crate) destination: Destination,
}

/// Bytes that a request pushes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MovedBytes {
    /// For each token of its prompt.
    pub per_token: usize,
    /// For its state, in a model that has one.
    pub per_state: usize,
}

/// How a pair ended: as the worker did that ended first.
#[derive(Debug, Default)]
pub(super) struct PairEnd(Mutex<Option<(RoleName, Exit)>>);

impl PairEnd {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<(RoleName, Exit)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The other role, as a worker sees it.
#[derive(Debug, Clone)]
pub struct Partner {
    role: RoleName,
    /// Of the other role's worker.
    sender: MessageSender,
    room: DecodeRoom,
    end: Arc<PairEnd>,
    bytes: MovedBytes,
}

impl Partner {
    pub(super) fn new(
        role: RoleName,
        sender: MessageSender,
        room: DecodeRoom,
        end: Arc<PairEnd>,
        bytes: MovedBytes,
    ) -> Self {
        Self { role, sender, room, end, bytes }
    }

    /// Bytes that were pushed of a prompt of so many tokens.
    pub(crate) fn moved_bytes(&self, tokens: usize) -> usize {
        tokens * self.bytes.per_token + self.bytes.per_state
    }

    /// The worker's own role.
    pub(crate) fn role(&self) -> RoleName {
        self.role
    }

    /// Hands a request over. Whoever runs the pair ends those that the other role's worker has not taken when it ends.
    pub(crate) fn send(&self, moved: Moved) {
        self.sender.hand_over(Box::new(moved));
    }

    /// Tells the prefill role, if it waits for room, to look again; called by the decode role's worker whenever something may
    /// have ended. `is_short` says whether one of its sequences waits for pages.
    pub(crate) fn update_room(&self, is_short: bool) {
        if self.room.update(is_short) {
            self.sender.wake();
        }
    }

    /// Notes that the worker launches its step of this number.
    pub(crate) fn launching(&self, number: u64) {
        if self.role == RoleName::Decode {
            self.room.launching(number);
        }
    }

    /// Notes that its steps up to this number have ended on the device.
    pub(crate) fn steps_ended(&self, number: u64) {
        if self.role == RoleName::Decode {
            self.room.ended(number);
        }
    }

    /// Ends the pair, unless the other role has, and lets its worker see that.
    pub(super) fn end(&self, exit: Exit) {
        self.end.lock().get_or_insert((self.role, exit));
        self.sender.wake();
    }

    /// How the other role's worker has ended, if it has: this one has to end alike.
    pub(crate) fn ended(&self) -> Option<Exit> {
        let (role, exit) = self.end.lock().clone()?;
        let lost = |why: String| format!("the {} role was lost: {why}", role.name());
        Some(match exit {
            Exit::Stopped => Exit::Stopped,
            Exit::ModelLost(why) => Exit::ModelLost(lost(why)),
            Exit::ContextLost(why) => Exit::ContextLost(lost(why)),
        })
    }
}
