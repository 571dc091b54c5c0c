//! Who is told before a call reaches a device past the stream of the forward that runs, and what is freed late.
//!
//! A healed replay keeps the work of a break back. The body of that break may still read, wait or free through the
//! device itself, and must then find the device as in an eager run. So every guard tells the thread's [`Watcher`]
//! before such a call. Whoever keeps work back installs one for as long as it does, and has a [`Hold`].
//!
//! - Work that is kept back, or noted for a graph, names memory by its address. So memory is freed only when all who held
//!   such work as its last handle dropped are done with it: at once if there is nobody, else at the end of the last of
//!   these holds. Who drops a handle never waits.
//! - Holds cost a replay two locks that nobody else wants, and no lock is held across a driver call.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::Device;
use crate::{DevicePtr, Result};

/// What a call waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Needs {
    /// It waits for nothing: it enqueues work.
    Nothing,
    /// It waits for the results of the work enqueued so far.
    Results,
}

/// What is called on this thread before calls that reach a device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Watcher {
    /// Called before a call of this name that waits for work; its error is the call's.
    pub(crate) before_call: fn(&Device, &'static str, Needs) -> Result<()>,
    /// Called before memory is freed, which cannot fail. Returns the number of a hold whose work does not name that memory,
    /// or not any more.
    pub(crate) before_free: fn(&Device, &'static str) -> Option<u64>,
}

thread_local! {
    static WATCHER: Cell<Option<Watcher>> = const { Cell::new(None) };
}

/// Installs a watcher on this thread, or none, and returns the one that was there.
pub(crate) fn install(watcher: Option<Watcher>) -> Option<Watcher> {
    WATCHER.replace(watcher)
}

/// Tells the watcher of a call that waits for all work.
///
/// # Errors
/// Those of the watcher: the call must not be made then.
pub(super) fn before_wait(device: &Device, what: &'static str) -> Result<()> {
    match WATCHER.get() {
        Some(watcher) => (watcher.before_call)(device, what, Needs::Results),
        None => Ok(()),
    }
}

/// Memory whose last handle dropped.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dropped {
    pub(super) ptr: DevicePtr,
    pub(super) bytes: usize,
    pub(super) is_pinned: bool,
}

impl Dropped {
    fn free(self, device: &Device) {
        if self.is_pinned {
            device.backend().free_pinned(self.ptr);
        } else {
            device.backend().free(self.ptr);
        }
        device.counters().sub_memory(self.bytes);
    }
}

/// Frees memory, after the watcher was told: now, or at the end of the holds that there are now.
pub(super) fn free(device: &Device, what: &'static str, memory: Dropped) {
    let own = WATCHER.get().and_then(|watcher| (watcher.before_free)(device, what));
    let is_free = {
        let mut holds = device.holds().lock();
        let is_free = holds.active.iter().all(|hold| Some(*hold) == own);
        if !is_free {
            holds.dropped.push((NEXT_HOLD.load(Ordering::Relaxed), memory));
        }
        is_free
    };
    if is_free {
        memory.free(device);
    }
}

/// The number of the next hold of any device.
static NEXT_HOLD: AtomicU64 = AtomicU64::new(0);

/// Those who hold work of a device now.
#[derive(Debug, Default)]
pub(super) struct Holds(Mutex<Active>);

#[derive(Debug, Default)]
struct Active {
    /// Their numbers, in no order; no allocation once as many were there before.
    active: Vec<u64>,
    /// Memory to free, each with the number of the first hold that cannot name it: all lower ones must have ended.
    /// Bounded by what lives on the device.
    dropped: Vec<(u64, Dropped)>,
}

impl Holds {
    fn lock(&self) -> MutexGuard<'_, Active> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says that its owner may hold work of a device that is not enqueued, until it is dropped.
#[derive(Debug)]
pub(crate) struct Hold<'a> {
    device: &'a Device,
    number: u64,
}

impl<'a> Hold<'a> {
    pub(crate) fn begin(device: &'a Device) -> Self {
        let mut holds = device.holds().lock();
        // Under the lock, so that no hold of this device with a lower number begins later.
        let number = NEXT_HOLD.fetch_add(1, Ordering::Relaxed);
        holds.active.push(number);
        drop(holds);
        Self { device, number }
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let device = self.device;
        let mut holds = device.holds().lock();
        holds.active.retain(|hold| *hold != self.number);
        loop {
            let oldest = holds.active.iter().copied().min().unwrap_or(u64::MAX);
            let Some(at) = holds.dropped.iter().position(|(first, _)| *first <= oldest) else { break };
            let (_, memory) = holds.dropped.swap_remove(at);
            drop(holds);
            memory.free(device);
            holds = device.holds().lock();
        }
    }
}
