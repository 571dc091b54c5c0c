//! The raw driver: the only place that calls CUDA.
//!
//! [`Driver`] holds the entry points, found once in the library that cudarc loads; each has one wrapper that turns a
//! result code into [`Error::Driver`] with the code's name.
//!
//! The entry points are not called through cudarc's own functions, for two reasons. Those return the code as a closed
//! Rust enum, and a code that a newer driver has added (402, 721 or 916 with CUDA 13) would be undefined behaviour;
//! here a code is a `u32`. And those panic if a symbol is missing; here that is [`Error::NoDevice`].
//!
//! Every symbol is exported under this exact name by drivers from CUDA 12.4 to 13.x. Symbols whose unversioned name
//! changed its meaning in 13.0 (`cuGraphAddDependencies`, `cuStreamGetCaptureInfo`, `cuCtxCreate`) are not used.
//!
//! A wrapper is safe where the driver checks its arguments, or where the contract of
//! [`traits`](crate::device::traits) settles it: a handle was made by this backend and is alive, an address range was
//! checked against its tensor. Wrappers that take the host's memory are unsafe.

use std::ffi::{CStr, c_char, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys;

use crate::op::RowCopy;
use crate::{Error, Result};

// Handles are opaque pointers that travel as `u64`: the same size, and passed in the same register.
const _: () = assert!(size_of::<usize>() == 8, "the driver's handles are passed as 64-bit numbers");

/// The oldest driver that is known to have all entry points: CUDA 12.4.
const DRIVER_VERSION_MIN: i32 = 12_040;

pub(super) const OUT_OF_MEMORY: i32 = 2;
pub(super) const NOT_FOUND: i32 = 500;
const GRAPH_EXEC_UPDATE_FAILURE: i32 = 910;
pub(super) const CAPTURE_INVALIDATED: u32 = 901;

const CAPTURE_MODE_THREAD_LOCAL: u32 = 1;
const CAPTURE_MODE_RELAXED: u32 = 2;

macro_rules! driver {
    ($($symbol:ident($($arg:ty),*);)*) => {
        /// The driver's entry points.
        #[allow(non_snake_case)] // the fields carry the driver's own names
        pub(super) struct Driver {
            $($symbol: unsafe extern "C" fn($($arg),*) -> u32,)*
        }

        impl Driver {
            fn load() -> Result<Self, String> {
                // SAFETY: loading libcuda runs its initialisers, which any CUDA program runs; the check unloads it
                // again.
                if !unsafe { sys::is_culib_present() } {
                    return Err("libcuda.so.1 cannot be loaded (no NVIDIA driver is installed, or it is not on the library path)".into());
                }
                // SAFETY: as above; the library was present on the line above, so this does not panic.
                let library = unsafe { sys::culib() };
                Ok(Self { $($symbol: {
                    // SAFETY: the signature is that of the symbol in cuda.h, and the library is never unloaded.
                    let found = unsafe {
                        library.get::<unsafe extern "C" fn($($arg),*) -> u32>(concat!(stringify!($symbol), "\0").as_bytes())
                    };
                    *found.map_err(|_| concat!("the driver has no ", stringify!($symbol), "; one for CUDA 12.4 or newer is needed"))?
                },)* })
            }

            /// Makes a driver of which every call fails with `CODE`.
            #[cfg(test)]
            pub(super) fn refusing<const CODE: u32>() -> Self {
                Self { $($symbol: {
                    unsafe extern "C" fn refuse<const CODE: u32>($(_: $arg),*) -> u32 {
                        CODE
                    }
                    refuse::<CODE>
                },)* }
            }
        }
    };
}

driver! {
    cuInit(u32);
    cuDriverGetVersion(*mut i32);
    cuGetErrorName(u32, *mut *const c_char);
    cuDeviceGetCount(*mut i32);
    cuDeviceGet(*mut i32, i32);
    cuDeviceGetName(*mut c_char, i32, i32);
    cuDeviceGetAttribute(*mut i32, u32, i32);
    cuDevicePrimaryCtxRetain(*mut u64, i32);
    cuCtxSetCurrent(u64);
    cuCtxSynchronize();
    cuThreadExchangeStreamCaptureMode(*mut u32);
    cuMemGetInfo_v2(*mut usize, *mut usize);
    cuMemAlloc_v2(*mut u64, usize);
    cuMemFree_v2(u64);
    cuMemHostAlloc(*mut *mut c_void, usize, u32);
    cuMemFreeHost(*mut c_void);
    cuMemAddressReserve(*mut u64, usize, usize, u64, u64);
    cuMemAddressFree(u64, usize);
    cuMemGetAllocationGranularity(*mut usize, *const sys::CUmemAllocationProp, u32);
    cuMemCreate(*mut u64, usize, *const sys::CUmemAllocationProp, u64);
    cuMemRelease(u64);
    cuMemMap(u64, usize, usize, u64, u64);
    cuMemUnmap(u64, usize);
    cuMemSetAccess(u64, usize, *const sys::CUmemAccessDesc, usize);
    cuPointerGetAttributes(u32, *const u32, *mut *mut c_void, u64);
    cuMemcpyDtoDAsync_v2(u64, u64, usize, u64);
    cuMemcpyHtoDAsync_v2(u64, *const c_void, usize, u64);
    cuMemcpyDtoHAsync_v2(*mut c_void, u64, usize, u64);
    cuMemcpy2DAsync_v2(*const sys::CUDA_MEMCPY2D, u64);
    cuMemsetD8Async(u64, u8, usize, u64);
    cuMemsetD32Async(u64, u32, usize, u64);
    cuStreamCreate(*mut u64, u32);
    cuStreamDestroy_v2(u64);
    cuStreamSynchronize(u64);
    cuStreamWaitEvent(u64, u64, u32);
    cuStreamBeginCapture_v2(u64, u32);
    cuStreamEndCapture(u64, *mut u64);
    cuStreamIsCapturing(u64, *mut u32);
    cuEventCreate(*mut u64, u32);
    cuEventElapsedTime(*mut f32, u64, u64);
    cuEventDestroy_v2(u64);
    cuEventRecord(u64, u64);
    cuEventSynchronize(u64);
    cuGraphCreate(*mut u64, u32);
    cuGraphGetEdges_v2(u64, *mut u64, *mut u64, *mut sys::CUgraphEdgeData, *mut usize);
    cuGraphAddDependencies_v2(u64, *const u64, *const u64, *const sys::CUgraphEdgeData, usize);
    cuGraphAddKernelNode_v2(*mut u64, u64, *const u64, usize, *const sys::CUDA_KERNEL_NODE_PARAMS);
    cuGraphAddMemcpyNode(*mut u64, u64, *const u64, usize, *const sys::CUDA_MEMCPY3D, sys::CUcontext);
    cuGraphAddMemsetNode(*mut u64, u64, *const u64, usize, *const sys::CUDA_MEMSET_NODE_PARAMS, sys::CUcontext);
    cuGraphAddEmptyNode(*mut u64, u64, *const u64, usize);
    cuGraphKernelNodeGetParams_v2(u64, *mut sys::CUDA_KERNEL_NODE_PARAMS);
    cuGraphKernelNodeCopyAttributes(u64, u64);
    cuGraphMemcpyNodeGetParams(u64, *mut sys::CUDA_MEMCPY3D);
    cuGraphMemsetNodeGetParams(u64, *mut sys::CUDA_MEMSET_NODE_PARAMS);
    cuGraphExecKernelNodeSetParams_v2(u64, u64, *const sys::CUDA_KERNEL_NODE_PARAMS);
    cuGraphExecMemcpyNodeSetParams(u64, u64, *const sys::CUDA_MEMCPY3D, sys::CUcontext);
    cuGraphExecMemsetNodeSetParams(u64, u64, *const sys::CUDA_MEMSET_NODE_PARAMS, sys::CUcontext);
    cuGraphGetNodes(u64, *mut u64, *mut usize);
    cuGraphNodeGetType(u64, *mut u32);
    cuGraphInstantiateWithFlags(*mut u64, u64, u64);
    cuGraphExecUpdate_v2(u64, u64, *mut sys::CUgraphExecUpdateResultInfo);
    cuGraphLaunch(u64, u64);
    cuGraphDestroy(u64);
    cuGraphExecDestroy(u64);
    cuModuleLoadData(*mut u64, *const c_void);
    cuModuleUnload(u64);
    cuModuleGetFunction(*mut u64, u64, *const c_char);
    cuFuncLoad(u64);
    cuFuncGetParamInfo(u64, usize, *mut usize, *mut usize);
    cuFuncGetAttribute(*mut i32, u32, u64);
    cuFuncSetAttribute(u64, u32, i32);
    cuLaunchKernelEx(*const sys::CUlaunchConfig, u64, *mut *mut c_void, *mut *mut c_void);
}

/// Calls an entry point and checks its code. The caller writes the `unsafe` and its proof.
macro_rules! call {
    ($driver:ident.$symbol:ident($($arg:expr),* $(,)?)) => {
        $driver.check(stringify!($symbol), ($driver.$symbol)($($arg),*))
    };
}

pub(super) mod nodes;

impl Driver {
    /// Returns the initialised driver of this process.
    ///
    /// # Errors
    /// [`Error::NoDevice`] if there is none or it is older than CUDA 12.4; the same error at each call.
    pub(super) fn get() -> Result<&'static Self> {
        static DRIVER: OnceLock<Result<Driver, String>> = OnceLock::new();
        let driver = DRIVER.get_or_init(|| {
            let driver = Self::load()?;
            driver.init().map_err(|error| error.to_string())?;
            let version = driver.version().map_err(|error| error.to_string())?;
            check_version(version)?;
            Ok(driver)
        });
        driver.as_ref().map_err(|why| Error::NoDevice(why.clone()))
    }

    fn check(&self, call: &'static str, code: u32) -> Result<()> {
        if code == 0 { Ok(()) } else { Err(self.error(call, code)) }
    }

    #[cold]
    pub(super) fn error(&self, call: &'static str, code: u32) -> Error {
        let mut name = std::ptr::null();
        // SAFETY: `name` is writable; the driver accepts any code and sets null for one that it does not know.
        let known = unsafe { (self.cuGetErrorName)(code, &raw mut name) } == 0 && !name.is_null();
        let name = if known {
            // SAFETY: not null (line above); the driver's names are static C strings.
            unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
        } else {
            "a code that the driver has no name for".to_owned()
        };
        Error::driver(call, code.cast_signed(), name)
    }

    fn init(&self) -> Result<()> {
        // SAFETY: takes no memory of ours; 0 is the only legal value.
        unsafe { call!(self.cuInit(0)) }
    }

    fn version(&self) -> Result<i32> {
        let mut version = 0;
        // SAFETY: the out-pointer is writable for the call.
        unsafe { call!(self.cuDriverGetVersion(&raw mut version)) }?;
        Ok(version)
    }
}

fn check_version(version: i32) -> Result<(), String> {
    if version >= DRIVER_VERSION_MIN {
        return Ok(());
    }
    let (major, minor) = (version / 1000, version % 1000 / 10);
    Err(format!("the driver supports CUDA {major}.{minor}, but 12.4 or newer is needed; update the NVIDIA driver"))
}

/// Devices and contexts.
impl Driver {
    pub(super) fn device_count(&self) -> Result<i32> {
        let mut count = 0;
        // SAFETY: the out-pointer is writable for the call.
        unsafe { call!(self.cuDeviceGetCount(&raw mut count)) }?;
        Ok(count)
    }

    pub(super) fn device(&self, ordinal: i32) -> Result<i32> {
        let mut device = 0;
        // SAFETY: the out-pointer is writable for the call; the driver checks the ordinal.
        unsafe { call!(self.cuDeviceGet(&raw mut device, ordinal)) }?;
        Ok(device)
    }

    pub(super) fn device_name(&self, device: i32) -> Result<String> {
        let mut name = [0u8; 128];
        // SAFETY: `name` is writable for the length passed; the driver writes a terminated string within it.
        unsafe { call!(self.cuDeviceGetName(name.as_mut_ptr().cast(), 128, device)) }?;
        let name = CStr::from_bytes_until_nul(&name).unwrap_or(c"unnamed device");
        Ok(name.to_string_lossy().into_owned())
    }

    pub(super) fn attribute(&self, device: i32, attribute: sys::CUdevice_attribute) -> Result<i32> {
        let mut value = 0;
        // SAFETY: the out-pointer is writable for the call.
        unsafe { call!(self.cuDeviceGetAttribute(&raw mut value, attribute as u32, device)) }?;
        Ok(value)
    }

    pub(super) fn retain_primary_context(&self, device: i32) -> Result<u64> {
        let mut context = 0;
        // SAFETY: the out-pointer is writable for the call.
        unsafe { call!(self.cuDevicePrimaryCtxRetain(&raw mut context, device)) }?;
        Ok(context)
    }

    pub(super) fn set_current(&self, context: u64) -> Result<()> {
        // SAFETY: the context is a primary one that this process never releases (`CudaBackend::open`).
        unsafe { call!(self.cuCtxSetCurrent(context)) }
    }

    pub(super) fn synchronize_context(&self) -> Result<()> {
        // SAFETY: takes no arguments.
        unsafe { call!(self.cuCtxSynchronize()) }
    }

    /// Lets the calling thread make calls that a capture of this thread forbids, such as loading a module.
    pub(super) fn relax(&'static self) -> Result<Relaxed> {
        let previous = self.exchange_capture_mode(CAPTURE_MODE_RELAXED)?;
        Ok(Relaxed { driver: self, previous, not_send: std::marker::PhantomData })
    }

    fn exchange_capture_mode(&self, mut mode: u32) -> Result<u32> {
        // SAFETY: `mode` is readable and writable for the call.
        unsafe { call!(self.cuThreadExchangeStreamCaptureMode(&raw mut mode)) }?;
        Ok(mode)
    }
}

/// Restores the calling thread's capture mode when dropped.
#[must_use]
pub(super) struct Relaxed {
    driver: &'static Driver,
    previous: u32,
    /// The mode belongs to the thread.
    not_send: std::marker::PhantomData<*const ()>,
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        if let Err(error) = self.driver.exchange_capture_mode(self.previous) {
            tracing::warn!(%error, "cannot restore the thread's capture mode");
        }
    }
}

fn location(device: i32) -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: device }
}

fn allocation_prop(device: i32) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
        location: location(device),
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

/// Memory.
impl Driver {
    pub(super) fn memory_info(&self) -> Result<(usize, usize)> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: both out-pointers are writable for the call.
        unsafe { call!(self.cuMemGetInfo_v2(&raw mut free, &raw mut total)) }?;
        Ok((free, total))
    }

    pub(super) fn alloc(&self, bytes: usize) -> Result<u64> {
        let mut ptr = 0;
        // SAFETY: the out-pointer is writable for the call.
        unsafe { call!(self.cuMemAlloc_v2(&raw mut ptr, bytes)) }?;
        Ok(ptr)
    }

    pub(super) fn free(&self, ptr: u64) -> Result<()> {
        // SAFETY: `ptr` came from `alloc` and is freed once: the guard `Allocation` frees in its `Drop` only.
        unsafe { call!(self.cuMemFree_v2(ptr)) }
    }

    pub(super) fn alloc_pinned(&self, bytes: usize) -> Result<u64> {
        let mut ptr = std::ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: the out-pointer is writable for the call.
        unsafe { call!(self.cuMemHostAlloc(&raw mut ptr, bytes, flags)) }?;
        Ok(ptr.expose_provenance() as u64)
    }

    pub(super) fn free_pinned(&self, ptr: u64) -> Result<()> {
        let ptr = std::ptr::with_exposed_provenance_mut(ptr as usize);
        // SAFETY: `ptr` came from `alloc_pinned` and is freed once: the guard `PinnedBuffer` frees in its `Drop` only.
        unsafe { call!(self.cuMemFreeHost(ptr)) }
    }

    pub(super) fn reserve(&self, bytes: usize) -> Result<u64> {
        let mut base = 0;
        // SAFETY: the out-pointer is writable for the call; alignment 0 and address 0 leave both to the driver.
        unsafe { call!(self.cuMemAddressReserve(&raw mut base, bytes, 0, 0, 0)) }?;
        Ok(base)
    }

    pub(super) fn unreserve(&self, base: u64, bytes: usize) -> Result<()> {
        // SAFETY: the range is a whole reservation without mappings: `Reservation::drop` unmaps all, then calls this
        // once.
        unsafe { call!(self.cuMemAddressFree(base, bytes)) }
    }

    pub(super) fn granularity(&self, device: i32) -> Result<usize> {
        let mut bytes = 0;
        let prop = allocation_prop(device);
        let option = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED as u32;
        // SAFETY: `prop` is readable and the out-pointer writable for the call.
        unsafe { call!(self.cuMemGetAllocationGranularity(&raw mut bytes, &raw const prop, option)) }?;
        Ok(bytes)
    }

    pub(super) fn create_memory(&self, device: i32, bytes: usize) -> Result<u64> {
        let mut memory = 0;
        let prop = allocation_prop(device);
        // SAFETY: `prop` is readable and the out-pointer writable for the call.
        unsafe { call!(self.cuMemCreate(&raw mut memory, bytes, &raw const prop, 0)) }?;
        Ok(memory)
    }

    pub(super) fn release_memory(&self, memory: u64) -> Result<()> {
        // SAFETY: `memory` came from `create_memory` and is released once, by `MemoryBackend::map` on all its paths.
        unsafe { call!(self.cuMemRelease(memory)) }
    }

    pub(super) fn map(&self, ptr: u64, bytes: usize, memory: u64) -> Result<()> {
        // SAFETY: the range lies in a reservation (`Reservation::grow` compares it with the end); the driver checks
        // that nothing is mapped there.
        unsafe { call!(self.cuMemMap(ptr, bytes, 0, memory, 0)) }
    }

    pub(super) fn unmap(&self, ptr: u64, bytes: usize) -> Result<()> {
        // SAFETY: one call of `map` mapped exactly this range, and no enqueued work still uses it: the callers in
        // `memory.rs` wait for the device, or the mapping was never given out.
        unsafe { call!(self.cuMemUnmap(ptr, bytes)) }
    }

    pub(super) fn set_access(&self, ptr: u64, bytes: usize, device: i32) -> Result<()> {
        let flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        let access = sys::CUmemAccessDesc { location: location(device), flags };
        // SAFETY: `access` is readable for the call and its count is 1; the range was mapped just before.
        unsafe { call!(self.cuMemSetAccess(ptr, bytes, &raw const access, 1)) }
    }

    /// Tells whether a host address lies in memory that CUDA has page-locked or manages.
    pub(super) fn is_page_locked(&self, ptr: *const u8) -> bool {
        let mut memory_type = 0u32;
        let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE as u32;
        let mut data: *mut c_void = (&raw mut memory_type).cast();
        // The plural call answers 0 for an address that CUDA does not know; the singular one fails.
        // SAFETY: one attribute, a 32-bit number with a writable out-pointer; `ptr` is only looked up.
        let code = unsafe { (self.cuPointerGetAttributes)(1, &raw const attribute, &raw mut data, ptr.addr() as u64) };
        code == 0 && memory_type != 0
    }
}

/// Copies, fills, streams and events.
impl Driver {
    pub(super) fn copy(&self, dst: u64, src: u64, bytes: usize, stream: u64) -> Result<()> {
        // SAFETY: live stream; both ranges lie in tensors of this device (contract of `traits`).
        unsafe { call!(self.cuMemcpyDtoDAsync_v2(dst, src, bytes, stream)) }
    }

    pub(super) fn copy_2d(&self, copy: &RowCopy, stream: u64) -> Result<()> {
        let device = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: device,
            srcHost: std::ptr::null(),
            srcDevice: copy.src.0,
            srcArray: std::ptr::null_mut(),
            srcPitch: copy.src_pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: device,
            dstHost: std::ptr::null_mut(),
            dstDevice: copy.dst.0,
            dstArray: std::ptr::null_mut(),
            dstPitch: copy.dst_pitch,
            WidthInBytes: copy.row_bytes,
            Height: copy.rows,
        };
        // SAFETY: the description is readable for the call, which copies it; live stream, ranges in tensors of this
        // device (contract of `traits`).
        unsafe { call!(self.cuMemcpy2DAsync_v2(&raw const copy, stream)) }
    }

    /// Enqueues a copy from the host.
    ///
    /// # Safety
    /// `src` is readable for `bytes` until the call returns if it is pageable, and until the copy has run if it is
    /// page-locked; otherwise the device reads freed or changing memory.
    pub(super) unsafe fn copy_from_host(&self, dst: u64, src: *const u8, bytes: usize, stream: u64) -> Result<()> {
        // SAFETY: live stream and a range in a tensor (contract of `traits`); `src` by this function's contract.
        unsafe { call!(self.cuMemcpyHtoDAsync_v2(dst, src.cast(), bytes, stream)) }
    }

    /// Enqueues a copy of whole rows from the host, into rows that lie `pitch` bytes apart.
    ///
    /// # Safety
    /// As [`Driver::copy_from_host`], for all of `src`.
    pub(super) unsafe fn copy_rows_from_host(
        &self,
        dst: u64,
        pitch: usize,
        row_bytes: usize,
        src: &[u8],
        stream: u64,
    ) -> Result<()> {
        if src.len() == row_bytes {
            // SAFETY: this function's contract.
            return unsafe { self.copy_from_host(dst, src.as_ptr(), src.len(), stream) };
        }
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: src.as_ptr().cast(),
            srcDevice: 0,
            srcArray: std::ptr::null_mut(),
            srcPitch: row_bytes,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: std::ptr::null_mut(),
            dstDevice: dst,
            dstArray: std::ptr::null_mut(),
            dstPitch: pitch,
            WidthInBytes: row_bytes,
            Height: src.len() / row_bytes,
        };
        // SAFETY: the description is readable for the call, which copies it; it stays within `src`, whose length bounds
        // the height; live stream, rows in a tensor of this device (contract of `traits`); `src` by this function's
        // contract.
        unsafe { call!(self.cuMemcpy2DAsync_v2(&raw const copy, stream)) }
    }

    /// Enqueues a copy to the host.
    ///
    /// # Safety
    /// `dst` is writable for `bytes`, and nothing else uses it, until the copy has run.
    pub(super) unsafe fn copy_to_host(&self, dst: *mut u8, src: u64, bytes: usize, stream: u64) -> Result<()> {
        // SAFETY: live stream and a range in a tensor (contract of `traits`); `dst` by this function's contract.
        unsafe { call!(self.cuMemcpyDtoHAsync_v2(dst.cast(), src, bytes, stream)) }
    }

    pub(super) fn fill_u8(&self, dst: u64, value: u8, bytes: usize, stream: u64) -> Result<()> {
        // SAFETY: live stream; the range lies in a tensor of this device (contract of `traits`).
        unsafe { call!(self.cuMemsetD8Async(dst, value, bytes, stream)) }
    }

    pub(super) fn fill_u32(&self, dst: u64, value: u32, count: usize, stream: u64) -> Result<()> {
        // SAFETY: live stream; the range lies in a tensor of this device (contract of `traits`).
        unsafe { call!(self.cuMemsetD32Async(dst, value, count, stream)) }
    }

    pub(super) fn create_stream(&self) -> Result<u64> {
        let mut stream = 0;
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the out-pointer is writable for the call.
        unsafe { call!(self.cuStreamCreate(&raw mut stream, flags)) }?;
        Ok(stream)
    }

    pub(super) fn destroy_stream(&self, stream: u64) -> Result<()> {
        // SAFETY: a live stream, destroyed once: the guard `Stream` destroys in its `Drop` only.
        unsafe { call!(self.cuStreamDestroy_v2(stream)) }
    }

    pub(super) fn synchronize_stream(&self, stream: u64) -> Result<()> {
        // SAFETY: a live stream (contract of `traits`).
        unsafe { call!(self.cuStreamSynchronize(stream)) }
    }

    pub(super) fn wait_event(&self, stream: u64, event: u64) -> Result<()> {
        // SAFETY: a live stream and a live event (contract of `traits`).
        unsafe { call!(self.cuStreamWaitEvent(stream, event, 0)) }
    }

    pub(super) fn create_event(&self) -> Result<u64> {
        let mut event = 0;
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: the out-pointer is writable for the call.
        unsafe { call!(self.cuEventCreate(&raw mut event, flags)) }?;
        Ok(event)
    }

    /// Makes an event that also takes the time.
    pub(super) fn create_timed_event(&self) -> Result<u64> {
        let mut event = 0;
        // SAFETY: the out-pointer is writable for the call.
        unsafe { call!(self.cuEventCreate(&raw mut event, 0)) }?;
        Ok(event)
    }

    /// Returns the milliseconds between two timed events that have happened.
    pub(super) fn elapsed_ms(&self, begin: u64, end: u64) -> Result<f32> {
        let mut elapsed = 0.0;
        // SAFETY: live events (`tuning.rs` owns them); the out-pointer is writable for the call.
        unsafe { call!(self.cuEventElapsedTime(&raw mut elapsed, begin, end)) }?;
        Ok(elapsed)
    }

    pub(super) fn destroy_event(&self, event: u64) -> Result<()> {
        // SAFETY: a live event, destroyed once: the guard `Event` destroys in its `Drop` only.
        unsafe { call!(self.cuEventDestroy_v2(event)) }
    }

    pub(super) fn record_event(&self, event: u64, stream: u64) -> Result<()> {
        // SAFETY: a live event and a live stream (contract of `traits`).
        unsafe { call!(self.cuEventRecord(event, stream)) }
    }

    pub(super) fn synchronize_event(&self, event: u64) -> Result<()> {
        // SAFETY: a live event (contract of `traits`).
        unsafe { call!(self.cuEventSynchronize(event)) }
    }
}

/// Captures and graphs.
impl Driver {
    /// Begins a capture in thread-local mode.
    pub(super) fn begin_capture(&self, stream: u64) -> Result<()> {
        // SAFETY: a live stream (contract of `traits`).
        unsafe { call!(self.cuStreamBeginCapture_v2(stream, CAPTURE_MODE_THREAD_LOCAL)) }
    }

    /// Ends a capture; an invalidated one may return no error and the null graph.
    pub(super) fn end_capture(&self, stream: u64) -> Result<u64> {
        let mut graph = 0;
        // SAFETY: a live stream (contract of `traits`); the out-pointer is writable for the call.
        unsafe { call!(self.cuStreamEndCapture(stream, &raw mut graph)) }?;
        Ok(graph)
    }

    /// Tells whether a stream captures; an invalidated capture counts until it is ended.
    pub(super) fn is_capturing(&self, stream: u64) -> Result<bool> {
        let mut status = 0;
        // SAFETY: a live stream (contract of `traits`); the out-pointer is writable for the call.
        unsafe { call!(self.cuStreamIsCapturing(stream, &raw mut status)) }?;
        Ok(status != 0)
    }

    pub(super) fn graph_nodes(&self, graph: u64) -> Result<Vec<u64>> {
        let mut count = 0;
        // SAFETY: a live graph (contract of `traits`); with null nodes the driver writes only the count.
        unsafe { call!(self.cuGraphGetNodes(graph, std::ptr::null_mut(), &raw mut count)) }?;
        let mut nodes = vec![0; count];
        if count > 0 {
            // SAFETY: as above; `nodes` is writable for `count` handles, and the driver writes no more than that.
            unsafe { call!(self.cuGraphGetNodes(graph, nodes.as_mut_ptr(), &raw mut count)) }?;
        }
        nodes.truncate(count);
        Ok(nodes)
    }

    pub(super) fn node_type(&self, node: u64) -> Result<u32> {
        let mut kind = 0;
        // SAFETY: a node of a live graph, from `graph_nodes`; the out-pointer is writable for the call.
        unsafe { call!(self.cuGraphNodeGetType(node, &raw mut kind)) }?;
        Ok(kind)
    }

    pub(super) fn instantiate(&self, graph: u64) -> Result<u64> {
        let mut exec = 0;
        // SAFETY: a live graph (contract of `traits`); the out-pointer is writable for the call.
        unsafe { call!(self.cuGraphInstantiateWithFlags(&raw mut exec, graph, 0)) }?;
        Ok(exec)
    }

    /// Updates an executable graph; `false` if the structures differ.
    pub(super) fn update_exec(&self, exec: u64, graph: u64) -> Result<bool> {
        let mut info = std::mem::MaybeUninit::<sys::CUgraphExecUpdateResultInfo>::uninit();
        // SAFETY: a live executable graph and a live graph (contract of `traits`); `info` is writable for the call and
        // is not read: its closed enum may not know the driver's code.
        match unsafe { call!(self.cuGraphExecUpdate_v2(exec, graph, info.as_mut_ptr())) } {
            Ok(()) => Ok(true),
            Err(Error::Driver { code: GRAPH_EXEC_UPDATE_FAILURE, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(super) fn launch_graph(&self, exec: u64, stream: u64) -> Result<()> {
        // SAFETY: a live executable graph and a live stream (contract of `traits`).
        unsafe { call!(self.cuGraphLaunch(exec, stream)) }
    }

    pub(super) fn destroy_graph(&self, graph: u64) -> Result<()> {
        // SAFETY: a live graph, destroyed once: by the `Drop` of the guard `Graph`, or by `abort_capture`, which owns
        // it.
        unsafe { call!(self.cuGraphDestroy(graph)) }
    }

    pub(super) fn destroy_exec(&self, exec: u64) -> Result<()> {
        // SAFETY: a live executable graph, destroyed once: the guard `GraphExec` destroys in its `Drop` only.
        unsafe { call!(self.cuGraphExecDestroy(exec)) }
    }
}

/// Modules and kernels.
impl Driver {
    /// Loads a cubin.
    ///
    /// # Safety
    /// `cubin` is a whole ELF image: the driver takes no length and reads as far as the image's own headers say.
    pub(super) unsafe fn load_module(&self, cubin: &[u8]) -> Result<u64> {
        let mut module = 0;
        // SAFETY: readable as far as its headers say, by this function's contract; the out-pointer is writable.
        unsafe { call!(self.cuModuleLoadData(&raw mut module, cubin.as_ptr().cast())) }?;
        Ok(module)
    }

    pub(super) fn unload_module(&self, module: u64) -> Result<()> {
        // SAFETY: a loaded module, unloaded once, by the backend's `Drop`: no guard, so no graph or stream, is left.
        unsafe { call!(self.cuModuleUnload(module)) }
    }

    pub(super) fn function(&self, module: u64, name: &CStr) -> Result<u64> {
        let mut function = 0;
        // SAFETY: a module that stays loaded (`Modules` never removes one); the name is a C string.
        unsafe { call!(self.cuModuleGetFunction(&raw mut function, module, name.as_ptr())) }?;
        Ok(function)
    }

    /// Loads a function now: with lazy loading, which is the default, its first launch would.
    pub(super) fn load_function(&self, function: u64) -> Result<()> {
        // SAFETY: a function of a module that stays loaded, from `function`.
        unsafe { call!(self.cuFuncLoad(function)) }
    }

    /// Returns the size of a kernel's parameter, or `None` if it has fewer parameters.
    pub(super) fn param_bytes(&self, function: u64, index: usize) -> Option<usize> {
        let (mut offset, mut bytes) = (0, 0);
        // SAFETY: a function of a module that stays loaded; both out-pointers are writable for the call.
        let code = unsafe { (self.cuFuncGetParamInfo)(function, index, &raw mut offset, &raw mut bytes) };
        (code == 0).then_some(bytes)
    }

    pub(super) fn function_attribute(&self, function: u64, attribute: sys::CUfunction_attribute) -> Result<i32> {
        let mut value = 0;
        // SAFETY: a function of a module that stays loaded; the out-pointer is writable for the call.
        unsafe { call!(self.cuFuncGetAttribute(&raw mut value, attribute as u32, function)) }?;
        Ok(value)
    }

    pub(super) fn set_function_attribute(
        &self,
        function: u64,
        attribute: sys::CUfunction_attribute,
        value: i32,
    ) -> Result<()> {
        // SAFETY: a function of a module that stays loaded; the driver checks the value.
        unsafe { call!(self.cuFuncSetAttribute(function, attribute as u32, value)) }
    }

    /// Launches a kernel whose only parameter is passed by value; a programmatic one may start before the kernel ahead
    /// of it has ended.
    ///
    /// # Safety
    /// - `args` holds at least as many bytes as the kernel's parameter (the driver copies that many before it returns).
    /// - The parameter's addresses are valid for what the kernel does with them.
    pub(super) unsafe fn launch(
        &self,
        function: u64,
        dims: &crate::Dims,
        args: &[u8],
        stream: u64,
        is_programmatic: bool,
    ) -> Result<()> {
        let ([gx, gy, gz], [bx, by, bz]) = (dims.grid, dims.block);
        let mut params = [args.as_ptr().cast_mut().cast::<c_void>()];
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: gx,
            gridDimY: gy,
            gridDimZ: gz,
            blockDimX: bx,
            blockDimY: by,
            blockDimZ: bz,
            sharedMemBytes: dims.shared_bytes,
            hStream: std::ptr::with_exposed_provenance_mut(stream as usize),
            attrs: &raw mut attribute,
            numAttrs: is_programmatic.into(),
        };
        let extra = std::ptr::null_mut();
        // SAFETY: a function of a module that stays loaded and a live stream (contract of `traits`); `config` and its
        // attribute are readable for the call; `params` has one entry, for the one parameter (`module.rs` refuses
        // kernels with more), readable by this function's contract.
        unsafe { call!(self.cuLaunchKernelEx(&raw const config, function, params.as_mut_ptr(), extra)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_code_is_kept_and_never_undefined() {
        let error = Driver::refusing::<4321>().synchronize_context().expect_err("the driver refuses");
        assert_eq!(error.to_string(), "cuCtxSynchronize failed: a code that the driver has no name for (code 4321)");
    }

    #[test]
    fn a_driver_older_than_12_4_is_refused_in_words() {
        assert_eq!(check_version(12_040), Ok(()));
        assert_eq!(check_version(13_010), Ok(()));
        let why = check_version(12_020).expect_err("too old");
        assert!(why.starts_with("the driver supports CUDA 12.2, but 12.4 or newer is needed"), "{why}");
    }
}
