//! Faults and the schedule of a host device: what a test can change from outside.
//!
//! Owns the count of driver calls. Every fallible call of the backend enters here once, under the name of the CUDA
//! driver function that it stands for; calls that cannot fail (free, destroy, abort) are not counted.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, MutexGuard};

use super::{HostBackend, Shared, State};
use crate::{Error, Result};

/// How many names of calls are kept.
const LOG_MAX: usize = 1 << 16;

/// The calls so far and those that shall fail.
#[derive(Debug, Default)]
pub(super) struct Faults {
    num_calls: u64,
    log: VecDeque<&'static str>,
    /// Numbers of calls that fail.
    at: Vec<u64>,
    /// Name → how many of its next calls fail.
    named: HashMap<String, u64>,
}

impl Faults {
    /// Counts a call; tells whether it fails.
    fn count(&mut self, call: &'static str) -> bool {
        if self.log.len() == LOG_MAX {
            self.log.pop_front();
        }
        self.log.push_back(call);
        self.num_calls += 1;
        if self.at.is_empty() && self.named.is_empty() {
            return false;
        }
        if let Some(idx) = self.at.iter().position(|at| *at == self.num_calls) {
            self.at.swap_remove(idx);
            return true;
        }
        match self.named.get_mut(call) {
            Some(left) => {
                *left -= 1;
                if *left == 0 {
                    self.named.remove(call);
                }
                true
            }
            None => false,
        }
    }
}

impl HostBackend {
    /// Begins a driver call: counts it and fails it if a fault was asked for, else locks the device.
    pub(super) fn enter(&self, call: &'static str) -> Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        if state.faults.count(call) {
            return Err(Error::driver(call, 999, "INJECTED"));
        }
        Ok(state)
    }

    /// As [`HostBackend::enter`], for a call that fails by lack of memory.
    pub(super) fn enter_alloc(&self, call: &'static str, bytes: usize) -> Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        if state.faults.count(call) {
            return Err(state.memory.out_of_memory(bytes));
        }
        Ok(state)
    }
}

/// The controls of a host device: its schedule, its faults, its counters. Clones control the same device.
///
/// # Example
/// ```
/// use bcg_runtime::{DType, Device, Error};
/// let device = Device::host();
/// let control = device.host_control().expect("a host device");
/// control.fail_call(1);
/// assert!(matches!(device.empty(&[4], DType::F32), Err(Error::OutOfMemory { .. })));
/// assert!(device.empty(&[4], DType::F32).is_ok());
/// ```
#[derive(Clone)]
pub struct HostControl {
    shared: Arc<Shared>,
}

impl HostControl {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Restarts the random order of the work with another seed.
    pub fn reseed(&self, seed: u64) {
        self.shared.lock().queue.reseed(seed);
    }

    /// Makes the `n`-th driver call from now fail once; 1 is the next call. Calls that allocate fail with
    /// [`Error::OutOfMemory`], others with [`Error::Driver`], code 999.
    pub fn fail_call(&self, n: u64) {
        let faults = &mut self.shared.lock().faults;
        let at = faults.num_calls + n.max(1);
        faults.at.push(at);
    }

    /// Makes the next `n` calls of one driver function fail, such as `cuGraphLaunch`.
    pub fn fail_calls_named(&self, call: &str, n: u64) {
        let faults = &mut self.shared.lock().faults;
        if n == 0 {
            faults.named.remove(call);
        } else {
            faults.named.insert(call.to_owned(), n);
        }
    }

    /// Forgets all faults that were asked for and did not happen yet.
    pub fn clear_faults(&self) {
        let faults = &mut self.shared.lock().faults;
        faults.at.clear();
        faults.named.clear();
    }

    /// Returns how many driver calls were made. Calls that cannot fail (free, destroy, abort) are not counted.
    pub fn num_calls(&self) -> u64 {
        self.shared.lock().faults.num_calls
    }

    /// Returns the names of the driver calls since [`HostControl::num_calls`] was `mark`; of the latest 65,536 at most.
    pub fn calls_since(&self, mark: u64) -> Vec<&'static str> {
        let faults = &self.shared.lock().faults;
        let wanted = faults.num_calls.saturating_sub(mark).min(faults.log.len() as u64) as usize;
        faults.log.iter().skip(faults.log.len() - wanted).copied().collect()
    }

    /// Makes the work of all streams with this name run only when no other work can (`true`), or as it comes. That
    /// includes graph nodes that were captured on such a stream.
    pub fn set_delay(&self, stream: &str, late: bool) {
        let state = &mut *self.shared.lock();
        let lane = state.lane(stream);
        state.queue.set_delayed(lane, late);
    }

    /// Returns how many operations are queued and did not run yet.
    pub fn num_pending(&self) -> usize {
        self.shared.lock().queue.num_pending()
    }
}

impl fmt::Debug for HostControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostControl").field("device", &self.shared.name).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Rig;
    use super::*;
    use crate::device::traits::{MemoryBackend, StreamBackend};

    #[test]
    fn the_nth_call_from_now_fails_once() {
        let rig = Rig::new();
        let stream = rig.stream("main");
        rig.control.fail_call(2);
        rig.backend.synchronize_stream(stream).unwrap();
        let error = rig.backend.synchronize_stream(stream).unwrap_err();
        assert_eq!(error.to_string(), "cuStreamSynchronize failed: INJECTED (code 999)");
        rig.backend.synchronize_stream(stream).unwrap();
    }

    #[test]
    fn a_fault_in_an_allocation_is_a_lack_of_memory() {
        let rig = Rig::new();
        rig.control.fail_call(1);
        assert!(matches!(rig.backend.alloc(8), Err(Error::OutOfMemory { requested_bytes: 8, .. })));
        rig.control.fail_calls_named("cuMemMap", 1);
        let base = rig.backend.reserve(rig.backend.map_granularity()).unwrap();
        let map = || rig.backend.map(base, 0, rig.backend.map_granularity());
        assert!(matches!(map(), Err(Error::OutOfMemory { .. })));
        map().unwrap();
    }

    #[test]
    fn named_calls_fail_as_often_as_asked_and_others_go_on() {
        let rig = Rig::new();
        rig.control.fail_calls_named("cuMemAlloc", 2);
        let stream = rig.stream("main");
        assert!([0; 3].map(|_| rig.backend.alloc(8).is_ok()) == [false, false, true]);
        rig.control.fail_calls_named("cuMemAlloc", 5);
        rig.control.fail_call(1);
        rig.control.clear_faults();
        rig.backend.alloc(8).unwrap();
        rig.backend.synchronize_stream(stream).unwrap();
    }

    #[test]
    fn calls_are_counted_and_named_but_not_those_that_cannot_fail() {
        let rig = Rig::new();
        let mark = rig.control.num_calls();
        let ptr = rig.backend.alloc(8).unwrap();
        let stream = rig.stream("main");
        rig.backend.free(ptr);
        rig.backend.destroy_stream(stream);
        assert_eq!(rig.control.calls_since(mark), ["cuMemAlloc", "cuStreamCreate"]);
        assert_eq!(rig.control.calls_since(mark + 1), ["cuStreamCreate"]);
        assert_eq!(rig.control.num_calls(), mark + 2);
    }
}
