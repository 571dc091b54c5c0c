//! The controls of a host device: what a test can change from outside, and how each driver call begins.
//!
//! Every fallible call of the backend enters here once, under the name of the CUDA driver function that it stands for;
//! calls that cannot fail (free, destroy, abort) do not. A call that hangs or is slow holds no lock meanwhile, so other
//! threads use the device.

use std::fmt;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use super::fault::{Fate, ask};
use super::{HostBackend, Shared, State};
use crate::device::traits::MemoryBackend;
use crate::{DevicePtr, Error, Result};

impl HostBackend {
    /// Begins a driver call: counts it and lets it meet the faults that were asked for, else locks the device.
    pub(super) fn enter(&self, call: &'static str) -> Result<MutexGuard<'_, State>> {
        self.begin(call, |_| Error::driver(call, 999, "INJECTED"))
    }

    /// As [`HostBackend::enter`], for a call that fails by lack of memory.
    pub(super) fn enter_alloc(&self, call: &'static str, bytes: usize) -> Result<MutexGuard<'_, State>> {
        self.begin(call, |state| state.memory.out_of_memory(bytes))
    }

    fn begin(&self, call: &'static str, failed: impl FnOnce(&State) -> Error) -> Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        let Fate { slow_by, hangs, fails, panics } = state.faults.count(call);
        if slow_by > Duration::ZERO {
            drop(state);
            std::thread::sleep(slow_by);
            state = self.lock();
        }
        if let Some(at_most) = hangs {
            state = self.hang(state, at_most);
        }
        if panics {
            drop(state);
            panic!("the panic that was asked for in {call}");
        }
        match state.faults.lost(call) {
            Some(error) => Err(error),
            None if fails => Err(failed(&state)),
            None => Ok(state),
        }
    }

    /// Waits, without the lock, until hanging calls are released, at most that long.
    fn hang<'a>(&'a self, mut state: MutexGuard<'a, State>, at_most: Duration) -> MutexGuard<'a, State> {
        let num_releases = state.faults.num_releases;
        state.faults.num_hanging += 1;
        let waits = |state: &mut State| state.faults.num_releases == num_releases;
        let waited = self.shared.released.wait_timeout_while(state, at_most, waits);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.faults.num_hanging -= 1;
        state
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

    /// Asks for faults by their text: one, or several with commas between them. `N` counts from now on, from 1;
    /// `CALL` is the name of a driver function, such as `cuGraphLaunch`, or `any`.
    ///
    /// - `fail:CALL:N`: the `N`-th call fails once, as after [`HostControl::fail_calls_named`].
    /// - `panic:CALL:N`: the `N`-th call panics once, as a bug of whoever makes it does.
    /// - `hang:CALL:N`: the `N`-th call hangs until [`HostControl::clear_faults`] releases it, at most 300 s, and goes on
    ///   then. `hang:CALL:N:MILLISECONDS` bounds it lower. Other threads can use the device meanwhile.
    /// - `slow:CALL:N:MILLISECONDS`: the `N`-th call and every later one take that much longer.
    /// - `lost:CALL:N`: the `N`-th call, and from then on every call of any name, fails with code 719, as after a kernel
    ///   that trapped: the device is lost for good ([`Error::is_context_lost`]). `lost:CALL:N:CODE` says another code
    ///   after which a context is lost.
    /// - `flip:WORK:N`: the `N`-th run of the work leaves one bit of what it wrote flipped, and says nothing.
    ///   `flip:WORK:N:BIT` says which, counted from the first address that the work may write to; it is 0 otherwise.
    ///   `WORK` is a kernel's entry name, `matmul`, `fill`, `copy`, `copy from host`, `copy from pinned` or
    ///   `copy to pinned`. It runs when somebody waits for it, wherever it was enqueued.
    ///
    /// A name that nothing has is no error; its fault never happens.
    ///
    /// # Errors
    /// [`Error::Option`] if the text is none of these; then no fault of it is asked for.
    ///
    /// # Example
    /// ```
    /// use bcg_runtime::{Device, Error};
    /// let device = Device::host();
    /// let control = device.host_control().expect("a host device");
    /// control.inject("slow:cuCtxSynchronize:1:5, lost:cuCtxSynchronize:2:700")?;
    /// device.synchronize()?; // 5 ms late
    /// assert!(device.synchronize().unwrap_err().is_context_lost());
    /// assert!(matches!(control.inject("hang:cuCtxSynchronize:soon"), Err(Error::Option { .. })));
    /// # Ok::<(), Error>(())
    /// ```
    pub fn inject(&self, faults: &str) -> Result<()> {
        let state = &mut *self.shared.lock();
        ask(faults, &mut state.faults, &mut state.queue.flips)
    }

    /// Forgets all faults that were asked for and did not happen yet, ends slowness, and releases the calls that hang. A
    /// lost device stays lost.
    pub fn clear_faults(&self) {
        let state = &mut *self.shared.lock();
        state.faults.clear();
        state.queue.flips.clear();
        self.shared.released.notify_all();
    }

    /// Returns how many calls hang now.
    pub fn num_hanging(&self) -> usize {
        self.shared.lock().faults.num_hanging
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

    /// Allocates memory that other host devices reach too.
    pub(crate) fn alloc_shared(&self, bytes: usize, with: &[&Self]) -> Result<DevicePtr> {
        let backend = HostBackend { shared: Arc::clone(&self.shared) };
        let mut state = backend.enter_alloc("cuMemCreate", bytes)?;
        state.refuse_while_capturing("cuMemCreate")?;
        let (ptr, backing) = state.memory.alloc_shared(bytes)?;
        drop(state);
        for other in with {
            other.shared.lock().memory.adopt(ptr, bytes, &backing);
        }
        Ok(ptr)
    }

    /// Takes shared memory away from this device, after the work that is enqueued here.
    pub(crate) fn free_shared(&self, ptr: DevicePtr) {
        HostBackend { shared: Arc::clone(&self.shared) }.free(ptr);
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
    use crate::device::traits::StreamBackend;

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
