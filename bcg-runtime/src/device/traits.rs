//! The small traits that a device implements, and their contract in prose.
//!
//! A backend is driven only by the guards of [`super::guard`], which own every handle that they create and destroy it
//! exactly once. So an implementation may rely on this: a handle passed in was returned by the same backend and was not
//! destroyed; an address range passed to an enqueuing call was checked against its tensor.
//!
//! Ordering: work on one stream runs in the order of its enqueuing; work of different streams is ordered only through
//! events. Every enqueuing call may return before the work has run.
//!
//! While a stream captures, enqueuing calls on it (and on streams that joined the capture through an event) add nodes
//! to the graph and run nothing. Refused then, with [`Error::CaptureForbidden`](crate::Error::CaptureForbidden), or by
//! the driver's own error: synchronising the stream, pageable copies, waiting for an event that was recorded outside.
//!
//! `destroy_*`, `free*`, `unmap` and `abort_capture` never fail: they log what the driver says and go on.

use std::fmt;
use std::sync::Arc;

use crate::compile::Arch;
use crate::device::KernelTrace;
use crate::device::host::collectives::Collectives;
use crate::launch::PlaneId;
use crate::op::Op;
use crate::{DType, DeviceKind, DevicePtr, MemoryInfo, Result};

macro_rules! handles {
    ($($(#[$doc:meta])* $name:ident),*) => { $(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub(crate) struct $name(pub(crate) u64);
    )* };
}

handles!(
    /// A stream of the backend.
    StreamHandle,
    /// An event of the backend.
    EventHandle,
    /// A graph that was captured.
    GraphHandle,
    /// An executable graph.
    ExecHandle,
    /// A node of a merged graph.
    NodeHandle
);

/// What a captured graph consists of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct NodeCounts {
    pub(crate) kernels: usize,
    pub(crate) copies: usize,
    pub(crate) fills: usize,
    /// Allocation and free nodes: refused at the end of a capture (law L7).
    pub(crate) memory: usize,
    /// Events, empty nodes, child graphs.
    pub(crate) other: usize,
}

impl NodeCounts {
    pub(crate) fn total(&self) -> usize {
        self.kernels + self.copies + self.fills + self.memory + self.other
    }
}

/// Memory of a device.
pub(crate) trait MemoryBackend {
    fn memory_info(&self) -> Result<MemoryInfo>;
    /// Allocates `bytes` (> 0), aligned to at least 256 bytes. The contents are undefined (NaN on the host device).
    /// A plain allocation, never stream-ordered: peers can read it and no capture holds it.
    fn alloc(&self, bytes: usize) -> Result<DevicePtr>;
    /// Frees an allocation, after the work that was enqueued before has run.
    fn free(&self, ptr: DevicePtr);
    /// Allocates page-locked host memory, which both host and device can reach at the returned address.
    fn alloc_pinned(&self, bytes: usize) -> Result<DevicePtr>;
    fn free_pinned(&self, ptr: DevicePtr);
    /// Writes `data` into pinned memory at once, from the host.
    fn write_pinned(&self, ptr: DevicePtr, data: &[u8]) -> Result<()>;
    /// Reads pinned memory at once, on the host; no work that writes it is under way.
    fn read_pinned(&self, ptr: DevicePtr, into: &mut [u8]) -> Result<()>;
    /// Reserves a range of addresses without memory; `bytes` is a multiple of the granularity.
    fn reserve(&self, bytes: usize) -> Result<DevicePtr>;
    /// Gives `[base + offset, base + offset + bytes)` memory, which has none. Both are multiples of the granularity.
    fn map(&self, base: DevicePtr, offset: usize, bytes: usize) -> Result<()>;
    /// Takes away the memory that one call of `map` gave to a range, after the work enqueued before has run.
    fn unmap(&self, base: DevicePtr, offset: usize, bytes: usize);
    fn unreserve(&self, base: DevicePtr, bytes: usize);
    /// The unit of `reserve` and `map`, in bytes.
    fn map_granularity(&self) -> usize;
}

/// Streams and the work on them.
pub(crate) trait StreamBackend {
    fn create_stream(&self, name: &str) -> Result<StreamHandle>;
    fn destroy_stream(&self, stream: StreamHandle);
    /// Waits until all work of the stream has run.
    fn synchronize_stream(&self, stream: StreamHandle) -> Result<()>;
    /// Waits until all work of the device has run.
    fn synchronize(&self) -> Result<()>;
    /// Enqueues one piece of work, or adds it to the capture of `stream`. The geometry of a launch is not empty.
    fn enqueue(&self, stream: StreamHandle, op: &Op) -> Result<()>;
    fn fill_u32(&self, stream: StreamHandle, dst: DevicePtr, value: u32, count: usize) -> Result<()>;
    /// Copies pageable host memory to the device; `src` may be reused when the call returns. Refused during a capture.
    fn copy_from_host(&self, stream: StreamHandle, dst: DevicePtr, src: &[u8]) -> Result<()>;
    /// As `copy_from_host`, into rows of `row_bytes` that lie `pitch` bytes apart; `src` holds whole rows.
    fn copy_rows_from_host(
        &self,
        stream: StreamHandle,
        dst: DevicePtr,
        pitch: usize,
        row_bytes: usize,
        src: &[u8],
    ) -> Result<()>;
    /// Copies device memory to the host and waits for it. Refused during a capture.
    fn copy_to_host(&self, stream: StreamHandle, dst: &mut [u8], src: DevicePtr) -> Result<()>;
    /// Copies to pinned memory, written when the work runs. Refused during a capture.
    fn copy_to_pinned(&self, stream: StreamHandle, dst: DevicePtr, src: DevicePtr, bytes: usize) -> Result<()>;
}

/// Matrix products.
pub(crate) trait MatmulBackend {
    /// Chooses how products of this shape are computed: the same way until they are tuned.
    fn plan_matmul(&self, shape: &MatmulShape) -> Result<MatmulPlan>;
    /// The most workspace that any plan needs, in bytes.
    fn matmul_workspace_bytes_max(&self) -> usize;
    /// Enqueues a product; nothing in its shape is 0.
    fn matmul(&self, stream: StreamHandle, product: &Matmul) -> Result<()>;
    /// Times the plans of every product that was planned so far, for each of `rows` up to the most rows that it was
    /// planned with, and keeps the fastest. `progress` gets the number done and the total.
    fn tune_matmuls(&self, rows: &[usize], progress: &mut dyn FnMut(usize, usize)) -> Result<MatmulTuning>;
    /// Returns how the products that were planned so far are computed.
    fn matmul_plans(&self) -> Vec<(MatmulShape, MatmulPlan)>;
    /// Computes products as a device of the same model does.
    fn set_matmul_plans(&self, plans: &[(MatmulShape, MatmulPlan)]) -> Result<()>;
}

/// What [`Device::tune_matmuls`](crate::Device::tune_matmuls) did.
///
/// # Example
/// ```
/// let tuning = bcg_runtime::Device::host().tune_matmuls(&[1, 16], &mut |_, _| ())?;
/// assert!(tuning.timed.is_empty()); // a host device has one way to multiply
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct MatmulTuning {
    /// The products that were timed now.
    pub timed: Vec<TunedMatmul>,
    /// The number of products that were tuned before, by this process or by an earlier one.
    pub num_known: usize,
    /// The number of products that stay as they were, because the time or the memory for tuning was used up.
    pub num_left: usize,
}

/// What timing one product gave.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct TunedMatmul {
    /// T, the rows of the output.
    pub rows: usize,
    /// N, the columns of the output.
    pub outputs: usize,
    /// K, the columns of both factors.
    pub depth: usize,
    /// The dtype of both factors.
    pub dtype: DType,
    /// How many algorithms there were to choose from.
    pub num_algorithms: usize,
    /// The time of the algorithm that was used before, in microseconds.
    pub first_us: f64,
    /// The time of the chosen algorithm, in microseconds.
    pub best_us: f64,
}

/// `out[t, n] = sum_k x[t, k] * weight[n, k]`: all that its algorithm may depend on. Strides in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct MatmulShape {
    /// T, the rows of the output.
    pub(crate) rows: usize,
    /// N, the columns of the output.
    pub(crate) outputs: usize,
    /// K, the columns of both factors.
    pub(crate) depth: usize,
    pub(crate) x_stride: usize,
    pub(crate) weight_stride: usize,
    pub(crate) out_stride: usize,
    /// The dtype of `x` and `weight`: bf16, f16 or f32.
    pub(crate) dtype: DType,
    /// The dtype of the output: that of `x`, or f32.
    pub(crate) out_dtype: DType,
    /// What all three addresses are multiples of, in bytes: 256, 16, or the dtype's size.
    pub(crate) alignment: usize,
}

impl fmt::Display for MatmulShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, outputs, depth, x_stride, weight_stride, out_stride, dtype, out_dtype, alignment } = self;
        write!(f, "[T={rows}, N={outputs}, K={depth}] {dtype} to {out_dtype}, ")?;
        write!(f, "rows {x_stride}, {weight_stride} and {out_stride} elements apart, aligned to {alignment} bytes")
    }
}

/// How a product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MatmulPlan {
    pub(crate) workspace_bytes: usize,
    /// The algorithm, in the backend's own words.
    pub(crate) algorithm: [u64; 8],
}

/// One product, complete.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matmul {
    pub(crate) shape: MatmulShape,
    pub(crate) plan: MatmulPlan,
    pub(crate) x: DevicePtr,
    pub(crate) weight: DevicePtr,
    pub(crate) out: DevicePtr,
    /// Scratch memory of the size that the plan says; null if that is 0.
    pub(crate) workspace: DevicePtr,
}

/// Events: points in a stream's order.
pub(crate) trait EventBackend {
    fn create_event(&self) -> Result<EventHandle>;
    fn destroy_event(&self, event: EventHandle);
    fn record_event(&self, event: EventHandle, stream: StreamHandle) -> Result<()>;
    /// Makes later work of `stream` wait for the event's latest record. During a capture of `stream`, an event that
    /// was recorded outside of it is an error, never dropped.
    fn wait_event(&self, stream: StreamHandle, event: EventHandle) -> Result<()>;
    fn synchronize_event(&self, event: EventHandle) -> Result<()>;
}

/// Captures and graphs.
pub(crate) trait GraphBackend {
    /// Begins to capture a stream, without disturbing the work of other threads and streams.
    fn begin_capture(&self, stream: StreamHandle) -> Result<()>;
    /// Ends the capture. On an error the stream no longer captures and nothing is left to destroy.
    fn end_capture(&self, stream: StreamHandle) -> Result<GraphHandle>;
    /// Ends the capture, if the stream captures, and discards it.
    fn abort_capture(&self, stream: StreamHandle);
    fn node_counts(&self, graph: GraphHandle) -> Result<NodeCounts>;
    fn instantiate(&self, graph: GraphHandle) -> Result<ExecHandle>;
    /// Makes later launches of `exec` run the nodes of `graph`; launches that were enqueued keep theirs. Returns
    /// `false`, and changes nothing, if the graph has another structure than that which `exec` was made from.
    fn update_exec(&self, exec: ExecHandle, graph: GraphHandle) -> Result<bool>;
    fn launch_graph(&self, exec: ExecHandle, stream: StreamHandle) -> Result<()>;
    /// Makes one graph of captured graphs and single pieces of work, each of which runs after all of the one before,
    /// and returns it with the node of each piece. Work gets the place of `stream` in the host device's schedule.
    /// Returns nothing if a captured graph has a node that cannot be copied.
    fn merge(&self, stream: StreamHandle, parts: &[Part<'_>]) -> Result<Option<(GraphHandle, Vec<NodeHandle>)>>;
    /// Makes later launches of `exec`, made from a merged graph, do `op` at `node`, which does work that is alike
    /// ([`Op::is_like`]); launches that were enqueued keep theirs, and are not waited for. Returns `false`, and changes
    /// nothing, if the driver refuses this change.
    fn patch(&self, exec: ExecHandle, node: NodeHandle, op: &Op) -> Result<bool>;
    fn destroy_graph(&self, graph: GraphHandle);
    /// Destroys an executable graph; one that still runs finishes first.
    fn destroy_exec(&self, exec: ExecHandle);
}

/// A part of a merged graph.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part<'a> {
    /// All nodes of a captured graph. If it is programmatic, it begins with one kernel, which may start before the
    /// kernel ahead of it has ended.
    Graph { graph: GraphHandle, is_programmatic: bool },
    /// One node.
    Op(&'a Op),
}

/// What carries data between devices of several processes, as one rank has it.
pub(crate) trait Transport: fmt::Debug + Send + Sync {
    /// Enqueues the gathering of `bytes` at `src` of every rank to `dst`, one after the other in the order of the ranks. All
    /// of it is device memory that outlives the work.
    fn gather(&self, stream: StreamHandle, src: DevicePtr, dst: DevicePtr, bytes: usize) -> Result<()>;
    /// Checks that no transfer has failed so far.
    fn check(&self) -> Result<()>;
    /// Makes what is enqueued end, whatever comes of it, and refuses what is enqueued later.
    fn abort(&self);
}

/// A device as a rank of a world.
pub(crate) trait RankBackend {
    /// Returns the device's number among those whose memory it can reach, and nothing on the host device, where ranks send
    /// each other copies.
    fn ordinal(&self) -> Option<i32>;
    /// Lets the devices with these numbers read and write `[base, base + bytes)`, which is mapped.
    fn share(&self, base: DevicePtr, bytes: usize, with: &[i32]) -> Result<()>;
    /// Joins the place where collectives of this device meet those of others, as rank `rank`, and returns its number.
    fn join(&self, collectives: &Arc<Collectives>, rank: usize) -> PlaneId;
    /// Makes what the ranks of several processes find each other by; nothing on the host device, where they meet in
    /// [`Collectives`].
    fn transport_id(&self) -> Result<Option<Vec<u8>>>;
    /// Connects this device, as rank `rank`, with those of all other ranks, which come at the same time. Waits for them, so
    /// the caller does so on a thread that nobody needs.
    fn join_transport(&self, id: &[u8], rank: usize, num_ranks: usize) -> Result<Box<dyn Transport>>;
    /// Adds parts of this device, each after the one before, to a merged graph of another device of the same kind, beside
    /// what is there, and returns the node of each piece of work. Returns nothing where a graph holds the work of one device
    /// only, or if a captured graph has a node that cannot be copied.
    fn add_chain(&self, graph: GraphHandle, parts: &[Part<'_>]) -> Result<Option<Vec<NodeHandle>>>;
}

/// All that a device does.
pub(crate) trait Backend:
    MemoryBackend
    + StreamBackend
    + MatmulBackend
    + EventBackend
    + GraphBackend
    + RankBackend
    + fmt::Debug
    + Send
    + Sync
    + 'static
{
    fn kind(&self) -> DeviceKind;
    fn name(&self) -> &str;
    /// The architecture that kernels are compiled for; `None` on the host device.
    fn compute_capability(&self) -> Option<Arch>;
    fn num_multiprocessors(&self) -> u32;
    /// Compiles and loads kernels ahead of their first launch, in parallel where that helps.
    fn prepare(&self, kernels: &[&'static dyn crate::launch::AnyKernel]) -> Result<()>;
    /// Calls `f`, which waits for its work, and returns the kernels that ran meanwhile, `with_calls` with their
    /// launches.
    fn trace_kernels(&self, with_calls: bool, f: &mut dyn FnMut() -> Result<()>) -> Result<KernelTrace>;
}
