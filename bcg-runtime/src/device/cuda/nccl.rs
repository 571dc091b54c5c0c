//! Raw binding of NCCL, NVIDIA's library that carries data between GPUs of several processes, on one machine or on many.
//!
//! - The library is looked for once per process and never unloaded; its absence is an error that says what was looked
//!   for. Nothing is linked against it.
//! - A status is a `u32`, never a Rust enum: a newer library may return one that is unknown here.
//! - It only carries bytes: sums over the ranks are computed by kernels of this project, in the order of the ranks (law
//!   L15).
//! - A communicator is aborted, never destroyed in order: nothing waits for a process that is gone.

use std::ffi::{CStr, c_char};
use std::fmt;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::CudaBackend;
use super::bindings::bindings;
use super::sys::Driver;
use crate::compile::{library_candidates, open_library};
use crate::device::traits::{StreamHandle, Transport};
use crate::{DevicePtr, Error, Result};

/// Bytes are carried, whatever they mean.
const TYPE_U8: u32 = 1;
const SUCCESS: u32 = 0;
const IN_PROGRESS: u32 = 7;
/// The oldest version that is used: communicators of several threads, and captures of their work, as 10000 times the first
/// number and 100 times the second.
const VERSION_MIN: i32 = 21800;
/// A call that takes longer than this hangs, because another process does not come: only an abort ends it.
const CALL_TIME_MAX: Duration = Duration::from_secs(1);

/// `ncclUniqueId`: by what the ranks of one communicator find each other.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct UniqueId([u8; 128]);

// SAFETY: the signatures are those of nccl.h of version 2.
bindings! {
    /// The library's entry points.
    struct Nccl;
    ncclGetVersion(*mut i32) -> u32;
    ncclGetErrorString(u32) -> *const c_char;
    ncclGetUniqueId(*mut UniqueId) -> u32;
    ncclCommInitRank(*mut u64, i32, UniqueId, i32) -> u32;
    ncclCommGetAsyncError(u64, *mut u32) -> u32;
    ncclCommAbort(u64) -> u32;
    ncclAllGather(u64, u64, usize, u32, u64, u64) -> u32;
}

impl Nccl {
    /// Returns the process's NCCL.
    ///
    /// # Errors
    /// [`Error::NoDevice`] if there is none, with what was looked for; the same error at each call.
    fn get() -> Result<&'static Self> {
        static LIBRARY: OnceLock<Result<Nccl, String>> = OnceLock::new();
        let library =
            LIBRARY.get_or_init(|| Self::open(&library_candidates("BCG_NCCL", &["libnccl.so.2", "libnccl.so"])));
        library.as_ref().map_err(|message| Error::NoDevice(message.clone()))
    }

    fn open(candidates: &[PathBuf]) -> Result<Self, String> {
        const REMEDY: &str =
            "GPUs of several processes need it: install NCCL 2.18 or newer, or name the library in BCG_NCCL";
        // SAFETY: the names are NVIDIA's NCCL, or a path that the user named as NCCL in BCG_NCCL.
        let opened = unsafe { open_library(candidates) };
        let (library, path) = opened.map_err(|message| format!("NCCL not found: {message}; {REMEDY}"))?;
        let wrong = |what: &str| format!("{}: {what}; {REMEDY}", path.display());
        let nccl = Self::bind(library).map_err(wrong)?;
        let mut version = 0;
        // SAFETY: the out-pointer is writable for the call.
        let status = unsafe { (nccl.ncclGetVersion)(&raw mut version) };
        if status != SUCCESS || version < VERSION_MIN {
            return Err(wrong(&format!("its version is {version}")));
        }
        tracing::info!(version, path = %path.display(), "NCCL carries what ranks of several processes send each other");
        Ok(nccl)
    }

    fn check(&self, call: &'static str, status: u32) -> Result<()> {
        match status {
            SUCCESS => Ok(()),
            status => {
                // SAFETY: any status is accepted; the texts are static C strings.
                let text = unsafe { (self.ncclGetErrorString)(status) };
                let text = if text.is_null() {
                    "a status without a name".to_owned()
                } else {
                    // SAFETY: not null (line above), a static C string.
                    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
                };
                Err(Error::other(format!("{call} failed: {text} (status {status}; NCCL_DEBUG=WARN says more)")))
            }
        }
    }
}

/// This rank's end of a communicator.
struct Communicator {
    driver: &'static Driver,
    /// 0 once it is aborted.
    raw: AtomicU64,
    /// Calls that have the communicator in their hands.
    num_calls: AtomicUsize,
}

/// A communicator in the hands of one call.
struct Held<'a> {
    raw: u64,
    num_calls: &'a AtomicUsize,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.num_calls.fetch_sub(1, Ordering::SeqCst);
    }
}

impl CudaBackend {
    /// See [`RankBackend::transport_id`](crate::device::traits::RankBackend::transport_id).
    pub(super) fn nccl_id(&self) -> Result<Vec<u8>> {
        let _relaxed = self.enter()?;
        let (nccl, mut id) = (Nccl::get()?, UniqueId([0; 128]));
        // SAFETY: the out-pointer is writable for the call.
        nccl.check("ncclGetUniqueId", unsafe { (nccl.ncclGetUniqueId)(&raw mut id) })?;
        Ok(id.0.to_vec())
    }

    /// See [`RankBackend::join_transport`](crate::device::traits::RankBackend::join_transport).
    pub(super) fn join_nccl(&self, id: &[u8], rank: usize, num_ranks: usize) -> Result<Box<dyn Transport>> {
        let _relaxed = self.enter()?;
        let nccl = Nccl::get()?;
        let id = id.try_into().map_err(|_| Error::other("what node 0 sent is no id of an NCCL communicator"))?;
        let mut raw = 0;
        // SAFETY: the context of this device is current (`enter`), and the out-pointer is writable for the call. The id is
        // passed by value, as the C function takes it.
        let status = unsafe { (nccl.ncclCommInitRank)(&raw mut raw, num_ranks as i32, UniqueId(id), rank as i32) };
        nccl.check("ncclCommInitRank", status)?;
        Ok(Box::new(Communicator { driver: self.driver, raw: AtomicU64::new(raw), num_calls: AtomicUsize::new(0) }))
    }
}

impl Communicator {
    /// Takes the communicator for a call.
    fn hold(&self) -> Result<Held<'_>> {
        // Counted first: whoever aborts has taken the communicator out before it looks at the count.
        self.num_calls.fetch_add(1, Ordering::SeqCst);
        let held = Held { raw: self.raw.load(Ordering::SeqCst), num_calls: &self.num_calls };
        if held.raw == 0 { Err(Error::other("the NCCL communicator was aborted")) } else { Ok(held) }
    }
}

impl Transport for Communicator {
    fn gather(&self, stream: StreamHandle, src: DevicePtr, dst: DevicePtr, bytes: usize) -> Result<()> {
        let _relaxed = self.driver.relax()?; // it may allocate when it meets a kind of message for the first time
        let (nccl, held) = (Nccl::get()?, self.hold()?);
        // SAFETY: the communicator is live: `abort` waits for `held`, or, if this call hangs, aborts it, which NCCL allows
        // during a call. The caller says that `bytes` at `src` and as many for each rank at `dst` are device memory until the work has run.
        let status = unsafe { (nccl.ncclAllGather)(src.0, dst.0, bytes, TYPE_U8, held.raw, stream.0) };
        nccl.check("ncclAllGather", status)
    }

    fn check(&self) -> Result<()> {
        let (nccl, held, mut status) = (Nccl::get()?, self.hold()?, SUCCESS);
        // SAFETY: as in `gather`; the out-pointer is writable for the call.
        nccl.check("ncclCommGetAsyncError", unsafe { (nccl.ncclCommGetAsyncError)(held.raw, &raw mut status) })?;
        if status == IN_PROGRESS { Ok(()) } else { nccl.check("a transfer between nodes", status) }
    }

    fn abort(&self) {
        let raw = self.raw.swap(0, Ordering::SeqCst);
        let begun = Instant::now();
        while self.num_calls.load(Ordering::SeqCst) > 0 && begun.elapsed() < CALL_TIME_MAX {
            std::thread::sleep(Duration::from_millis(1));
        }
        if let (Ok(nccl), 1..) = (Nccl::get(), raw) {
            // SAFETY: the communicator was live, nobody else aborts it, and no call begins any more: it was taken out (line
            // above). A call that is still under way hangs in NCCL.
            if let Err(error) = nccl.check("ncclCommAbort", unsafe { (nccl.ncclCommAbort)(raw) }) {
                tracing::warn!(%error, "aborting what carries data between nodes; going on");
            }
        }
    }
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Communicator").field("raw", &self.raw).finish_non_exhaustive()
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_nccl_gets_an_error_that_names_it() {
        let Err(message) = Nccl::open(&["libnccl-nowhere.so.2".into()]) else { panic!("no such library") };
        assert!(message.contains("NCCL not found: looked for libnccl-nowhere.so.2"), "{message}");
        assert!(message.contains("install NCCL") && message.contains("BCG_NCCL"), "{message}");
    }
}
