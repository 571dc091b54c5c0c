//! bcg-runtime: breakable CUDA graphs.
//!
//! A CUDA graph removes launch overhead but cannot hold code that decides on the host. Here, a function annotated with
//! [`#[eager_on_graph]`](eager_on_graph) *breaks* the capture: the open segment ends, the function runs eagerly, a new
//! segment begins. A [`BreakableCudaGraph`] replays the segments and the breaks in order.
//!
//! # In the order of the flow
//! 1. Annotate: [`eager_on_graph`], [`Context`], [`Eager`], [`Freeze`], [`Bridge`], [`Live`].
//! 2. Run: [`Device`], [`Tensor`], [`Kernel`], [`OpStream`], [`Runner`].
//! 3. Capture and replay: [`BreakableCudaGraph`], [`Description`].
//! 4. Many sizes: [`Ladder`], [`GraphCache`], [`EagerReason`].
//!
//! # Layers
//! Each file imports its own layer and those before it; `cargo xtask tidy` refuses any other import.
//! 1. Errors, dtypes, shapes, addresses.   2. `device`, and the work that it takes: `launch`, `op`.
//! 3. Memory: `arena`, `generation`.   4. `tensor`, and its place in a graph: `frozen`.
//! 5. `stream`: what ops enqueue on, and the list of a break's work; `segment`, `matmul`, `scrub`.
//! 6. `capture`: contexts, breaks, what crosses them, the writer of the tape.
//! 7. `runner`: eager runs; `transfer`: inputs, results and checkpoints on their way.
//! 8. `replay`: the tape, healed and as a chain.   9. `graph`, `timeline`.   10. `cache`, `ladder`.
//!
//! # Shape letters
//! T tokens, B sequences, C hidden, Hq/Hkv query/key-value heads, D head dim, N state, E experts, K chosen experts,
//! V vocabulary.
//!
//! # Example
//! ```
//! use std::sync::Arc;
//! use bcg_runtime::{BreakableCudaGraph, Context, Device, Eager, LiveBatch, Result, Runner, RunnerOptions, Tensor, eager_on_graph};
//!
//! struct Batch { scale: f32 }
//! impl LiveBatch for Batch {}
//!
//! #[eager_on_graph]
//! fn scaled(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
//!     let scale = cx.live().scale; // the batch of this run, never the captured one
//!     let values: Vec<f32> = cx.read::<f32>(x)?.iter().map(|v| v * scale).collect();
//!     let out = cx.empty(x.shape(), x.dtype())?;
//!     cx.upload(&out, &values)?;
//!     Ok(out)
//! }
//!
//! let device = Device::host();
//! let mut runner = Runner::new(&device, RunnerOptions::default())?;
//! let x = device.tensor(&[2], &[1.0f32, 2.0])?;
//! let mut graph = BreakableCudaGraph::new("scaled");
//! let out = graph.capture(&mut runner, &Batch { scale: 2.0 }, move |cx: &mut Context<'_, Batch>| {
//!     let copy = cx.empty(x.shape(), x.dtype())?;
//!     cx.copy(&copy, &x)?; // segment 0
//!     scaled(cx, &copy) // the break; segment 1 is empty and costs nothing
//! })?;
//! assert_eq!(runner.read::<f32>(&out)?, [2.0, 4.0]); // a capture is also a run
//! let out = graph.replay(&mut runner, &Batch { scale: 10.0 })?;
//! assert_eq!(runner.read::<f32>(&out)?, [10.0, 20.0]);
//! # Ok::<(), bcg_runtime::Error>(())
//! ```

extern crate self as bcg_runtime; // the derives name the runtime so

mod address;
mod arena;
mod break_site;
mod cache;
mod capture;
mod compile;
mod device;
mod dtype;
mod error;
mod frozen;
mod generation;
mod graph;
mod ladder;
mod launch;
mod matmul;
mod op;
mod replay;
mod runner;
mod scrub;
mod segment;
mod shape;
mod stream;
mod tensor;
mod timeline;
mod transfer;
mod world;

pub use address::DevicePtr;
pub use arena::{ArenaStats, BlockLifetime, Moment};
pub use bcg_macros::{Bridge, Freeze, KernelArgs, eager_on_graph};
pub use cache::{CacheOptions, GraphCache, GraphCacheStats};
pub use capture::bridge::{Bridge, Carrier};
pub use capture::context::{Context, LiveBatch};
pub use capture::eager::{Eager, Live};
pub use capture::freeze::{Freeze, Freezer, Thaw};
pub use compile::{
    Arch, ArgField, ArgStruct, ArgType, ArgValue, CompileError, Header, KernelArgs, Source, compile, compile_uncached,
};
pub use device::host::{HostControl, HostMemory, HostOptions};
pub use device::traits::{MatmulTuning, TunedMatmul};
pub use device::{Device, DeviceKind, Event, KernelRun, LiveObjects, MemoryInfo, PinnedBuffer, Stream};
pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use generation::Generation;
pub use graph::{BreakableCudaGraph, GraphOptions};
pub use ladder::{Decision, EagerReason, Ladder};
pub use launch::{ARG_BYTES_MAX, AnyKernel, Dims, Given, HostFn, Kernel, RanksFn};
pub use replay::description::{BreakDescription, Description, SegmentDescription};
pub use replay::{ChainReason, ReplayPath};
pub use runner::{Runner, RunnerStats};
pub use stream::{OpStream, ReplayMode, Rows, RunnerOptions, SideStream, StepKind, StepTime};
pub use tensor::Tensor;
pub use timeline::{GpuTimeline, KernelTime, Timeline};
pub use transfer::{Readback, Staging, UploadOptions, UploadSource, Uploader};
pub use world::communicator::COLLECTIVE_BLOCKS_MAX;
pub use world::{
    Communicator, CommunicatorArgs, CommunicatorOptions, RANKS_MAX, RankThreads, SpanOptions, World, WorldOptions,
};

/// The CUDA sources of the runtime's own kernels, for a build that compiles every kernel.
pub static SOURCES: &[&Source] = &[&scrub::SOURCE];

/// What the macros expand to. Not part of the public interface.
#[doc(hidden)]
pub mod __private {
    pub use crate::break_site::BreakSite;
    pub use crate::capture::breaks::{eager_break, eager_break_stubbed, plain_call};
}

/// Runs the README's example as a documentation test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
