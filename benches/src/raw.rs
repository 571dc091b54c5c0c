//! The same forward as [`program`](crate::program), as bare driver calls: in a loop, which chain replay is compared with,
//! and as one graph whose break kernels are patched, which healed replay is compared with.
//!
//! It shares nothing with the runtime but the primary context of the GPU, and it keeps no bookkeeping: its graphs and
//! buffers live until the process ends. All unsafe code of the benches is here.

use std::ffi::c_void;
use std::ptr;

use anyhow::{Result, ensure};
use bcg_runtime::{Arch, compile};
use cudarc::driver::sys;

use crate::program::{BREAK_KERNELS, BreakArgs, DIMS, ELEMENTS, ENTRY, SEGMENT_KERNELS, SOURCE, Tag, check};
use crate::turns::Contestant;

/// The argument struct of `add_one.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Args {
    x: u64,
    out: u64,
    len: u64,
    tag: u64,
}

impl Args {
    /// The arguments of `count` launches: out of place, then in place.
    fn chain(x: u64, out: u64, count: usize) -> impl Iterator<Item = Self> {
        (0..count).map(move |index| Self { x: if index == 0 { x } else { out }, out, len: ELEMENTS as u64, tag: 0 })
    }
}

/// Calls the driver and turns its code into an error that names the call.
macro_rules! driver {
    ($call:ident($($arg:expr),* $(,)?)) => {{
        // SAFETY: the process has the driver (checked at the top of `Setup::new`, before any other call); pointers are to
        // local variables that outlive the call, and handles come from earlier successful calls and are never
        // destroyed.
        let code = unsafe { sys::$call($($arg),*) };
        if code == sys::CUresult::CUDA_SUCCESS { Ok(()) } else { Err(anyhow::anyhow!("{} failed: {code:?}", stringify!($call))) }
    }};
}

/// What both contestants have: a stream, the kernel, and the forward's buffers.
#[derive(Debug)]
struct Setup {
    stream: sys::CUstream,
    function: sys::CUfunction,
    input: u64,
    /// What segments write.
    segment: u64,
    /// What breaks write.
    broken: u64,
}

impl Setup {
    fn new() -> Result<Self> {
        // SAFETY: loads the driver's library, whose initialisers any CUDA program runs.
        ensure!(unsafe { sys::is_culib_present() }, "there is no CUDA driver");
        driver!(cuInit(0))?;
        let device = make_current(0)?;
        let mut stream = ptr::null_mut();
        driver!(cuStreamCreate(&raw mut stream, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32))?;
        let function = load(device)?;
        let buffer = || {
            let mut buffer = 0;
            driver!(cuMemAlloc_v2(&raw mut buffer, ELEMENTS * size_of::<f32>()))?;
            driver!(cuMemsetD32Async(buffer, 0, ELEMENTS, stream))?;
            Ok::<_, anyhow::Error>(buffer)
        };
        Ok(Self { stream, function, input: buffer()?, segment: buffer()?, broken: buffer()? })
    }

    /// Captures segment `index`: it reads the input or the last break's buffer.
    fn capture(&self, index: usize) -> Result<sys::CUgraph> {
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        driver!(cuStreamBeginCapture_v2(self.stream, mode))?;
        let x = if index == 0 { self.input } else { self.broken };
        Args::chain(x, self.segment, SEGMENT_KERNELS).try_for_each(|args| self.launch(args))?;
        let mut graph = ptr::null_mut();
        driver!(cuStreamEndCapture(self.stream, &raw mut graph))?;
        Ok(graph)
    }

    fn instantiate(&self, graph: sys::CUgraph) -> Result<sys::CUgraphExec> {
        let mut exec = ptr::null_mut();
        driver!(cuGraphInstantiateWithFlags(&raw mut exec, graph, 0))?;
        driver!(cuGraphUpload(exec, self.stream))?;
        Ok(exec)
    }

    /// The arguments of the launches of a break.
    fn break_args(&self) -> impl Iterator<Item = Args> {
        Args::chain(self.segment, self.broken, BREAK_KERNELS)
    }

    fn launch(&self, mut args: Args) -> Result<()> {
        let mut params: [*mut c_void; 1] = [(&raw mut args).cast()];
        let ([gx, gy, gz], [bx, by, bz]) = (DIMS.grid, DIMS.block);
        let params = params.as_mut_ptr();
        driver!(cuLaunchKernel(self.function, gx, gy, gz, bx, by, bz, 0, self.stream, params, ptr::null_mut()))
    }

    fn launch_graph(&self, exec: sys::CUgraphExec) -> Result<()> {
        driver!(cuGraphLaunch(exec, self.stream))
    }

    /// The parameters of a node; `params` points to the address of its arguments.
    fn node_params(&self, params: *mut *mut c_void) -> sys::CUDA_KERNEL_NODE_PARAMS {
        let ([gx, gy, gz], [bx, by, bz]) = (DIMS.grid, DIMS.block);
        sys::CUDA_KERNEL_NODE_PARAMS {
            func: self.function,
            gridDimX: gx,
            gridDimY: gy,
            gridDimZ: gz,
            blockDimX: bx,
            blockDimY: by,
            blockDimZ: bz,
            sharedMemBytes: 0,
            kernelParams: params,
            extra: ptr::null_mut(),
            kern: ptr::null_mut(),
            ctx: ptr::null_mut(),
        }
    }

    fn wait(&self) -> Result<()> {
        driver!(cuStreamSynchronize(self.stream))
    }

    /// Waits for a run, and checks and clears its output.
    fn check(&self, who: &str, num_breaks: usize) -> Result<()> {
        self.wait()?;
        let mut output = vec![0f32; ELEMENTS];
        driver!(cuMemcpyDtoH_v2(output.as_mut_ptr().cast(), self.segment, ELEMENTS * size_of::<f32>()))?;
        driver!(cuMemsetD32Async(self.segment, 0, ELEMENTS, self.stream))?;
        check(who, num_breaks, &output)
    }
}

/// Segments launched as graphs, and the kernels between them, one driver call after the other.
#[derive(Debug)]
pub struct RawLoop {
    setup: Setup,
    segments: Vec<sys::CUgraphExec>,
}

impl RawLoop {
    /// Captures and instantiates the segments, and checks one run.
    ///
    /// # Errors
    /// The driver's or the compiler's; a wrong output.
    pub fn new(num_breaks: usize) -> Result<Self> {
        let setup = Setup::new()?;
        let segments = (0..=num_breaks).map(|index| setup.instantiate(setup.capture(index)?)).collect::<Result<_>>()?;
        let mut raw = Self { setup, segments };
        raw.enqueue()?;
        raw.setup.check("raw loop", num_breaks)?;
        Ok(raw)
    }
}

impl Contestant for RawLoop {
    fn enqueue(&mut self) -> Result<()> {
        for (index, exec) in self.segments.iter().enumerate() {
            if index > 0 {
                self.setup.break_args().try_for_each(|args| self.setup.launch(args))?;
            }
            self.setup.launch_graph(*exec)?;
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        self.setup.wait()
    }
}

/// The forward as one graph, of a child graph for each segment and a node for each kernel of a break, launched once.
///
/// With [`BreakArgs::Changing`] every node of a break is patched before.
#[derive(Debug)]
pub struct RawMerged {
    setup: Setup,
    exec: sys::CUgraphExec,
    /// The kernels of breaks and their arguments.
    nodes: Vec<(sys::CUgraphNode, Args)>,
    args: BreakArgs,
    tag: Tag,
}

impl RawMerged {
    /// Builds and instantiates the graph, and checks two runs.
    ///
    /// # Errors
    /// The driver's or the compiler's; a wrong output.
    pub fn new(num_breaks: usize, args: BreakArgs) -> Result<Self> {
        let setup = Setup::new()?;
        let mut graph = ptr::null_mut();
        driver!(cuGraphCreate(&raw mut graph, 0))?;
        // A node depends on the one added before it.
        let mut last = Vec::new();
        let mut nodes = Vec::new();
        for index in 0..=num_breaks {
            for mut args in setup.break_args().take(if index == 0 { 0 } else { BREAK_KERNELS }) {
                let mut params = [(&raw mut args).cast()];
                let (mut node, params) = (ptr::null_mut(), setup.node_params(params.as_mut_ptr()));
                driver!(cuGraphAddKernelNode_v2(&raw mut node, graph, last.as_ptr(), last.len(), &raw const params))?;
                last = vec![node];
                nodes.push((node, args));
            }
            let (mut node, segment) = (ptr::null_mut(), setup.capture(index)?);
            driver!(cuGraphAddChildGraphNode(&raw mut node, graph, last.as_ptr(), last.len(), segment))?;
            last = vec![node];
        }
        let exec = setup.instantiate(graph)?;
        let mut raw = Self { setup, exec, nodes, args, tag: Tag::default() };
        for _ in 0..2 {
            raw.enqueue()?;
            raw.setup.check("raw merged graph", num_breaks)?;
        }
        Ok(raw)
    }

    /// Gives every node of a break the arguments of this run.
    fn patch(&mut self) -> Result<()> {
        for (node, args) in &mut self.nodes {
            args.tag = self.tag.0;
            let mut params = [ptr::from_mut(args).cast()];
            let params = self.setup.node_params(params.as_mut_ptr());
            driver!(cuGraphExecKernelNodeSetParams_v2(self.exec, *node, &raw const params))?;
        }
        Ok(())
    }
}

impl Contestant for RawMerged {
    fn enqueue(&mut self) -> Result<()> {
        let tag = self.tag.next(self.args);
        if tag != self.tag {
            self.tag = tag;
            self.patch()?;
        }
        self.setup.launch_graph(self.exec)
    }

    fn wait(&mut self) -> Result<()> {
        self.setup.wait()
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
