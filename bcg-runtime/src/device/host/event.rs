//! Events of the host device: order between streams, and the way a capture spreads from one stream to another.
//!
//! Invariants: an event recorded in a capture is bound to it for ever and orders nothing outside; one recorded outside
//! never enters a capture.

use super::queue::OpRef;
use super::work::Work;
use super::{HostBackend, State};
use crate::device::traits::{EventBackend, EventHandle, StreamHandle};
use crate::{Error, Result};

/// What an event's latest record means.
#[derive(Clone, Debug)]
pub(super) enum EventState {
    Never,
    /// The operation to wait for.
    Recorded(OpRef),
    /// The nodes of a capture, open or ended, to depend on.
    Captured {
        capture: u64,
        frontier: Vec<u32>,
    },
}

impl State {
    fn event(&mut self, event: EventHandle) -> &mut EventState {
        self.events.get_mut(&event.0).expect("guards pass live events only")
    }

    /// Orders later nodes of a capturing stream after `nodes` of the same capture.
    fn depend_on_nodes(&mut self, stream: StreamHandle, nodes: &[u32]) {
        let frontier = &mut self.stream(stream).frontier;
        frontier.extend(nodes);
        frontier.sort_unstable();
        frontier.dedup();
    }

    fn wait_for_captured(&mut self, stream: StreamHandle, capture: u64, nodes: &[u32]) -> Result<()> {
        let own = self.stream(stream).capture;
        match own {
            Some(own) if own != capture => {
                Err(self.forbid(own, "waiting for an event of another capture; end one capture first".to_owned()))
            }
            None if !self.captures.contains_key(&capture) => {
                let what = "waiting outside for an event that was recorded in a capture; record it again";
                Err(Error::CaptureForbidden { what: what.to_owned() })
            }
            _ => {
                self.check_valid("cuStreamWaitEvent", capture)?;
                if own.is_none() {
                    self.join_capture(stream, capture);
                }
                self.depend_on_nodes(stream, nodes);
                Ok(())
            }
        }
    }

    fn wait_for_recorded(&mut self, stream: StreamHandle, op: OpRef) -> Result<()> {
        let needed = self.queue.is_pending(op) || self.queue.has_failed(op);
        if needed && self.stream(stream).last != op {
            let (lane, last) = (self.stream(stream).lane, self.stream(stream).last);
            self.stream(stream).last = self.queue.push(lane, Work::Nothing, last, op);
            self.queue.trim(&self.memory);
        }
        Ok(())
    }
}

impl EventBackend for HostBackend {
    fn create_event(&self) -> Result<EventHandle> {
        let state = &mut *self.enter("cuEventCreate")?;
        let handle = state.new_handle();
        state.events.insert(handle, EventState::Never);
        Ok(EventHandle(handle))
    }

    fn destroy_event(&self, event: EventHandle) {
        self.lock().events.remove(&event.0);
    }

    fn record_event(&self, event: EventHandle, stream: StreamHandle) -> Result<()> {
        let state = &mut *self.enter("cuEventRecord")?;
        let recorded = match state.stream(stream).capture {
            Some(capture) => {
                state.check_valid("cuEventRecord", capture)?;
                EventState::Captured { capture, frontier: state.stream(stream).frontier.clone() }
            }
            None => EventState::Recorded(state.stream(stream).last),
        };
        *state.event(event) = recorded;
        Ok(())
    }

    fn wait_event(&self, stream: StreamHandle, event: EventHandle) -> Result<()> {
        let state = &mut *self.enter("cuStreamWaitEvent")?;
        if let EventState::Captured { capture, frontier } = state.event(event) {
            let (capture, frontier) = (*capture, frontier.clone());
            return state.wait_for_captured(stream, capture, &frontier);
        }
        let what = "waiting for an event that was recorded outside of the capture; record it in the capture";
        state.refuse_on_capturing(stream, what)?;
        match *state.event(event) {
            EventState::Recorded(op) => state.wait_for_recorded(stream, op),
            _ => Ok(()),
        }
    }

    fn synchronize_event(&self, event: EventHandle) -> Result<()> {
        let mut state = self.enter("cuEventSynchronize")?;
        match *state.event(event) {
            EventState::Never => Ok(()),
            EventState::Recorded(op) => self.synchronize_op(state, op).map(drop),
            EventState::Captured { capture, .. } => {
                Err(state.forbid(capture, "synchronising an event that was recorded in a capture".to_owned()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Rig;
    use super::*;
    use crate::device::traits::{GraphBackend, StreamBackend};

    #[test]
    fn an_event_orders_two_streams_under_every_seed() {
        for seed in 0..32 {
            let rig = Rig::new();
            rig.control.reseed(seed);
            let (a, b, log) = (rig.stream("a"), rig.stream("b"), rig.log());
            (0..5).for_each(|value| rig.append(a, log, value).unwrap());
            rig.order(a, b).unwrap();
            rig.append(b, log, 5).unwrap();
            assert_eq!(rig.read_log(log), [0, 1, 2, 3, 4, 5]);
        }
    }

    #[test]
    fn a_wait_means_the_record_before_it_and_not_a_later_one() {
        let rig = Rig::new();
        let (a, b, log, event) = (rig.stream("a"), rig.stream("b"), rig.log(), rig.event());
        rig.control.set_delay("a", true);
        rig.backend.wait_event(b, event).unwrap(); // never recorded: nothing to wait for
        rig.append(a, log, 1).unwrap();
        rig.backend.record_event(event, a).unwrap();
        rig.append(b, log, 0).unwrap();
        rig.backend.synchronize_stream(b).unwrap();
        assert_eq!(rig.control.num_pending(), 1);
        rig.backend.synchronize_event(event).unwrap();
        assert_eq!(rig.read_log(log), [0, 1]);
    }

    #[test]
    fn synchronising_an_event_runs_the_work_before_its_record_only() {
        let rig = Rig::new();
        let (stream, log, event) = (rig.stream("main"), rig.log(), rig.event());
        rig.append(stream, log, 1).unwrap();
        rig.backend.record_event(event, stream).unwrap();
        rig.append(stream, log, 2).unwrap();
        rig.backend.synchronize_event(event).unwrap();
        assert_eq!(rig.control.num_pending(), 1);
        rig.backend.synchronize_event(rig.event()).unwrap();
    }

    #[test]
    fn an_event_of_failed_work_does_not_fail_for_ever() {
        let rig = Rig::new();
        let (a, b, log, event) = (rig.stream("a"), rig.stream("b"), rig.log(), rig.event());
        rig.fail_later(a);
        rig.backend.record_event(event, a).unwrap();
        rig.append(a, log, 1).unwrap();
        assert!(matches!(rig.backend.synchronize_stream(a), Err(Error::Memory { .. })));
        rig.backend.wait_event(b, event).unwrap();
        rig.append(b, log, 2).unwrap();
        assert_eq!(rig.read_log(log), [2]);
    }

    #[test]
    fn waiting_in_a_capture_for_an_event_from_outside_is_an_error() {
        let rig = Rig::new();
        let (stream, event, never) = (rig.stream("main"), rig.event(), rig.event());
        rig.backend.record_event(event, rig.stream("other")).unwrap();
        for event in [event, never] {
            rig.backend.begin_capture(stream).unwrap();
            assert!(matches!(rig.backend.wait_event(stream, event), Err(Error::CaptureForbidden { .. })));
            assert!(matches!(rig.backend.end_capture(stream), Err(Error::Driver { code: 901, .. })));
        }
    }

    #[test]
    fn an_event_of_a_capture_is_an_error_outside_of_it() {
        let rig = Rig::new();
        let (stream, other, event) = (rig.stream("main"), rig.stream("other"), rig.event());
        rig.backend.begin_capture(stream).unwrap();
        rig.backend.record_event(event, stream).unwrap();
        rig.backend.end_capture(stream).unwrap();
        assert!(matches!(rig.backend.wait_event(other, event), Err(Error::CaptureForbidden { .. })));
        assert!(matches!(rig.backend.synchronize_event(event), Err(Error::CaptureForbidden { .. })));
        rig.backend.record_event(event, stream).unwrap();
        rig.backend.wait_event(other, event).unwrap();
    }

    #[test]
    fn an_event_of_another_open_capture_is_an_error() {
        let rig = Rig::new();
        let (a, b, event) = (rig.stream("a"), rig.stream("b"), rig.event());
        rig.backend.begin_capture(a).unwrap();
        rig.backend.begin_capture(b).unwrap();
        rig.backend.record_event(event, a).unwrap();
        assert!(matches!(rig.backend.wait_event(b, event), Err(Error::CaptureForbidden { .. })));
        assert!(rig.backend.end_capture(b).is_err());
        rig.backend.end_capture(a).unwrap();
    }
}
