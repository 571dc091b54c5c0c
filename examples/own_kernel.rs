//! A kernel and an eager break of your own, on the host device or on CUDA:
//! `cargo run -p bcg-examples --bin own_kernel`.

use bcg_runtime::{
    BreakableCudaGraph, Context, Device, DevicePtr, Dims, Eager, HostMemory, Kernel, KernelArgs, LiveBatch, Result,
    Runner, RunnerOptions, Source, Tensor, eager_on_graph,
};

// 1. The kernel: its arguments, its CUDA source, its host reference.
#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct ScaleArgs {
    #[points_to(const f32)]
    x: DevicePtr,
    #[points_to(f32)]
    out: DevicePtr,
    len: u32,
    factor: f32,
}

static SOURCE: Source = Source::new(
    "scale.cu",
    r#"#include "args.cuh"
extern "C" __global__ void scale(ScaleArgs a) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.len) a.out[i] = a.x[i] * a.factor;
}"#,
)
.takes::<ScaleArgs>();

fn scale_on_host(a: &ScaleArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let x = memory.load::<f32>(a.x, a.len as usize)?;
    memory.store(a.out, &x.iter().map(|x| x * a.factor).collect::<Vec<_>>())
}

// SAFETY: `scale`, the only function that launches it, gives two tensors of `len` elements; no thread goes beyond `len`.
static SCALE: Kernel<ScaleArgs> = unsafe { Kernel::new("scale", &SOURCE, scale_on_host) };

// 2. The break: its factor is a live value, so it is read anew in each run.
struct Batch {
    factor: f32,
}
impl LiveBatch for Batch {}

#[eager_on_graph]
fn scale(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    let (len, factor) = (x.num_elements(), cx.live().factor);
    let out = cx.empty(x.shape(), x.dtype())?;
    let args = ScaleArgs { x: cx.addr(x)?, out: cx.addr(&out)?, len: len as u32, factor };
    cx.launch(&SCALE, Dims::per_item(len, 128), args)?;
    Ok(out)
}

// 3. Capture once, replay with other batches.
fn main() -> Result<()> {
    let (device, which) = Device::auto();
    println!("{which}");
    let mut runner = Runner::new(&device, RunnerOptions::default())?;
    let x = device.tensor(&[4], &[1.0f32, 2.0, 3.0, 4.0])?;
    let mut graph = BreakableCudaGraph::new("scaled twice");
    graph.capture(&mut runner, &Batch { factor: 1.0 }, move |cx: &mut Context<'_, Batch>| {
        let copy = cx.empty(x.shape(), x.dtype())?;
        cx.copy(&copy, &x)?; // a segment
        let once = scale(cx, &copy)?; // a break
        scale(cx, &once) // another one
    })?;
    for factor in [2.0, 3.0] {
        let out = graph.replay(&mut runner, &Batch { factor })?;
        let out = runner.read::<f32>(&out)?;
        println!("factor {factor}: {out:?}");
        assert_eq!(out, [1.0, 2.0, 3.0, 4.0].map(|x| x * factor * factor));
    }
    Ok(())
}
