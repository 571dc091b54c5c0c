//! What a device tells about itself, its memory and the kernels that it ran.

use std::time::Instant;

/// The two kinds of device.
///
/// # Example
/// ```
/// use bcg_runtime::{Device, DeviceKind};
/// assert_eq!(Device::host().kind(), DeviceKind::Host);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// The emulated device: runs anywhere, stricter than CUDA, the oracle of every test.
    Host,
    /// An NVIDIA GPU.
    Cuda,
}

/// A device's memory, in bytes.
///
/// # Example
/// ```
/// let memory = bcg_runtime::Device::host().memory_info()?;
/// assert!(memory.free_bytes <= memory.total_bytes);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Bytes that are free now.
    pub free_bytes: usize,
    /// Bytes of the whole device.
    pub total_bytes: usize,
}

/// One kernel that a device ran; see [`Device::trace_kernels`](crate::Device::trace_kernels). Times are in nanoseconds,
/// of one clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelRun {
    /// The kernel's entry point, as the compiler named it.
    pub name: String,
    /// When the kernel began. A kernel that was launched early, before its predecessor ended, has begun then.
    pub start_ns: u64,
    /// When the kernel had ended.
    pub end_ns: u64,
    /// The number that the driver gave to the stream that the kernel ran on.
    pub stream_id: u32,
    /// The GPU's number, as in `cuda:0`.
    pub device_id: u32,
    /// The middle of the host's call that launched it, or the graph that it is part of; known where calls are traced
    /// too.
    pub launch_ns: Option<u64>,
}

/// What a device saw while its kernels were traced.
#[derive(Debug)]
pub(crate) struct KernelTrace {
    /// The kernels, in the order of their starts.
    pub(crate) runs: Vec<KernelRun>,
    /// One moment on the host's clock and on that of `runs`.
    pub(crate) clock: (Instant, u64),
}
