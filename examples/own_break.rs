//! An eager break of your own, captured once and replayed with other batches:
//! `cargo run -p bcg-examples --bin own_break`.

use bcg_runtime::{
    BreakableCudaGraph, Context, Device, Eager, LiveBatch, Result, Runner, RunnerOptions, Tensor, eager_on_graph,
};

// 1. The live batch: what differs at each run. Only breaks can read it.
struct Batch {
    scale: f32,
}
impl LiveBatch for Batch {}

// 2. The break: a function that a CUDA graph cannot hold, here because it computes on the host.
#[eager_on_graph]
fn scaled(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    let scale = cx.live().scale; // of this run, never of the captured one
    let values: Vec<f32> = cx.read::<f32>(x)?.iter().map(|value| value * scale).collect();
    let out = cx.empty(x.shape(), x.dtype())?;
    cx.upload(&out, &values)?;
    Ok(out)
}

// 3. The forward: plain Rust, the same eagerly, under capture and at replay.
fn forward(cx: &mut Context<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    let copy = cx.empty(x.shape(), x.dtype())?;
    cx.copy(&copy, x)?; // captured: segment 0
    let scaled = scaled(cx, &copy)?; // the break
    let out = cx.empty(x.shape(), x.dtype())?;
    cx.copy(&out, &scaled)?; // captured: segment 1
    Ok(out)
}

// 4. Capture, which is also a run, and replay.
fn main() -> Result<()> {
    let (device, which) = Device::auto();
    println!("{which}");
    let mut runner = Runner::new(&device, RunnerOptions::default())?;
    let x = device.tensor(&[2], &[1.0f32, 2.0])?;
    let mut graph = BreakableCudaGraph::new("forward");
    let out = graph.capture(&mut runner, &Batch { scale: 2.0 }, move |cx| forward(cx, &x))?;
    println!("captured with scale 2: {:?}", runner.read::<f32>(&out)?);
    for scale in [3.0, 10.0] {
        let out = graph.replay(&mut runner, &Batch { scale })?;
        println!("replayed with scale {scale}: {:?}", runner.read::<f32>(&out)?);
    }
    Ok(())
}
