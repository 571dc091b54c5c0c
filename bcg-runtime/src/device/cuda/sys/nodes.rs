//! Nodes of graphs: copied from captured graphs, made from a description, changed in an executable.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr;

use cudarc::driver::sys;

use super::Driver;
use crate::op::RowCopy;
use crate::{DevicePtr, Dims, Error, Result};

/// How an edge orders two nodes, in the driver's own bytes.
pub(in super::super) type EdgeData = sys::CUgraphEdgeData;

/// From a node, to a node, and how.
pub(in super::super) type Edge = (u64, u64, EdgeData);

/// The second node may start when all blocks of the first, both kernels, allow it or have ended.
pub(in super::super) const PROGRAMMATIC: EdgeData = EdgeData {
    from_port: 1, // CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC
    to_port: 0,
    type_: 1, // CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
    reserved: [0; 5],
};

/// The second node starts when the first has ended.
pub(in super::super) const FULL: EdgeData = EdgeData { from_port: 0, to_port: 0, type_: 0, reserved: [0; 5] };

/// `CUgraphNodeType`s that can be copied.
pub(in super::super) const KERNEL: u32 = 0;
const MEMCPY: u32 = 1;
const MEMSET: u32 = 2;
const EMPTY: u32 = 5;

const INVALID_VALUE: i32 = 1;

/// A kernel and what it is launched with.
pub(in super::super) struct KernelNode<'a> {
    pub(in super::super) function: u64,
    pub(in super::super) dims: &'a Dims,
    /// At least as long as the kernel's only parameter.
    pub(in super::super) args: &'a [u8],
}

impl KernelNode<'_> {
    /// Calls `f` with the driver's description, which is valid during the call.
    fn with_params<R>(&self, f: impl FnOnce(*const sys::CUDA_KERNEL_NODE_PARAMS) -> R) -> R {
        let mut params = [self.args.as_ptr().cast_mut().cast::<c_void>()];
        let ([gx, gy, gz], [bx, by, bz]) = (self.dims.grid, self.dims.block);
        let params = sys::CUDA_KERNEL_NODE_PARAMS {
            func: ptr::with_exposed_provenance_mut(self.function as usize),
            gridDimX: gx,
            gridDimY: gy,
            gridDimZ: gz,
            blockDimX: bx,
            blockDimY: by,
            blockDimZ: bz,
            sharedMemBytes: self.dims.shared_bytes,
            kernelParams: params.as_mut_ptr(),
            extra: ptr::null_mut(),
            kern: ptr::null_mut(),
            ctx: ptr::null_mut(),
        };
        f(&raw const params)
    }
}

fn fill_params(dst: DevicePtr, byte: u8, bytes: usize) -> sys::CUDA_MEMSET_NODE_PARAMS {
    sys::CUDA_MEMSET_NODE_PARAMS { dst: dst.0, pitch: 0, value: byte.into(), elementSize: 1, width: bytes, height: 1 }
}

/// Describes a copy of rows within the device, or from page-locked memory.
fn copy_params(copy: &RowCopy, is_from_host: bool) -> sys::CUDA_MEMCPY3D {
    let copy = if copy.is_one_piece() {
        RowCopy { row_bytes: copy.rows * copy.row_bytes, rows: 1, dst_pitch: 0, src_pitch: 0, ..*copy }
    } else {
        *copy
    };
    let device = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
    sys::CUDA_MEMCPY3D {
        srcXInBytes: 0,
        srcY: 0,
        srcZ: 0,
        srcLOD: 0,
        srcMemoryType: if is_from_host { sys::CUmemorytype::CU_MEMORYTYPE_HOST } else { device },
        srcHost: if is_from_host { ptr::with_exposed_provenance(copy.src.0 as usize) } else { ptr::null() },
        srcDevice: if is_from_host { 0 } else { copy.src.0 },
        srcArray: ptr::null_mut(),
        reserved0: ptr::null_mut(),
        srcPitch: copy.src_pitch,
        srcHeight: copy.rows,
        dstXInBytes: 0,
        dstY: 0,
        dstZ: 0,
        dstLOD: 0,
        dstMemoryType: device,
        dstHost: ptr::null_mut(),
        dstDevice: copy.dst.0,
        dstArray: ptr::null_mut(),
        reserved1: ptr::null_mut(),
        dstPitch: copy.dst_pitch,
        dstHeight: copy.rows,
        WidthInBytes: copy.row_bytes,
        Height: copy.rows,
        Depth: 1,
    }
}

/// Turns the driver's refusal of a change into `false`.
fn was_patched(result: Result<()>) -> Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(Error::Driver { code: INVALID_VALUE, .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

fn context_ptr(context: u64) -> sys::CUcontext {
    ptr::with_exposed_provenance_mut(context as usize)
}

/// Graphs and their edges.
impl Driver {
    pub(in super::super) fn create_graph(&self) -> Result<u64> {
        let mut graph = 0;
        // SAFETY: the out-pointer is writable for the call; 0 is the only legal flag.
        unsafe { call!(self.cuGraphCreate(&raw mut graph, 0)) }?;
        Ok(graph)
    }

    /// Returns the edges of a graph.
    pub(in super::super) fn graph_edges(&self, graph: u64) -> Result<Vec<Edge>> {
        let mut count = 0;
        let none = ptr::null_mut();
        // SAFETY: a live graph (contract of `traits`); with null arrays the driver writes only the count.
        unsafe { call!(self.cuGraphGetEdges_v2(graph, none, ptr::null_mut(), ptr::null_mut(), &raw mut count)) }?;
        let (mut from, mut to, mut data) = (vec![0; count], vec![0; count], vec![FULL; count]);
        if count > 0 {
            let arrays = (from.as_mut_ptr(), to.as_mut_ptr(), data.as_mut_ptr());
            // SAFETY: as above; each array is writable for `count` elements, and the driver writes no more than that.
            unsafe { call!(self.cuGraphGetEdges_v2(graph, arrays.0, arrays.1, arrays.2, &raw mut count)) }?;
        }
        let edges = from.into_iter().zip(to).zip(data).take(count);
        Ok(edges.map(|((from, to), data)| (from, to, data)).collect())
    }

    /// Adds one edge. Several in one call would do, if driver 580.159 did not give some of them the data of others.
    pub(in super::super) fn add_edge(&self, graph: u64, (from, to, data): &Edge) -> Result<()> {
        let (from, to, data) = (ptr::from_ref(from), ptr::from_ref(to), ptr::from_ref(data));
        // SAFETY: a live graph and two nodes of it (`merge.rs` adds edges between nodes that it added just before);
        // each pointer is readable for the one edge that the call says.
        unsafe { call!(self.cuGraphAddDependencies_v2(graph, from, to, data, 1)) }
    }

    /// Adds a node that does what `node`, of type `kind`, does; nothing for a type that cannot be copied.
    pub(in super::super) fn copy_node(&self, graph: u64, node: u64, kind: u32, context: u64) -> Result<Option<u64>> {
        let (mut copy, context) = (0, context_ptr(context));
        let none = ptr::null();
        match kind {
            KERNEL => {
                let mut params = MaybeUninit::<sys::CUDA_KERNEL_NODE_PARAMS>::uninit();
                // SAFETY: a kernel node of a live graph; the driver writes the description, whose arguments the node
                // owns.
                unsafe { call!(self.cuGraphKernelNodeGetParams_v2(node, params.as_mut_ptr())) }?;
                // SAFETY: a live graph; the description was written by the call above and its arguments live as long as
                // `node`; without dependencies the array is not read.
                unsafe { call!(self.cuGraphAddKernelNode_v2(&raw mut copy, graph, none, 0, params.as_ptr())) }?;
                // SAFETY: two kernel nodes of live graphs.
                unsafe { call!(self.cuGraphKernelNodeCopyAttributes(copy, node)) }?;
            }
            MEMCPY => {
                let mut params = MaybeUninit::<sys::CUDA_MEMCPY3D>::uninit();
                // SAFETY: a copy node of a live graph; the driver writes the description.
                unsafe { call!(self.cuGraphMemcpyNodeGetParams(node, params.as_mut_ptr())) }?;
                // SAFETY: a live graph and context; the description was written by the call above. It is not read here:
                // its closed enum may not know the driver's code.
                unsafe { call!(self.cuGraphAddMemcpyNode(&raw mut copy, graph, none, 0, params.as_ptr(), context)) }?;
            }
            MEMSET => {
                let mut params = MaybeUninit::<sys::CUDA_MEMSET_NODE_PARAMS>::uninit();
                // SAFETY: a fill node of a live graph; the driver writes the description.
                unsafe { call!(self.cuGraphMemsetNodeGetParams(node, params.as_mut_ptr())) }?;
                // SAFETY: a live graph and context; the description was written by the call above.
                unsafe { call!(self.cuGraphAddMemsetNode(&raw mut copy, graph, none, 0, params.as_ptr(), context)) }?;
            }
            // SAFETY: a live graph; without dependencies the array is not read.
            EMPTY => unsafe { call!(self.cuGraphAddEmptyNode(&raw mut copy, graph, none, 0)) }?,
            _ => return Ok(None),
        }
        Ok(Some(copy))
    }
}

/// Nodes made from a description, and changed.
impl Driver {
    /// # Safety
    /// As [`Driver::launch`], for every launch of the graph.
    pub(in super::super) unsafe fn add_kernel(&self, graph: u64, kernel: &KernelNode<'_>) -> Result<u64> {
        let mut node = 0;
        // SAFETY: a live graph; the description is readable for the call, which copies the arguments; their length and
        // their addresses by this function's contract.
        let add = |params| unsafe { call!(self.cuGraphAddKernelNode_v2(&raw mut node, graph, ptr::null(), 0, params)) };
        kernel.with_params(add)?;
        Ok(node)
    }

    /// # Safety
    /// As [`Driver::launch`], for every later launch of the executable.
    pub(in super::super) unsafe fn set_kernel(&self, exec: u64, node: u64, kernel: &KernelNode<'_>) -> Result<bool> {
        // SAFETY: a live executable and a kernel node of the graph that it was made from, which is alive (contract of
        // `traits`); the description is readable for the call, which copies the arguments; the rest by this function's
        // contract.
        let set = |params| unsafe { call!(self.cuGraphExecKernelNodeSetParams_v2(exec, node, params)) };
        was_patched(kernel.with_params(set))
    }

    pub(in super::super) fn add_fill(
        &self,
        graph: u64,
        dst: DevicePtr,
        byte: u8,
        bytes: usize,
        context: u64,
    ) -> Result<u64> {
        let (mut node, params) = (0, fill_params(dst, byte, bytes));
        let (none, context) = (ptr::null(), context_ptr(context));
        // SAFETY: a live graph and context; the range lies in a tensor of this device (contract of `traits`).
        unsafe { call!(self.cuGraphAddMemsetNode(&raw mut node, graph, none, 0, &raw const params, context)) }?;
        Ok(node)
    }

    pub(in super::super) fn set_fill(
        &self,
        exec: u64,
        node: u64,
        (dst, byte, bytes): (DevicePtr, u8, usize),
        context: u64,
    ) -> Result<bool> {
        let (params, context) = (fill_params(dst, byte, bytes), context_ptr(context));
        // SAFETY: a live executable, a fill node of the graph that it was made from, a range in a tensor of this device
        // (contract of `traits`).
        was_patched(unsafe { call!(self.cuGraphExecMemsetNodeSetParams(exec, node, &raw const params, context)) })
    }

    /// Adds a copy within the device, or from page-locked memory that outlives every launch.
    pub(in super::super) fn add_copy(
        &self,
        graph: u64,
        copy: &RowCopy,
        is_from_host: bool,
        context: u64,
    ) -> Result<u64> {
        let (mut node, params) = (0, copy_params(copy, is_from_host));
        let (none, context) = (ptr::null(), context_ptr(context));
        // SAFETY: a live graph and context; both ranges lie in memory of this device or in a live pinned buffer, which
        // is freed after all enqueued work only (contract of `traits`).
        unsafe { call!(self.cuGraphAddMemcpyNode(&raw mut node, graph, none, 0, &raw const params, context)) }?;
        Ok(node)
    }

    pub(in super::super) fn set_copy(
        &self,
        exec: u64,
        node: u64,
        copy: &RowCopy,
        is_from_host: bool,
        context: u64,
    ) -> Result<bool> {
        let (params, context) = (copy_params(copy, is_from_host), context_ptr(context));
        // SAFETY: a live executable and a copy node of the graph that it was made from; the ranges as in `add_copy`.
        was_patched(unsafe { call!(self.cuGraphExecMemcpyNodeSetParams(exec, node, &raw const params, context)) })
    }
}
