//! The order of a capture, without a device.
//!
//! ```text
//! Idle ──begin──▶ Segment ──begin_break──▶ Break ──end_break──▶ Segment … ──end──▶ Sealed
//!                    └───────────abort──────┴──▶ Aborted
//! ```
//!
//! Invariant: a refused transition changes nothing.

use crate::{Error, Result};

/// Where a capture is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CaptureState {
    /// Not begun.
    Idle,
    /// A segment is being captured.
    Segment,
    /// A break runs.
    Break,
    /// Ended: the segments are complete.
    Sealed,
    /// Given up: what was captured is discarded.
    Aborted,
}

impl CaptureState {
    fn name(self) -> &'static str {
        match self {
            Self::Idle => "no capture is open",
            Self::Segment => "a segment is being captured",
            Self::Break => "a break runs",
            Self::Sealed => "the capture has ended",
            Self::Aborted => "the capture was aborted by an earlier error",
        }
    }

    fn go(&mut self, transition: &'static str, from: Self, to: Self) -> Result<()> {
        if *self != from {
            return Err(Error::CaptureState { transition, state: self.name() });
        }
        *self = to;
        Ok(())
    }

    pub(crate) fn begin(&mut self) -> Result<()> {
        self.go("begin", Self::Idle, Self::Segment)
    }

    pub(crate) fn begin_break(&mut self) -> Result<()> {
        self.go("break", Self::Segment, Self::Break)
    }

    pub(crate) fn end_break(&mut self) -> Result<()> {
        self.go("resume after a break", Self::Break, Self::Segment)
    }

    pub(crate) fn end(&mut self) -> Result<()> {
        self.go("end", Self::Segment, Self::Sealed)
    }

    /// Gives an open capture up; leaves a sealed one alone.
    pub(crate) fn abort(&mut self) {
        if *self != Self::Sealed {
            *self = Self::Aborted;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Transition = fn(&mut CaptureState) -> Result<()>;

    const TRANSITIONS: [(Transition, CaptureState, CaptureState); 4] = [
        (CaptureState::begin, CaptureState::Idle, CaptureState::Segment),
        (CaptureState::begin_break, CaptureState::Segment, CaptureState::Break),
        (CaptureState::end_break, CaptureState::Break, CaptureState::Segment),
        (CaptureState::end, CaptureState::Segment, CaptureState::Sealed),
    ];

    const STATES: [CaptureState; 5] =
        [CaptureState::Idle, CaptureState::Segment, CaptureState::Break, CaptureState::Sealed, CaptureState::Aborted];

    #[test]
    fn a_refused_transition_changes_nothing() {
        for start in STATES {
            for (transition, from, to) in TRANSITIONS {
                let mut state = start;
                let result = transition(&mut state);
                if start == from {
                    assert!(result.is_ok());
                    assert_eq!(state, to);
                } else {
                    assert!(matches!(result, Err(Error::CaptureState { .. })), "{start:?}");
                    assert_eq!(state, start);
                }
            }
        }
    }

    #[test]
    fn abort_ends_everything_but_a_sealed_capture() {
        for start in STATES {
            let mut state = start;
            state.abort();
            let expected = if start == CaptureState::Sealed { CaptureState::Sealed } else { CaptureState::Aborted };
            assert_eq!(state, expected);
        }
    }
}
