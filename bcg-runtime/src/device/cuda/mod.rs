//! CUDA, driven through the driver API. One file for each trait of [`traits`](super::traits), as in `host`.
//!
//! Invariants:
//! - The device's primary context is current on the calling thread before each driver call. A thread remembers the one
//!   that it set, so the launch path compares a number and calls nothing. Code that sets another context on the same
//!   thread by itself must restore it; every call that is not on the launch path sets it again in any case.
//! - The primary context is retained and never released: it serves all backends of a device and outlives them, as in
//!   the CUDA runtime, so the remembered context never dangles.
//! - [`Gate`], one for the process, knows all streams and open captures. What a driver forbids while *any* stream of the
//!   context captures, and answers by spoiling that capture (waiting for the context, freeing memory), goes through the gate
//!   first: it is refused, done another way, or put off until the captures have ended. Frees are put off while any GPU
//!   captures: they wait for every GPU that shares memory with theirs (law L17).
//! - No call panics, whatever the driver says.

mod bindings;
mod cublaslt;
mod cupti;
mod event;
mod graph;
mod matmul;
mod memory;
mod merge;
mod module;
mod nccl;
mod plans;
mod ranks;
mod stream;
mod sys;
mod tuning;

use std::cell::Cell;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

use cudarc::driver::sys::CUdevice_attribute as Attribute;

use super::traits::Backend;
use crate::compile::Arch;
use crate::device::KernelTrace;
use crate::launch::AnyKernel;
use crate::{DeviceKind, Error, Result};
use matmul::Matmuls;
use module::Modules;
use sys::{Driver, Relaxed};

/// The lowest compute capability whose kernels are built.
const ARCH_MIN: Arch = Arch { major: 8, minor: 0 };

thread_local! {
    /// The context that this thread has set last.
    static CURRENT: Cell<u64> = const { Cell::new(0) };
}

/// One CUDA device.
pub(crate) struct CudaBackend {
    driver: &'static Driver,
    name: String,
    device: i32,
    context: u64,
    arch: Arch,
    granularity: usize,
    /// The most dynamic and static shared memory that a block may ask for.
    shared_bytes_max: usize,
    num_multiprocessors: u32,
    /// Kernels may start before the one ahead has ended: compute capability 9.0 and newer.
    can_overlap: bool,
    modules: Modules,
    matmuls: Matmuls,
    gate: Arc<SharedGate>,
}

/// The gate of all GPUs of the process.
static GATE: LazyLock<Arc<SharedGate>> = LazyLock::new(Arc::default);

#[derive(Debug, Default)]
struct SharedGate {
    gate: Mutex<Gate>,
    /// `gate.captures.len()`, for a look without the lock.
    num_captures: AtomicUsize,
}

/// Streams, open captures, and what must wait until no capture is open.
#[derive(Debug, Default)]
struct Gate {
    /// Contexts and their streams.
    streams: Vec<(u64, u64)>,
    captures: Vec<OpenCapture>,
    put_off: Vec<PutOff>,
}

/// A capture that was begun and not ended.
#[derive(Debug)]
struct OpenCapture {
    context: u64,
    stream: u64,
    thread: ThreadId,
    /// A forbidden call was refused: ending the capture fails, as if the driver had seen the call.
    is_spoilt: bool,
}

/// A free that would have spoiled an open capture.
#[derive(Debug)]
struct PutOff {
    context: u64,
    ptr: u64,
    is_pinned: bool,
}

impl CudaBackend {
    /// Opens a device.
    ///
    /// # Errors
    /// [`Error::NoDevice`] without a driver, for a driver or device that is too old, and for an ordinal beyond the
    /// last.
    pub(crate) fn new(ordinal: usize) -> Result<Self> {
        Self::open(Driver::get()?, ordinal).map_err(|error| match error {
            error @ Error::NoDevice(_) => error,
            error => Error::NoDevice(format!("cuda:{ordinal}: {error}")),
        })
    }

    fn open(driver: &'static Driver, ordinal: usize) -> Result<Self> {
        let count = driver.device_count()?;
        let ordinal = i32::try_from(ordinal).ok().filter(|ordinal| *ordinal < count).ok_or_else(|| {
            Error::NoDevice(format!("there is no cuda:{ordinal}; the driver shows {count}, counted from 0"))
        })?;
        let device = driver.device(ordinal)?;
        let name = format!("cuda:{ordinal} {}", driver.device_name(device)?);
        let number = |attribute| driver.attribute(device, attribute).map(|value| u32::try_from(value).unwrap_or(0));
        let arch = Arch {
            major: number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            minor: number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        };
        if (arch.major, arch.minor) < (ARCH_MIN.major, ARCH_MIN.minor) {
            let Arch { major, minor } = arch;
            return Err(Error::NoDevice(format!(
                "{name} has compute capability {major}.{minor}, but 8.0 or newer is needed"
            )));
        }
        if number(Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED)? == 0 {
            return Err(Error::NoDevice(format!("{name} has no virtual memory management, which the arena needs")));
        }
        let shared_bytes_max = number(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize;
        let context = driver.retain_primary_context(device)?;
        let mut backend = Self::assemble(driver, name, device, context, arch);
        backend.gate = Arc::clone(&GATE);
        backend.shared_bytes_max = shared_bytes_max;
        backend.num_multiprocessors = number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let _relaxed = backend.enter()?;
        backend.granularity = driver.granularity(device)?.max(1);
        Ok(backend)
    }

    fn assemble(driver: &'static Driver, name: String, device: i32, context: u64, arch: Arch) -> Self {
        Self {
            driver,
            name,
            device,
            context,
            arch,
            granularity: 1,
            shared_bytes_max: 0,
            num_multiprocessors: 1,
            can_overlap: arch.major >= 9,
            modules: Modules::new(),
            matmuls: Matmuls::new(),
            gate: Arc::default(),
        }
    }

    /// Makes the context current on this thread: a comparison, if this thread set it last.
    fn bind(&self) -> Result<()> {
        if CURRENT.get() == self.context { Ok(()) } else { self.bind_again() }
    }

    fn bind_again(&self) -> Result<()> {
        self.bind_to(self.context)
    }

    fn bind_to(&self, context: u64) -> Result<()> {
        self.driver.set_current(context)?;
        CURRENT.set(context);
        Ok(())
    }

    /// Prepares a call off the launch path: makes the context current whatever happened before, and lets the call pass
    /// while this thread captures. Only for calls whose effect no captured graph depends on.
    fn enter(&self) -> Result<Relaxed> {
        self.bind_again()?;
        self.driver.relax()
    }

    /// Runs a call that must not fail, and logs it if it does.
    fn enter_and_log(&self, call: impl FnOnce(&Driver) -> Result<()>) {
        let result = self.enter().and_then(|_relaxed| call(self.driver));
        if let Err(error) = result {
            tracing::warn!(device = %self.name, %error, "a release failed; going on");
        }
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        // The gate's lists are whole after every statement, so a panic elsewhere leaves nothing to repair.
        self.gate.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many captures are open, on all GPUs.
    fn num_captures(&self) -> usize {
        self.gate.num_captures.load(Ordering::Acquire)
    }

    /// Tells whether a stream captures, by itself or because it joined a capture. Calls nothing while none is open.
    fn is_capturing(&self, stream: u64) -> Result<bool> {
        Ok(self.num_captures() > 0 && self.driver.is_capturing(stream)?)
    }

    /// Refuses a call while its stream captures.
    fn refuse_while_capturing(&self, stream: u64, what: &str) -> Result<()> {
        if self.is_capturing(stream)? {
            self.gate().spoil();
            return Err(Error::CaptureForbidden { what: what.to_owned() });
        }
        Ok(())
    }

    /// Refuses a call while this thread captures.
    fn refuse_while_this_thread_captures(&self, gate: &mut Gate, what: &str) -> Result<()> {
        if gate.spoil() { Err(Error::CaptureForbidden { what: what.to_owned() }) } else { Ok(()) }
    }

    /// Makes the context current for a call that may wait or load kernels. While captures are open, it lets the call
    /// pass: neither disturbs one.
    fn enter_if_capturing(&self) -> Result<Option<Relaxed>> {
        self.bind()?;
        (self.num_captures() > 0).then(|| self.driver.relax()).transpose()
    }

    /// Waits for all enqueued work. Captured work is not enqueued, so open captures are left alone.
    fn wait_for_all(&self, gate: &Gate) -> Result<()> {
        if gate.captures.iter().all(|capture| capture.context != self.context) {
            return self.driver.synchronize_context();
        }
        // While a stream captures, waiting for the context is illegal and spoils the capture: wait for the others.
        for &(context, stream) in &gate.streams {
            if context == self.context && !self.driver.is_capturing(stream)? {
                self.driver.synchronize_stream(stream)?;
            }
        }
        Ok(())
    }

    /// Notes that a stream no longer captures, and does what was put off once no capture is left.
    fn capture_ended(&self, stream: u64) {
        let mut gate = self.gate();
        gate.captures.retain(|capture| (capture.context, capture.stream) != (self.context, stream));
        self.gate.num_captures.store(gate.captures.len(), Ordering::Release);
        if gate.captures.is_empty() {
            for put_off in gate.put_off.drain(..) {
                self.release(&put_off);
            }
        }
    }

    /// Frees memory after all enqueued work. No capture may be open.
    fn release(&self, memory: &PutOff) {
        let PutOff { context, ptr, is_pinned } = *memory;
        self.enter_and_log(|driver| {
            self.bind_to(context)?;
            // `cuMemFree` waits by itself for memory that is not stream-ordered; `cuMemFreeHost` does not promise it.
            if !is_pinned {
                return driver.free(ptr);
            }
            if let Err(error) = driver.synchronize_context() {
                tracing::warn!(device = %self.name, %error, "waiting before a free failed; going on");
            }
            driver.free_pinned(ptr)
        });
    }
}

impl Gate {
    /// Spoils the captures of this thread; tells whether there are any.
    fn spoil(&mut self) -> bool {
        let thread = std::thread::current().id();
        let mut is_any = false;
        for capture in self.captures.iter_mut().filter(|capture| capture.thread == thread) {
            capture.is_spoilt = true;
            is_any = true;
        }
        is_any
    }
}

impl Backend for CudaBackend {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Cuda
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn compute_capability(&self) -> Option<Arch> {
        Some(self.arch)
    }

    fn num_multiprocessors(&self) -> u32 {
        self.num_multiprocessors
    }

    fn prepare(&self, kernels: &[&'static dyn AnyKernel]) -> Result<()> {
        self.prepare_kernels(kernels)
    }

    fn trace_kernels(&self, with_calls: bool, f: &mut dyn FnMut() -> Result<()>) -> Result<KernelTrace> {
        self.bind_again()?;
        cupti::trace(with_calls, f)
    }
}

impl fmt::Debug for CudaBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaBackend").field("name", &self.name).field("arch", &self.arch).finish_non_exhaustive()
    }
}

impl Drop for CudaBackend {
    fn drop(&mut self) {
        // Every guard keeps the device alive, so no stream, graph or allocation is left that could use these.
        let put_off: Vec<PutOff> =
            self.gate().put_off.extract_if(.., |put_off| put_off.context == self.context).collect();
        put_off.iter().for_each(|memory| self.release(memory));
        if let Some(matmuls) = self.matmuls.take() {
            self.enter_and_log(move |_| {
                drop(matmuls);
                Ok(())
            });
        }
        for module in self.modules.take() {
            self.enter_and_log(|driver| driver.unload_module(module));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DevicePtr;
    use crate::device::traits::{
        EventBackend, EventHandle, ExecHandle, GraphBackend, GraphHandle, MemoryBackend, NodeHandle, StreamBackend,
        StreamHandle,
    };
    use crate::op::{Op, RowCopy};

    const STREAM: StreamHandle = StreamHandle(1);

    /// A backend whose driver refuses every call with `CODE`.
    fn refusing<const CODE: u32>() -> CudaBackend {
        let driver = Box::leak(Box::new(Driver::refusing::<CODE>()));
        let backend = CudaBackend::assemble(driver, "cuda:0 refusing".into(), 0, u64::from(CODE), ARCH_MIN);
        CURRENT.set(backend.context); // so that calls on the launch path reach their own entry point
        backend
    }

    #[test]
    fn a_missing_device_is_an_error_and_not_a_panic() {
        let error = CudaBackend::new(4096).expect_err("no machine has that many devices");
        assert!(matches!(error, Error::NoDevice(_)), "{error}");
        if let Err(error) = CudaBackend::new(0) {
            assert!(matches!(error, Error::NoDevice(_)), "{error}");
        }
    }

    #[test]
    fn a_driver_that_refuses_every_call_gives_errors_with_its_code() {
        let backend = refusing::<700>();
        let ptr = DevicePtr(256);
        let copy = RowCopy { dst: ptr, dst_pitch: 8, src: ptr, src_pitch: 8, row_bytes: 4, rows: 2 };
        let errors = [
            backend.memory_info().err(),
            backend.alloc(1).err(),
            backend.alloc_pinned(1).err(),
            backend.reserve(1).err(),
            backend.map(ptr, 0, 1).err(),
            backend.create_stream("s").err(),
            backend.synchronize_stream(STREAM).err(),
            backend.synchronize().err(),
            backend.enqueue(STREAM, &Op::Fill { dst: ptr, byte: 0, bytes: 1 }).err(),
            backend.fill_u32(STREAM, ptr, 0, 1).err(),
            backend.enqueue(STREAM, &Op::Copy(copy)).err(),
            backend.copy_from_host(STREAM, ptr, &[1]).err(),
            backend.copy_to_host(STREAM, &mut [1], ptr).err(),
            backend.enqueue(STREAM, &Op::CopyFromPinned { dst: ptr, src: ptr, bytes: 1 }).err(),
            backend.create_event().err(),
            backend.record_event(EventHandle(1), STREAM).err(),
            backend.wait_event(STREAM, EventHandle(1)).err(),
            backend.synchronize_event(EventHandle(1)).err(),
            backend.begin_capture(STREAM).err(),
            backend.end_capture(STREAM).err(),
            backend.node_counts(GraphHandle(1)).err(),
            backend.instantiate(GraphHandle(1)).err(),
            backend.update_exec(ExecHandle(1), GraphHandle(1)).err(),
            backend.launch_graph(ExecHandle(1), STREAM).err(),
            backend.merge(STREAM, &[]).err(),
            backend.patch(ExecHandle(1), NodeHandle(1), &Op::Fill { dst: ptr, byte: 0, bytes: 1 }).err(),
            backend.patch(ExecHandle(1), NodeHandle(1), &Op::Copy(copy)).err(),
        ];
        for (i, error) in errors.into_iter().enumerate() {
            assert!(matches!(error, Some(Error::Driver { code: 700, .. })), "call {i}: {error:?}");
        }
    }

    #[test]
    fn releases_never_panic() {
        let backend = refusing::<701>();
        let ptr = DevicePtr(256);
        backend.free(ptr);
        backend.free_pinned(ptr);
        backend.unmap(ptr, 0, 1);
        backend.unreserve(ptr, 1);
        backend.destroy_stream(STREAM);
        backend.destroy_event(EventHandle(1));
        backend.abort_capture(STREAM);
        backend.destroy_graph(GraphHandle(1));
        backend.destroy_exec(ExecHandle(1));
    }

    #[test]
    fn frees_wait_for_the_last_open_capture() {
        let backend = refusing::<702>();
        let thread = std::thread::current().id();
        let context = backend.context;
        backend.gate().captures = [1, 2].map(|stream| OpenCapture { context, stream, thread, is_spoilt: false }).into();
        backend.gate.num_captures.store(2, Ordering::Release);
        backend.free(DevicePtr(256));
        backend.free_pinned(DevicePtr(512));
        assert_eq!(backend.gate().put_off.len(), 2);
        backend.capture_ended(1);
        assert_eq!(backend.gate().put_off.len(), 2, "stream 2 still captures");
        backend.capture_ended(2);
        assert_eq!(backend.gate().put_off.len(), 0);
        assert_eq!(backend.num_captures(), 0);
    }

    #[test]
    fn an_allocation_during_a_capture_of_this_thread_is_refused_before_the_driver_sees_it() {
        let backend = refusing::<703>();
        let thread = std::thread::current().id();
        let context = backend.context;
        backend.gate().captures.push(OpenCapture { context, stream: 1, thread, is_spoilt: false });
        assert!(matches!(backend.alloc(1), Err(Error::CaptureForbidden { .. })));
        std::thread::scope(|scope| {
            let other = scope.spawn(|| backend.alloc(1));
            let result = other.join().expect("no panic");
            assert!(matches!(result, Err(Error::Driver { code: 703, .. })), "another thread may allocate: {result:?}");
        });
    }

    #[test]
    fn a_driver_out_of_memory_names_the_device_and_the_bytes() {
        let backend = refusing::<2>();
        let error = backend.out_of_memory(Error::driver("cuMemAlloc_v2", 2, "CUDA_ERROR_OUT_OF_MEMORY"), 4096);
        assert!(matches!(error, Error::OutOfMemory { requested_bytes: 4096, free_bytes: 0, .. }), "{error}");
        let other = backend.out_of_memory(Error::driver("cuMemAlloc_v2", 1, "CUDA_ERROR_INVALID_VALUE"), 4096);
        assert!(matches!(other, Error::Driver { code: 1, .. }), "{other}");
    }
}
