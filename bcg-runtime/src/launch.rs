//! Kernel + geometry + argument bytes: the one description of a launch.
//!
//! Eager runs, captures, work lists and the host device all use this description, so it holds everything that a
//! launch needs and nothing that a device adds. A kernel takes one `#[repr(C)]` argument struct by value.
//!
//! Invariants, on which the host device's reading of argument bytes rests:
//! - The bytes of a [`Launch`] are those of its kernel's argument struct: both are set together, from one typed call.
//! - Safe code makes no address: a [`DevicePtr`] comes from the device's memory.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::compile::{ArgStruct, ArgType, ArgValue, KernelArgs, Source};
use crate::device::host::HostMemory;
use crate::{DevicePtr, Result};

/// The largest argument struct of a kernel, in bytes.
pub const ARG_BYTES_MAX: usize = 256;

/// Where the arguments of a collective say which segment it is captured in: the offset of
/// [`CommunicatorArgs::segment`](crate::CommunicatorArgs), with which they begin.
pub(crate) const SEGMENT_AT: usize = 108;

/// The number of different kernels that one process may launch.
pub(crate) const KERNELS_MAX: usize = 1024;

// SAFETY: an address is a `u64` here, and a pointer of 8 bytes in CUDA; it is one of the device, not of the host.
unsafe impl ArgValue for DevicePtr {
    const TYPE: ArgType = ArgType::pointer();
}

/// Returns the bytes of an argument struct, as the kernel takes them.
pub(crate) fn bytes_of<A: KernelArgs>(args: &A) -> &[u8] {
    // SAFETY: the pointer and the length are those of `args`, which lives as long as the slice; by the contract of
    // `KernelArgs` no byte of it is padding, and it holds no cell, since it is `Copy`, whose bytes could change.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(args).cast(), size_of::<A>()) }
}

/// The geometry of a launch.
///
/// # Example
/// ```
/// use bcg_runtime::Dims;
/// assert_eq!(Dims::per_item(1000, 256), Dims { grid: [4, 1, 1], block: [256, 1, 1], shared_bytes: 0 });
/// assert!(Dims::per_item(0, 256).is_empty());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Dims {
    /// Thread blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y, z.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
}

impl Dims {
    /// Makes a one-dimensional geometry without dynamic shared memory.
    pub const fn linear(grid: u32, block: u32) -> Self {
        Self { grid: [grid, 1, 1], block: [block, 1, 1], shared_bytes: 0 }
    }

    /// Makes the one-dimensional geometry with one thread for each of `items`, in blocks of `block` threads. More items
    /// than a grid has blocks for give a grid that the device refuses.
    pub const fn per_item(items: usize, block: u32) -> Self {
        let blocks = (items as u64).div_ceil(block as u64);
        Self::linear(if blocks > u32::MAX as u64 { u32::MAX } else { blocks as u32 }, block)
    }

    /// Tells whether the geometry holds no thread; such a launch is skipped, since CUDA refuses it.
    pub fn is_empty(&self) -> bool {
        self.grid.contains(&0) || self.block.contains(&0)
    }
}

/// A kernel's host reference: does on the host device what the CUDA source does on a GPU.
pub type HostFn<A> = fn(&A, &Dims, &HostMemory<'_>) -> Result<()>;

/// What each rank gave to a collective, in the order of the ranks.
pub type Given = [Arc<[u8]>];

/// The host reference of a kernel through which the ranks of a world meet, in its two halves. As on GPUs, a rank's memory
/// is touched by that rank alone, and what others need of it is sent.
pub struct RanksFn<A> {
    /// Returns what this rank sends to all.
    pub give: fn(&A, &Dims, &HostMemory<'_>) -> Result<Vec<u8>>,
    /// Runs when every rank has sent; the slice holds what each sent, in the order of the ranks.
    pub take: fn(&A, &Dims, &Given, &HostMemory<'_>) -> Result<()>,
}

impl<A> Clone for RanksFn<A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A> Copy for RanksFn<A> {}

impl<A> fmt::Debug for RanksFn<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RanksFn(..)")
    }
}

/// What stands for a kernel on the host device.
enum HostReference<A> {
    One(HostFn<A>),
    Ranks(RanksFn<A>),
}

/// A kernel: its CUDA source and its host reference, under one entry name.
///
/// # Example
/// ```
/// use bcg_runtime::{Device, DevicePtr, Dims, HostMemory, Kernel, KernelArgs, Result, Runner, RunnerOptions, Source};
///
/// #[repr(C)]
/// #[derive(Clone, Copy, KernelArgs)]
/// struct DoubleArgs {
///     #[points_to(const f32)]
///     x: DevicePtr,
///     #[points_to(f32)]
///     out: DevicePtr,
///     len: u64,
/// }
///
/// static SOURCE: Source = Source::new("double.cu", r#"
/// #include "args.cuh"
/// extern "C" __global__ void double_f32(DoubleArgs a) {
///     unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
///     if (i < a.len) a.out[i] = 2.0f * a.x[i];
/// }"#).takes::<DoubleArgs>();
///
/// fn host(a: &DoubleArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
///     let x = memory.view::<f32>(a.x, a.len as usize)?;
///     let out = memory.view::<f32>(a.out, a.len as usize)?;
///     out.iter().zip(x).for_each(|(o, x)| o.set(2.0 * x.get()));
///     Ok(())
/// }
///
/// // SAFETY: the only launch, below, gives two tensors of `len` elements; no thread goes beyond `len`.
/// static DOUBLE: Kernel<DoubleArgs> = unsafe { Kernel::new("double_f32", &SOURCE, host) };
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let x = device.tensor(&[3], &[1.0f32, 2.0, 3.0])?;
/// let doubled = runner.eager(&(), |cx| {
///     let out = cx.empty(&[3], x.dtype())?;
///     let args = DoubleArgs { x: cx.addr(&x)?, out: cx.addr(&out)?, len: 3 };
///     cx.launch(&DOUBLE, Dims::per_item(3, 128), args)?;
///     Ok(out)
/// })?;
/// assert_eq!(runner.read::<f32>(&doubled)?, [2.0, 4.0, 6.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub struct Kernel<A: KernelArgs> {
    name: &'static str,
    source: &'static Source,
    host: HostReference<A>,
    id: KernelId,
    is_programmatic: bool,
}

impl<A: KernelArgs> Kernel<A> {
    /// Names a kernel by its `extern "C"` entry point, its CUDA source and its host reference.
    ///
    /// A launch is safe code, so the declaration of a kernel is the promise that all its launches rest on: write a
    /// `// SAFETY:` comment that names the checks it rests on, and keep the kernel private to the code that makes them.
    ///
    /// # Safety
    /// - The CUDA source touches only memory that its arguments give it, within what the shapes allow that the code which
    ///   launches it has checked, whatever the contents of that memory.
    /// - If the kernel is [`programmatic`](Self::programmatic), no thread touches memory that an earlier kernel of the stream
    ///   reads or writes before it has waited.
    /// - `host` writes what the source writes, and nothing else.
    ///
    /// # Panics
    /// At compile time, in a `static`, if `source` does not list `A`; see [`Source::takes`].
    pub const unsafe fn new(name: &'static str, source: &'static Source, host: HostFn<A>) -> Self {
        Self::with_host(name, source, HostReference::One(host))
    }

    /// Names a kernel through which the ranks of a world meet: it ends on no rank before every rank has come to it. Its
    /// argument struct begins with [`CommunicatorArgs`](crate::CommunicatorArgs), and only
    /// [`OpStream::launch_collective`](crate::OpStream::launch_collective) launches it.
    ///
    /// # Safety
    /// As [`Kernel::new`]; of other ranks' memory, the source touches their planes only.
    ///
    /// # Panics
    /// As [`Kernel::new`].
    pub const unsafe fn collective(name: &'static str, source: &'static Source, host: RanksFn<A>) -> Self {
        Self::with_host(name, source, HostReference::Ranks(host))
    }

    const fn with_host(name: &'static str, source: &'static Source, host: HostReference<A>) -> Self {
        const { assert!(size_of::<A>() <= ARG_BYTES_MAX, "the argument struct is larger than ARG_BYTES_MAX") }
        assert!(
            source.lists(A::STRUCT),
            "the source does not list this kernel's argument struct: add `.takes::<A>()` to the `Source`"
        );
        Self { name, source, host, id: KernelId::new(), is_programmatic: false }
    }

    /// Lets the kernel start while the kernel before it still runs (programmatic dependent launch, Hopper and newer).
    ///
    /// Only for a source in which every thread waits for the kernel before (`wait_for_inputs()` of `bcg.cuh`) ahead of
    /// its first access to memory that an earlier kernel of the stream reads or writes.
    #[must_use]
    pub const fn programmatic(self) -> Self {
        Self { is_programmatic: true, ..self }
    }

    /// Returns the entry point's name.
    pub const fn name(&self) -> &'static str {
        self.name
    }
}

impl<A: KernelArgs> fmt::Debug for Kernel<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel").field("name", &self.name).field("source", &self.source.name).finish_non_exhaustive()
    }
}

/// A [`Kernel`] whose argument type is erased.
pub trait AnyKernel: Send + Sync + fmt::Debug {
    /// Returns the entry point's name.
    fn name(&self) -> &'static str;
    /// Returns the CUDA source.
    fn source(&self) -> &'static Source;
    /// Returns the kernel's index in this process, below the number of kernels launched so far.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`] if the process launches more different kernels than the runtime has room for.
    fn index(&self) -> Result<usize>;
    /// Tells whether the kernel may start while the kernel before it still runs; see [`Kernel::programmatic`].
    fn is_programmatic(&self) -> bool;
    /// Tells whether the ranks of a world meet in the kernel; see [`Kernel::collective`].
    fn is_collective(&self) -> bool;
    /// Returns the kernel's argument struct.
    #[doc(hidden)]
    fn arg_struct(&self) -> &'static ArgStruct;
    /// Runs the host reference; of a collective, the half that takes what all ranks `gave`.
    ///
    /// # Safety
    /// `args` are the bytes of an argument struct of this kernel's type.
    ///
    /// # Errors
    /// Those of the host reference.
    #[doc(hidden)]
    unsafe fn run_host(&self, args: &ArgBytes, dims: &Dims, gave: &Given, memory: &HostMemory<'_>) -> Result<()>;
    /// Returns what a rank gives to all others; nothing for a kernel that is no collective.
    ///
    /// # Safety
    /// As [`AnyKernel::run_host`].
    ///
    /// # Errors
    /// Those of the host reference.
    #[doc(hidden)]
    unsafe fn give_host(&self, args: &ArgBytes, dims: &Dims, memory: &HostMemory<'_>) -> Result<Vec<u8>>;
}

impl<A: KernelArgs> AnyKernel for Kernel<A> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn source(&self) -> &'static Source {
        self.source
    }

    fn index(&self) -> Result<usize> {
        self.id.get(self.name)
    }

    fn is_programmatic(&self) -> bool {
        self.is_programmatic
    }

    fn arg_struct(&self) -> &'static ArgStruct {
        A::STRUCT
    }

    fn is_collective(&self) -> bool {
        matches!(self.host, HostReference::Ranks(_))
    }

    unsafe fn run_host(&self, args: &ArgBytes, dims: &Dims, gave: &Given, memory: &HostMemory<'_>) -> Result<()> {
        // SAFETY: the caller's promise.
        let args = unsafe { args.read::<A>() };
        match &self.host {
            HostReference::One(host) => host(&args, dims, memory),
            HostReference::Ranks(host) => (host.take)(&args, dims, gave, memory),
        }
    }

    unsafe fn give_host(&self, args: &ArgBytes, dims: &Dims, memory: &HostMemory<'_>) -> Result<Vec<u8>> {
        match &self.host {
            HostReference::One(_) => Ok(Vec::new()),
            // SAFETY: the caller's promise.
            HostReference::Ranks(host) => (host.give)(&unsafe { args.read::<A>() }, dims, memory),
        }
    }
}

/// A kernel's index, given out at its first launch.
struct KernelId(AtomicU32);

static NEXT_KERNEL: AtomicU32 = AtomicU32::new(1);

impl KernelId {
    const fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    fn get(&self, name: &str) -> Result<usize> {
        let mut id = self.0.load(Ordering::Acquire);
        if id == 0 {
            let fresh = NEXT_KERNEL.fetch_add(1, Ordering::Relaxed);
            id = match self.0.compare_exchange(0, fresh, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => fresh,
                Err(winner) => winner,
            };
        }
        let index = id as usize - 1;
        if index >= KERNELS_MAX {
            let message = format!("more than {KERNELS_MAX} different kernels in one process");
            return Err(crate::Error::Kernel { kernel: name.to_owned(), message });
        }
        Ok(index)
    }
}

/// The bytes of an argument struct, inline, so that a launch on a work list needs no allocation.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub struct ArgBytes {
    bytes: [u8; ARG_BYTES_MAX],
    len: u16,
}

impl ArgBytes {
    fn new(source: &[u8]) -> Self {
        let mut args = Self { bytes: [0; ARG_BYTES_MAX], len: 0 };
        args.set(source);
        args
    }

    /// Takes over other bytes, at most [`ARG_BYTES_MAX`].
    pub(crate) fn set(&mut self, source: &[u8]) {
        self.bytes[..source.len()].copy_from_slice(source);
        self.len = source.len() as u16;
    }

    /// Returns the argument struct's bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// Returns the argument struct.
    ///
    /// # Safety
    /// The bytes are those of an `A`.
    unsafe fn read<A: KernelArgs>(&self) -> A {
        assert_eq!(self.as_slice().len(), size_of::<A>(), "the bytes of another argument struct");
        // SAFETY: the caller promises that these are the bytes of an `A`, all of them by the line above; `A` is `Copy`.
        unsafe { self.as_slice().as_ptr().cast::<A>().read_unaligned() }
    }
}

impl fmt::Debug for ArgBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len)
    }
}

/// One launch, complete: what a device needs to run it now, to capture it, or to run it later.
#[derive(Clone, Debug)]
pub(crate) struct Launch {
    pub(crate) kernel: &'static dyn AnyKernel,
    pub(crate) dims: Dims,
    /// The argument struct of `kernel`.
    pub(crate) args: ArgBytes,
    /// Where a collective meets the other ranks, as the backend numbers it; `None` for other kernels.
    pub(crate) plane: Option<PlaneId>,
}

/// A communicator's number among those of its device's backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlaneId(pub(crate) u32);

impl Launch {
    /// Describes a launch of `kernel` with `args`.
    pub(crate) fn new<A: KernelArgs>(kernel: &'static Kernel<A>, dims: Dims, args: &A) -> Self {
        Self::from_bytes(kernel, dims, bytes_of(args))
    }

    /// As [`Launch::new`], with the bytes of the kernel's argument struct.
    pub(crate) fn from_bytes(kernel: &'static dyn AnyKernel, dims: Dims, args: &[u8]) -> Self {
        Self { kernel, dims, args: ArgBytes::new(args), plane: None }
    }

    /// Returns the name of its kernel.
    pub(crate) fn name(&self) -> &'static str {
        self.kernel.name()
    }

    /// Returns the segment that a collective is captured in; its arguments hold it.
    pub(crate) fn segment(&self) -> Option<usize> {
        let bytes = self.args.as_slice().get(SEGMENT_AT..)?.first_chunk()?;
        u32::from_ne_bytes(*bytes).checked_sub(1).map(|segment| segment as usize)
    }

    /// Returns the first address among its arguments that its kernel may write to.
    pub(crate) fn output(&self) -> Option<DevicePtr> {
        self.kernel.arg_struct().first_output(self.args.as_slice()).map(DevicePtr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KernelArgs;

    #[repr(C)]
    #[derive(Clone, Copy, KernelArgs)]
    struct NopArgs {
        value: u32,
        x: [u16; 2],
    }

    static SOURCE: Source = Source::new("nop.cu", "").takes::<NopArgs>();
    // SAFETY: the source has no kernel, and the host reference does nothing.
    static NOP: Kernel<NopArgs> = unsafe { Kernel::new("nop", &SOURCE, |_, _, _| Ok(())) };

    #[test]
    fn a_grid_for_too_many_items_is_too_large_and_not_a_small_one() {
        let grid = |items| Dims::per_item(items, 128).grid[0];
        assert_eq!([grid(0), grid(1), grid(129), grid(128 << 30)], [0, 1, 2, 1 << 30]);
        assert_eq!(
            [grid(128 << 32), grid((128 << 32) + 1), grid(usize::MAX)],
            [u32::MAX; 3],
            "2^32 blocks are not none"
        );
    }

    #[test]
    fn a_launch_holds_the_bytes_of_its_arguments() {
        let launch = Launch::new(&NOP, Dims::linear(1, 32), &NopArgs { value: 7, x: [1, 2] });
        assert_eq!(launch.kernel.name(), "nop");
        assert_eq!(launch.args.as_slice(), [7u32.to_ne_bytes(), (1u32 | 2 << 16).to_le_bytes()].concat());
    }
}
