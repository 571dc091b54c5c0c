//! The same forward as [`program`](crate::program), as bare driver calls in a loop: what chain replay is compared with.
//!
//! It shares nothing with the runtime but the primary context of the GPU, and it keeps no bookkeeping: its graphs and
//! buffers live until the process ends. All unsafe code of the benches is here.

use std::ffi::c_void;
use std::ptr;

use anyhow::{Result, ensure};
use bcg_kernels::{Arch, compile};
use cudarc::driver::sys;

use crate::program::{BREAK_KERNELS, DIMS, ELEMENTS, ENTRY, SEGMENT_KERNELS, SOURCE, check};
use crate::turns::Contestant;

/// The argument struct of `add_one.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    x: u64,
    out: u64,
    len: u64,
}

/// Segments launched as graphs, and the kernels between them, one driver call after the other.
#[derive(Debug)]
pub struct RawLoop {
    stream: sys::CUstream,
    function: sys::CUfunction,
    segments: Vec<sys::CUgraphExec>,
    buffers: [u64; 3],
}

/// Calls the driver and turns its code into an error that names the call.
macro_rules! driver {
    ($call:ident($($arg:expr),* $(,)?)) => {{
        // SAFETY: the process has the driver (checked at the top of `RawLoop::new`, before any other call); out-pointers
        // are local variables that outlive the call, and handles come from earlier successful calls and are never
        // destroyed.
        let code = unsafe { sys::$call($($arg),*) };
        if code == sys::CUresult::CUDA_SUCCESS { Ok(()) } else { Err(anyhow::anyhow!("{} failed: {code:?}", stringify!($call))) }
    }};
}

impl RawLoop {
    /// Captures and instantiates the segments, and checks one run.
    ///
    /// # Errors
    /// The driver's or the compiler's; a wrong output.
    pub fn new(num_breaks: usize) -> Result<Self> {
        // SAFETY: loads the driver's library, whose initialisers any CUDA program runs.
        ensure!(unsafe { sys::is_culib_present() }, "there is no CUDA driver");
        driver!(cuInit(0))?;
        let device = make_current(0)?;
        let mut stream = ptr::null_mut();
        driver!(cuStreamCreate(&raw mut stream, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32))?;
        let function = load(device)?;
        let mut buffers = [0; 3];
        for buffer in &mut buffers {
            driver!(cuMemAlloc_v2(&raw mut *buffer, ELEMENTS * size_of::<f32>()))?;
            driver!(cuMemsetD32Async(*buffer, 0, ELEMENTS, stream))?;
        }
        let mut raw = Self { stream, function, segments: Vec::new(), buffers };
        for index in 0..=num_breaks {
            let segment = raw.capture(index)?;
            raw.segments.push(segment);
        }
        raw.enqueue()?;
        raw.wait()?;
        check("raw loop", num_breaks, &raw.output()?)?;
        Ok(raw)
    }

    /// Captures segment `index`: it reads the input or the last break's buffer.
    fn capture(&self, index: usize) -> Result<sys::CUgraphExec> {
        let [input, segment, broken] = self.buffers;
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        driver!(cuStreamBeginCapture_v2(self.stream, mode))?;
        self.add(if index == 0 { input } else { broken }, segment, SEGMENT_KERNELS)?;
        let (mut graph, mut exec) = (ptr::null_mut(), ptr::null_mut());
        driver!(cuStreamEndCapture(self.stream, &raw mut graph))?;
        driver!(cuGraphInstantiateWithFlags(&raw mut exec, graph, 0))?;
        driver!(cuGraphUpload(exec, self.stream))?;
        Ok(exec)
    }

    /// Launches `count` kernels: out of place, then in place.
    fn add(&self, x: u64, out: u64, count: usize) -> Result<()> {
        self.launch(Args { x, out, len: ELEMENTS as u64 })?;
        for _ in 1..count {
            self.launch(Args { x: out, out, len: ELEMENTS as u64 })?;
        }
        Ok(())
    }

    fn launch(&self, mut args: Args) -> Result<()> {
        let mut params: [*mut c_void; 1] = [(&raw mut args).cast()];
        let ([gx, gy, gz], [bx, by, bz]) = (DIMS.grid, DIMS.block);
        let params = params.as_mut_ptr();
        driver!(cuLaunchKernel(self.function, gx, gy, gz, bx, by, bz, 0, self.stream, params, ptr::null_mut()))
    }

    fn output(&self) -> Result<Vec<f32>> {
        let mut output = vec![0f32; ELEMENTS];
        driver!(cuMemcpyDtoH_v2(output.as_mut_ptr().cast(), self.buffers[1], ELEMENTS * size_of::<f32>()))?;
        Ok(output)
    }
}

impl Contestant for RawLoop {
    fn enqueue(&mut self) -> Result<()> {
        let [_, segment, broken] = self.buffers;
        for (index, exec) in self.segments.iter().enumerate() {
            if index > 0 {
                self.add(segment, broken, BREAK_KERNELS)?;
            }
            driver!(cuGraphLaunch(*exec, self.stream))?;
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        driver!(cuStreamSynchronize(self.stream))
    }
}

fn make_current(ordinal: i32) -> Result<sys::CUdevice> {
    let (mut device, mut context) = (0, ptr::null_mut());
    driver!(cuDeviceGet(&raw mut device, ordinal))?;
    driver!(cuDevicePrimaryCtxRetain(&raw mut context, device))?;
    driver!(cuCtxSetCurrent(context))?;
    Ok(device)
}

fn load(device: sys::CUdevice) -> Result<sys::CUfunction> {
    use sys::CUdevice_attribute_enum as Attribute;
    let (mut major, mut minor) = (0, 0);
    driver!(cuDeviceGetAttribute(&raw mut major, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device))?;
    driver!(cuDeviceGetAttribute(&raw mut minor, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device))?;
    let cubin = compile(&SOURCE, Arch::new(major.cast_unsigned(), minor.cast_unsigned()))?;
    let (mut module, mut function) = (ptr::null_mut(), ptr::null_mut());
    driver!(cuModuleLoadData(&raw mut module, cubin.as_ptr().cast()))?;
    driver!(cuModuleGetFunction(&raw mut function, module, ENTRY.as_ptr()))?;
    Ok(function)
}
