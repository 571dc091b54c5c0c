//! The host device: a strict emulation of a CUDA device, and the oracle of every test.
//!
//! It queues work and runs it late, in any order that streams and events allow (seeded); it checks each access to
//! memory, fills fresh memory with NaN, refuses what CUDA refuses during a capture, and fails any driver call on
//! request. Where CUDA leaves behaviour undefined (overlapping copies, stale addresses) it reports an error.
//!
//! A host device may be a rank of a world of several. Its collectives are work that ends when every rank has come to it:
//! `collectives` is where they meet, and `ranks` how a device waits for others.
//!
//! One lock guards the whole device, and the thread that waits for work runs it under that lock, so operations of one
//! device never run at the same time. A kernel's host reference must therefore not call the device again.
//!
//! Files are named by the trait that they implement: `memory`, `stream`, `matmul`, `event`, `graph`. Under them lie
//! `regions` (addresses), `backing` (bytes), `view` (what kernels see), `queue` (order), `work` (one operation) and
//! `capture` (open captures); `control` is the tests' hand on all this, and `fault` what they can make go wrong.

mod backing;
mod capture;
pub(crate) mod collectives;
mod control;
mod event;
pub(super) mod fault;
mod graph;
mod matmul;
mod memory;
mod queue;
mod ranks;
mod regions;
mod stream;
#[cfg(test)]
mod testing;
mod view;
mod work;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

pub use control::HostControl;
pub use view::HostMemory;

use super::traits::Backend;
use crate::compile::Arch;
use crate::device::KernelTrace;
use crate::launch::AnyKernel;
use crate::{DeviceKind, Error, Result};
use capture::Capture;
use collectives::Bell;
use event::EventState;
use fault::Faults;
use graph::{Exec, GraphNodes};
use memory::Release;
use queue::Queue;
use regions::Memory;
use stream::StreamState;

/// Options of a host device.
///
/// # Example
/// ```
/// use bcg_runtime::{Device, HostOptions};
/// let mut options = HostOptions::default();
/// (options.seed, options.ordinal) = (7, 1);
/// let device = Device::host_with(options);
/// assert_eq!(device.name(), "host:1");
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct HostOptions {
    /// The seed of the random order in which work runs.
    pub seed: u64,
    /// The memory of the device, in bytes. Host memory is used only for what is touched.
    pub memory_bytes: usize,
    /// The number in the device's name, such as 0 in `host:0`.
    pub ordinal: usize,
    /// How many operations may be queued; beyond that, a random number of them runs at the next enqueuing. Those behind a
    /// collective that waits for other ranks cannot run and do not count.
    pub max_pending: usize,
}

impl Default for HostOptions {
    fn default() -> Self {
        Self { seed: 0, memory_bytes: 8 << 30, ordinal: 0, max_pending: 4096 }
    }
}

/// How many host devices this process has made.
static NUM_INSTANCES: AtomicU64 = AtomicU64::new(0);

/// The emulated device.
pub(crate) struct HostBackend {
    shared: Arc<Shared>,
}

struct Shared {
    name: String,
    options: HostOptions,
    state: Mutex<State>,
    /// Told when calls that hang are released.
    released: Condvar,
    /// Rung when something happens on another rank of a world of this device.
    bell: Arc<Bell>,
}

impl Shared {
    /// Locks the device. A panic of another thread leaves it usable: kernels that panic are caught, and all else
    /// changes the state only after its checks.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All of a device that changes.
struct State {
    memory: Memory,
    queue: Queue,
    faults: Faults,
    streams: HashMap<u64, StreamState>,
    events: HashMap<u64, EventState>,
    captures: HashMap<u64, Capture>,
    graphs: HashMap<u64, Arc<GraphNodes>>,
    execs: HashMap<u64, Exec>,
    last_handle: u64,
    /// Names of streams; a lane is an index into this. Bounded by the number of different names.
    lanes: Vec<Arc<str>>,
    /// Memory to give back when its thread's captures end.
    deferred: Vec<(ThreadId, Release)>,
    /// Memory to give back after all work that is queued.
    due: Vec<Release>,
}

impl State {
    fn new_handle(&mut self) -> u64 {
        self.last_handle += 1;
        self.last_handle
    }

    fn lane(&mut self, name: &str) -> u32 {
        let known = self.lanes.iter().position(|lane| **lane == *name);
        let lane = known.unwrap_or_else(|| {
            self.lanes.push(name.into());
            self.lanes.len() - 1
        });
        lane as u32
    }
}

impl HostBackend {
    pub(crate) fn new(options: HostOptions) -> Self {
        let name = format!("host:{}", options.ordinal);
        let instance = NUM_INSTANCES.fetch_add(1, Ordering::Relaxed);
        let state = State {
            memory: Memory::new(&name, instance, options.memory_bytes),
            queue: Queue::new(options.seed, options.max_pending),
            faults: Faults::default(),
            streams: HashMap::new(),
            events: HashMap::new(),
            captures: HashMap::new(),
            graphs: HashMap::new(),
            execs: HashMap::new(),
            last_handle: 0,
            lanes: Vec::new(),
            deferred: Vec::new(),
            due: Vec::new(),
        };
        let (state, bell) = (Mutex::new(state), Arc::default());
        Self { shared: Arc::new(Shared { name, options, state, released: Condvar::new(), bell }) }
    }

    pub(crate) fn control(&self) -> HostControl {
        HostControl::new(Arc::clone(&self.shared))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.lock()
    }
}

impl Backend for HostBackend {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Host
    }

    fn name(&self) -> &str {
        &self.shared.name
    }

    fn compute_capability(&self) -> Option<Arch> {
        None
    }

    fn num_multiprocessors(&self) -> u32 {
        4
    }

    /// Refuses: nothing here runs on a GPU.
    fn trace_kernels(&self, _: bool, _: &mut dyn FnMut() -> Result<()>) -> Result<KernelTrace> {
        Err(Error::Trace(format!("{} runs no kernel on a GPU; use a CUDA device", self.shared.name)))
    }

    /// Does nothing: host references are compiled into the program.
    fn prepare(&self, _kernels: &[&'static dyn AnyKernel]) -> Result<()> {
        Ok(())
    }
}

impl fmt::Debug for HostBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HostBackend").field(&self.shared.options).finish()
    }
}
