//! Devices: the emulated host device and CUDA, side by side behind the same small traits.
//!
//! [`Device`] is a cheap handle that the rest of the runtime uses; [`traits`] is the contract; [`guard`] owns every
//! object that a backend creates. `host` and `cuda` have the same file names, one for each trait.

pub(crate) mod cuda;
mod guard;
pub(crate) mod host;
mod info;
mod peer;
pub(crate) mod ranks;
pub(crate) mod traits;
pub(crate) mod watch;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

pub(crate) use guard::{Allocation, Graph, GraphExec, Reservation, StreamRef};
pub use guard::{Event, LiveObjects, PinnedBuffer, Stream};
pub(crate) use info::KernelTrace;
pub use info::{DeviceKind, KernelRun, MemoryInfo};
pub(crate) use peer::{SharedMemory, map_for};

use crate::launch::AnyKernel;
use crate::{Arch, Error, Result};
use guard::OwnStream;
use host::fault::FAULT_VARIABLE;
use host::{HostBackend, HostControl, HostOptions};
use traits::Backend;

/// A handle to one device. Cloning is cheap; all clones mean the same device.
///
/// # Example
/// ```
/// use bcg_runtime::{DType, Device};
/// let device = Device::host();
/// let x = device.tensor(&[2, 2], &[1.0f32, 2.0, 3.0, 4.0])?;
/// assert_eq!((x.dtype(), x.shape()), (DType::F32, &[2, 2][..]));
/// assert_eq!(device.read::<f32>(&x.rows(1..2)?)?, [3.0, 4.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Clone)]
pub struct Device {
    backend: Arc<dyn Backend>,
    shared: Arc<Shared>,
    /// Where [`Device::zeros`], [`Device::read`] and [`Device::write`] run.
    own_stream: Arc<OwnStream>,
    host: Option<HostControl>,
}

/// What all handles to a device share, besides the backend.
#[derive(Debug, Default)]
struct Shared {
    counters: guard::Counters,
    holds: watch::Holds,
    /// Worlds because of which no memory is allocated now: their ranks may wait for each other on the device.
    num_seals: AtomicUsize,
}

impl Device {
    /// Makes a host device with default options; each call makes another device.
    pub fn host() -> Self {
        Self::host_with(HostOptions::default())
    }

    /// Makes a host device.
    pub fn host_with(options: HostOptions) -> Self {
        let backend = Arc::new(HostBackend::new(options));
        let host = Some(backend.control());
        Self::with_backend(backend, host)
    }

    /// Makes a host device with default options and the faults that the environment variable `BCG_HOST_FAULT` asks for:
    /// how the test of a whole process makes its device hang, slow, lost or wrong.
    ///
    /// The variable holds a text for [`HostControl::inject`], or `@PATH`. The file at that path holds the text then, and
    /// is removed as it is read: a process that is started again with the same environment has no fault. A file that is
    /// not there asks for none. Faults count calls from the opening of the device on.
    ///
    /// # Errors
    /// [`Error::Option`] with the remedy, if the text is none or the file cannot be read and removed.
    ///
    /// # Example
    /// ```
    /// use bcg_runtime::Device;
    /// let device = Device::host_from_env()?; // as `Device::host()` where the variable is not set
    /// # Ok::<(), bcg_runtime::Error>(())
    /// ```
    pub fn host_from_env() -> Result<Self> {
        let device = Self::host();
        if let (Some(control), Some(value)) = (&device.host, std::env::var_os(FAULT_VARIABLE)) {
            control.inject(&host::fault::text(&value)?)?;
        }
        Ok(device)
    }

    fn with_backend(backend: Arc<dyn Backend>, host: Option<HostControl>) -> Self {
        let own_stream = Arc::new(OwnStream::new(Arc::clone(&backend)));
        Self { backend, shared: Arc::default(), own_stream, host }
    }

    /// Opens the CUDA device with this ordinal.
    ///
    /// # Errors
    /// [`Error::NoDevice`] if there is no driver, no such device, or one too old; never a panic.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Ok(Self::with_backend(Arc::new(cuda::CudaBackend::new(ordinal)?), None))
    }

    /// Opens the first CUDA device if it is usable, else makes a host device; the line says which and why.
    pub fn auto() -> (Self, String) {
        match Self::cuda(0) {
            Ok(device) => {
                let line = format!("device auto: using {}", device.name());
                (device, line)
            }
            Err(why) => (Self::host(), format!("device auto: using the host device, because {why}")),
        }
    }

    /// Returns the kind of this device.
    pub fn kind(&self) -> DeviceKind {
        self.backend.kind()
    }

    /// Returns the device's name, such as `host:0` or `cuda:0 NVIDIA H200`.
    pub fn name(&self) -> &str {
        self.backend.name()
    }

    /// Returns the compute capability of a GPU, and nothing for the host device. For an op with a kernel for one
    /// architecture only.
    pub fn compute_capability(&self) -> Option<Arch> {
        self.backend.compute_capability()
    }

    /// Returns the number of multiprocessors, for kernels that give each of them a share of the work. The host device
    /// has 4.
    pub fn num_multiprocessors(&self) -> u32 {
        self.backend.num_multiprocessors()
    }

    /// Waits until all work of the device has run.
    ///
    /// # Errors
    /// The first error of that work.
    pub fn synchronize(&self) -> Result<()> {
        watch::before_wait(self, "Device::synchronize")?;
        self.backend.synchronize()
    }

    /// Returns free and total memory.
    ///
    /// # Errors
    /// The driver's.
    pub fn memory_info(&self) -> Result<MemoryInfo> {
        self.backend.memory_info()
    }

    /// Returns how many objects of this device are alive, to find leaks.
    pub fn live_objects(&self) -> LiveObjects {
        self.shared.counters.snapshot()
    }

    /// Returns the controls of a host device (schedule, faults), and nothing for other kinds.
    pub fn host_control(&self) -> Option<&HostControl> {
        self.host.as_ref()
    }

    /// Compiles and loads kernels ahead of their first launch, in parallel. Does nothing on the host device.
    ///
    /// # Errors
    /// [`Error::Kernel`] with the compiler's words.
    pub fn prepare(&self, kernels: &[&'static dyn AnyKernel]) -> Result<()> {
        self.backend.prepare(kernels)
    }

    /// Runs `f`, waits for the device, and returns every kernel that ran meanwhile, also within graphs, in the order of
    /// their starts. Watching costs time on the host and between kernels, so `f` is not to be timed.
    ///
    /// # Errors
    /// [`Error::Trace`] on the host device, and without CUPTI, which comes with the CUDA toolkit; the first error of
    /// the work waited for.
    ///
    /// # Example
    /// ```
    /// use bcg_runtime::{Device, Error};
    /// assert!(matches!(Device::host().trace_kernels(|| 1), Err(Error::Trace(_))));
    /// ```
    pub fn trace_kernels<R>(&self, f: impl FnOnce() -> R) -> Result<(R, Vec<KernelRun>)> {
        let (result, trace) = self.trace(false, f)?;
        Ok((result, trace.runs))
    }

    /// As [`Device::trace_kernels`], and with `with_calls` also when each kernel was launched, which costs the host
    /// more.
    pub(crate) fn trace<R>(&self, with_calls: bool, f: impl FnOnce() -> R) -> Result<(R, KernelTrace)> {
        let (mut f, mut result) = (Some(f), None);
        self.synchronize()?;
        let trace = self.backend.trace_kernels(with_calls, &mut || {
            result = f.take().map(|f| f());
            self.synchronize()
        })?;
        let result = result.ok_or_else(|| Error::Trace("the device did not run what was to be traced".to_owned()))?;
        Ok((result, trace))
    }

    /// Returns the stream of the device itself, on which its own reads, writes and fills run.
    pub(crate) fn own_stream(&self) -> Result<StreamRef<'_>> {
        self.own_stream.get()
    }

    pub(crate) fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    pub(crate) fn counters(&self) -> &guard::Counters {
        &self.shared.counters
    }

    /// Refuses all allocations but those of arenas until [`Device::unseal`].
    pub(crate) fn seal(&self) {
        self.shared.num_seals.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn unseal(&self) {
        self.shared.num_seals.fetch_sub(1, Ordering::Relaxed);
    }

    /// # Errors
    /// [`Error::Sealed`] while the device is sealed.
    pub(super) fn check_unsealed(&self) -> Result<()> {
        match self.shared.num_seals.load(Ordering::Relaxed) {
            0 => Ok(()),
            _ => Err(Error::Sealed { device: self.name().to_owned() }),
        }
    }

    fn holds(&self) -> &watch::Holds {
        &self.shared.holds
    }

    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.name())
    }
}
