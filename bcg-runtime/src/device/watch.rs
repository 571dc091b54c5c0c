//! Who is told before a call reaches a device past the stream of the forward that runs.
//!
//! A healed replay keeps the work of a break back. The body of that break may still read, wait or free through the
//! device itself, and must then find the device as in an eager run. So every guard tells the thread's [`Watcher`]
//! before such a call. Whoever keeps work back installs one for as long as it does; the device knows nothing else about
//! it.

use std::cell::Cell;

use super::Device;
use crate::Result;

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
    /// Called before memory is freed, which cannot fail.
    pub(crate) before_free: fn(&Device, &'static str),
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

/// Tells the watcher that memory is about to be freed.
pub(super) fn before_free(device: &Device, what: &'static str) {
    if let Some(watcher) = WATCHER.get() {
        (watcher.before_free)(device, what);
    }
}
