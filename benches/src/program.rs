//! The forward that the bench of the mechanism times: segments of small kernels with an eager break between each two.
//!
//! Every kernel adds one to every element, so the output counts the kernels that ran. The launches in breaks carry a tag of
//! the live batch among their arguments, so that these can differ from replay to replay.

use std::cell::Cell;

use anyhow::{Result, ensure};
use bcg_runtime::{
    BreakableCudaGraph, Context, DType, Device, DevicePtr, Dims, Eager, HostMemory, Kernel, KernelArgs, LiveBatch,
    OpStream, ReplayMode, ReplayPath, Runner, RunnerOptions, Source, Tensor, eager_on_graph,
};

use crate::turns::Contestant;

/// Kernels of a segment.
pub const SEGMENT_KERNELS: usize = 8;

/// Kernels that a break launches.
pub const BREAK_KERNELS: usize = 2;

/// Elements that each kernel works on.
pub const ELEMENTS: usize = 512;

/// Geometry of each kernel.
pub const DIMS: Dims = Dims::per_item(ELEMENTS, 128);

/// The only kernel's entry point.
pub const ENTRY: &std::ffi::CStr = c"add_one";

/// The only kernel's CUDA source.
pub static SOURCE: Source = Source::new(
    "add_one.cu",
    r#"
#include "args.cuh"
extern "C" __global__ void add_one(AddOneArgs a) {
    unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
    if (i < a.len) a.out[i] = a.x[i] + 1.0f;
}"#,
)
.takes::<AddOneArgs>();

/// The only kernel's arguments.
#[repr(C)]
#[derive(Clone, Copy, Debug, KernelArgs)]
pub struct AddOneArgs {
    #[points_to(const f32)]
    x: DevicePtr,
    #[points_to(f32)]
    out: DevicePtr,
    len: u64,
    /// Read by nobody.
    tag: u64,
}

/// Whether the arguments of the launches in breaks differ from one replay to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakArgs {
    /// Every replay makes the same launches.
    Same,
    /// Every launch in a break differs from the last replay's.
    Changing,
}

/// The live batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tag(
    /// What the launches in breaks carry.
    pub u64,
);

impl LiveBatch for Tag {}

impl Tag {
    /// Returns the tag of the next replay.
    pub fn next(self, args: BreakArgs) -> Self {
        match args {
            BreakArgs::Same => self,
            BreakArgs::Changing => Self(self.0.wrapping_add(1)),
        }
    }
}

fn host(args: &AddOneArgs, _: &Dims, memory: &HostMemory<'_>) -> bcg_runtime::Result<()> {
    let x = memory.view::<f32>(args.x, ELEMENTS)?;
    let out = memory.view::<f32>(args.out, ELEMENTS)?;
    out.iter().zip(x).for_each(|(out, x): (&Cell<f32>, &Cell<f32>)| out.set(x.get() + 1.0));
    Ok(())
}

// SAFETY: `add_one`, the only launch, gives two tensors of `ELEMENTS` elements, and `len` is as many.
static ADD_ONE: Kernel<AddOneArgs> = unsafe { Kernel::new("add_one", &SOURCE, host) };

fn add_one(cx: &mut OpStream, out: &Tensor, x: &Tensor, Tag(tag): Tag) -> bcg_runtime::Result<()> {
    let args = AddOneArgs { x: cx.addr(x)?, out: cx.addr(out)?, len: ELEMENTS as u64, tag };
    cx.launch(&ADD_ONE, DIMS, args)
}

/// Adds one `count` times: out of place, then in place.
fn add(cx: &mut OpStream, x: &Tensor, count: usize, tag: Tag) -> bcg_runtime::Result<Tensor> {
    let out = cx.empty(&[ELEMENTS], DType::F32)?;
    add_one(cx, &out, x, tag)?;
    for _ in 1..count {
        add_one(cx, &out, &out, tag)?;
    }
    Ok(out)
}

#[eager_on_graph]
fn add_in_break(cx: &mut Eager<'_, Tag>, x: &Tensor) -> bcg_runtime::Result<Tensor> {
    let tag = *cx.live();
    add(cx, x, BREAK_KERNELS, tag)
}

fn forward(cx: &mut Context<'_, Tag>, input: &Tensor, num_breaks: usize) -> bcg_runtime::Result<Tensor> {
    let mut x = add(cx, input, SEGMENT_KERNELS, Tag::default())?;
    for _ in 0..num_breaks {
        x = add_in_break(cx, &x)?;
        x = add(cx, &x, SEGMENT_KERNELS, Tag::default())?;
    }
    Ok(x)
}

/// Returns what every element of the output is, after a forward on zeros.
pub fn expected(num_breaks: usize) -> f32 {
    (SEGMENT_KERNELS + num_breaks * (BREAK_KERNELS + SEGMENT_KERNELS)) as f32
}

/// Checks the output of a forward on zeros.
///
/// # Errors
/// If a kernel did not run, or ran twice.
pub fn check(who: &str, num_breaks: usize, output: &[f32]) -> Result<()> {
    let expected = expected(num_breaks);
    let wrong = output.iter().find(|value| **value != expected);
    ensure!(wrong.is_none(), "{who} with {num_breaks} breaks: expected {expected} everywhere, got {wrong:?}");
    Ok(())
}

/// The forward, replayed.
#[derive(Debug)]
pub struct Replay {
    num_breaks: usize,
    args: BreakArgs,
    tag: Tag,
    runner: Runner,
    input: Tensor,
    graph: BreakableCudaGraph<Tag, Tensor>,
}

impl Replay {
    /// Runs the forward once, captures it, and checks that two replays compute the same in the way of `mode`.
    ///
    /// # Errors
    /// The runtime's; a wrong output.
    pub fn new(device: &Device, num_breaks: usize, mode: ReplayMode, args: BreakArgs) -> Result<Self> {
        let mut eager = EagerForward::new(device, num_breaks)?;
        let mut options = RunnerOptions::default();
        options.replay = mode;
        eager.runner = Runner::new(device, options)?;
        eager.check()?;
        let EagerForward { runner, input, .. } = eager;
        let graph = BreakableCudaGraph::new(format!("{num_breaks} breaks"));
        let mut replay = Self { num_breaks, args, tag: Tag::default(), runner, input, graph };
        replay.capture()?;
        for _ in 0..2 {
            let output = replay.replay()?;
            check("replay", num_breaks, &replay.runner.read::<f32>(&output)?)?;
            let (path, is_healed) = (replay.graph.last_replay(), mode == ReplayMode::Healed);
            ensure!((path == Some(ReplayPath::Healed)) == is_healed, "{mode:?} with {num_breaks} breaks was {path:?}");
        }
        Ok(replay)
    }

    /// Captures the forward anew.
    ///
    /// # Errors
    /// The runtime's.
    pub fn capture(&mut self) -> Result<()> {
        let (input, num_breaks) = (self.input.clone(), self.num_breaks);
        self.graph.capture(&mut self.runner, &self.tag, move |cx| forward(cx, &input, num_breaks))?;
        Ok(())
    }

    fn replay(&mut self) -> Result<Tensor> {
        self.tag = self.tag.next(self.args);
        Ok(self.graph.replay(&mut self.runner, &self.tag)?)
    }
}

impl Contestant for Replay {
    fn enqueue(&mut self) -> Result<()> {
        self.replay()?;
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        Ok(self.runner.synchronize()?)
    }
}

/// The forward, captured anew each time.
#[derive(Debug)]
pub struct Capture(
    /// The forward.
    pub Replay,
);

impl Contestant for Capture {
    fn enqueue(&mut self) -> Result<()> {
        self.0.capture()
    }

    fn wait(&mut self) -> Result<()> {
        self.0.wait()
    }
}

/// The forward, launched kernel by kernel.
#[derive(Debug)]
pub struct EagerForward {
    num_breaks: usize,
    runner: Runner,
    input: Tensor,
}

impl EagerForward {
    /// Sets the forward up.
    ///
    /// # Errors
    /// The runtime's.
    pub fn new(device: &Device, num_breaks: usize) -> Result<Self> {
        let runner = Runner::new(device, RunnerOptions::default())?;
        Ok(Self { num_breaks, runner, input: device.zeros(&[ELEMENTS], DType::F32)? })
    }

    fn check(&mut self) -> Result<()> {
        let (input, num_breaks) = (&self.input, self.num_breaks);
        let output = self.runner.eager(&Tag::default(), |cx| forward(cx, input, num_breaks))?;
        check("eager", num_breaks, &self.runner.read::<f32>(&output)?)
    }
}

impl Contestant for EagerForward {
    fn enqueue(&mut self) -> Result<()> {
        let (input, num_breaks) = (&self.input, self.num_breaks);
        self.runner.eager(&Tag::default(), |cx| forward(cx, input, num_breaks))?;
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        Ok(self.runner.synchronize()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_runs_once_in_a_capture_and_in_a_replay() {
        for num_breaks in [0, 1, 3] {
            for mode in [ReplayMode::Chain, ReplayMode::Healed] {
                for args in [BreakArgs::Same, BreakArgs::Changing] {
                    Replay::new(&Device::host(), num_breaks, mode, args).unwrap();
                }
            }
        }
    }
}
