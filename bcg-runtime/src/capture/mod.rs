//! Capture: from a forward to segments and breaks.
//!
//! [`state`] owns the order of begin, break, end and abort without a device; [`recorder`] drives the device between
//! those transitions and aborts when it is dropped; [`breaks`] is what an annotated function expands to.

pub(crate) mod breaks;
pub(crate) mod recorder;
pub(crate) mod state;
pub(crate) mod step;

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::{Error, Result};

/// Runs `f` and turns a panic into [`Error::Panic`], so that the caller's guards and the first error survive (law L5).
pub(crate) fn catch_panic<R>(f: impl FnOnce() -> Result<R>) -> Result<R> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|payload| {
        let message = payload
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "a panic without a message".to_owned());
        Err(Error::Panic { message })
    })
}
