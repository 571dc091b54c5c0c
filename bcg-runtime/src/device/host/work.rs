//! One operation of the host device: what it does when its turn comes, and what the driver refuses beforehand.
//!
//! Called by `queue.rs` to run, by `stream.rs` to check. Nothing here knows streams or order.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::graph::GraphNodes;
use super::matmul;
use super::regions::Memory;
use super::view::HostMemory;
use crate::device::traits::{Matmul, NodeCounts};
use crate::launch::{Launch, PlaneId};
use crate::op::RowCopy;
use crate::{DevicePtr, Dims, Error, Result};

/// Dynamic shared memory that a block may have on the GPUs that bcg runs on.
const SHARED_BYTES_MAX: u32 = 227 << 10;

/// The names of work that has none of its own.
const FILL: &str = "fill";
const COPY_FROM_HOST: &str = "copy from host";

/// What an operation does.
#[derive(Clone, Debug)]
pub(super) enum Work {
    /// Joins what it depends on.
    Nothing,
    Launch(Launch),
    Matmul(Matmul),
    Fill {
        dst: DevicePtr,
        pattern: [u8; 4],
        bytes: usize,
    },
    Copy {
        name: &'static str,
        copy: RowCopy,
    },
    /// A copy of host bytes that the queue owns.
    Upload {
        dst: DevicePtr,
        data: Box<[u8]>,
    },
    /// A node of a launched graph.
    Node(Arc<GraphNodes>, u32),
}

impl Work {
    /// Does it; `gave` is what all ranks gave to a collective.
    pub(super) fn run(&self, gave: &[Arc<[u8]>], memory: &Memory) -> Result<()> {
        match self {
            Self::Nothing => Ok(()),
            Self::Launch(launch) => run_kernel(launch, gave, memory),
            Self::Matmul(product) => matmul::run(product, memory),
            Self::Fill { dst, pattern, bytes } => memory.fill(FILL, *dst, *pattern, *bytes),
            Self::Copy { name, copy } => copy_rows(name, copy, memory),
            Self::Upload { dst, data } => memory.write(COPY_FROM_HOST, *dst, data),
            Self::Node(graph, idx) => graph.nodes[*idx as usize].work.run(gave, memory),
        }
    }

    /// Returns the launch, if ranks meet in it, and where.
    pub(super) fn collective(&self) -> Option<(&Launch, PlaneId)> {
        match self {
            Self::Launch(launch) => launch.plane.map(|plane| (launch, plane)),
            Self::Node(graph, idx) => graph.nodes[*idx as usize].work.collective(),
            _ => None,
        }
    }

    /// Returns the name that errors give it.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Nothing => "nothing",
            Self::Launch(launch) => launch.name(),
            Self::Matmul(_) => matmul::NAME,
            Self::Fill { .. } => FILL,
            Self::Copy { name, .. } => name,
            Self::Upload { .. } => COPY_FROM_HOST,
            Self::Node(graph, idx) => graph.nodes[*idx as usize].work.name(),
        }
    }

    /// Returns the first address that it may write to.
    pub(super) fn output(&self) -> Option<DevicePtr> {
        match self {
            Self::Nothing => None,
            Self::Launch(launch) => launch.output(),
            Self::Matmul(product) => Some(product.out),
            Self::Fill { dst, .. } | Self::Upload { dst, .. } => Some(*dst),
            Self::Copy { copy, .. } => Some(copy.dst),
            Self::Node(graph, idx) => graph.nodes[*idx as usize].work.output(),
        }
    }

    /// Tells whether a node of this work can be updated to `other`: only addresses, values and sizes may differ.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Launch(a), Self::Launch(b)) => std::ptr::addr_eq(a.kernel, b.kernel),
            (a, b) => std::mem::discriminant(a) == std::mem::discriminant(b),
        }
    }

    pub(super) fn count(&self, counts: &mut NodeCounts) {
        match self {
            Self::Launch(_) | Self::Matmul(_) => counts.kernels += 1,
            Self::Fill { .. } => counts.fills += 1,
            Self::Copy { .. } | Self::Upload { .. } => counts.copies += 1,
            Self::Nothing | Self::Node(..) => counts.other += 1,
        }
    }
}

/// Refuses a geometry that the CUDA driver refuses.
pub(super) fn check_dims(dims: &Dims) -> Result<()> {
    let [gx, gy, gz] = dims.grid;
    let [bx, by, bz] = dims.block;
    let grid = gx <= i32::MAX as u32 && gy <= 65_535 && gz <= 65_535;
    let block = bx <= 1024 && by <= 1024 && bz <= 64 && bx * by * bz <= 1024;
    if dims.is_empty() || !grid || !block || dims.shared_bytes > SHARED_BYTES_MAX {
        return Err(Error::driver("cuLaunchKernel", 1, "CUDA_ERROR_INVALID_VALUE"));
    }
    Ok(())
}

/// Refuses pitches smaller than a row, as the CUDA driver does.
pub(super) fn check_copy(copy: &RowCopy) -> Result<()> {
    if copy.rows > 1 && (copy.dst_pitch < copy.row_bytes || copy.src_pitch < copy.row_bytes) {
        return Err(Error::driver("cuMemcpy2DAsync", 1, "CUDA_ERROR_INVALID_VALUE"));
    }
    Ok(())
}

fn run_kernel(launch: &Launch, gave: &[Arc<[u8]>], memory: &Memory) -> Result<()> {
    let memory = HostMemory::new(memory, launch.name());
    // SAFETY: a launch's bytes are those of its kernel's argument struct, an invariant of `launch.rs`.
    catch_in_kernel(launch, || unsafe { launch.kernel.run_host(&launch.args, &launch.dims, gave, &memory) })
}

/// Returns what this rank sends to all others in a collective.
pub(super) fn give(launch: &Launch, memory: &Memory) -> Result<Vec<u8>> {
    let memory = HostMemory::new(memory, launch.name());
    // SAFETY: as in `run_kernel`.
    catch_in_kernel(launch, || unsafe { launch.kernel.give_host(&launch.args, &launch.dims, &memory) })
}

fn catch_in_kernel<R>(launch: &Launch, run: impl FnOnce() -> Result<R>) -> Result<R> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        let message = format!("host reference of kernel {}: {}", launch.name(), text.unwrap_or("no message"));
        Err(Error::Panic { message })
    })
}

fn copy_rows(name: &str, copy: &RowCopy, memory: &Memory) -> Result<()> {
    if copy.rows == 0 || copy.row_bytes == 0 {
        return Ok(());
    }
    if overlaps(copy) {
        let message = format!("source {:#x} and destination {:#x} overlap: {copy:?}", copy.src.0, copy.dst.0);
        return Err(Error::Memory { kernel: name.to_owned(), message });
    }
    if copy.rows == 1 || (copy.dst_pitch == copy.row_bytes && copy.src_pitch == copy.row_bytes) {
        return memory.copy(name, copy.dst, copy.src, copy.row_bytes * copy.rows);
    }
    (0..copy.rows).try_for_each(|row| {
        let dst = copy.dst.offset_bytes(row * copy.dst_pitch);
        memory.copy(name, dst, copy.src.offset_bytes(row * copy.src_pitch), copy.row_bytes)
    })
}

/// Tells whether source and destination share bytes, which CUDA leaves undefined. Copying onto itself is fine. Rows of
/// different pitches count as overlapping as soon as their whole ranges do.
fn overlaps(copy: &RowCopy) -> bool {
    let same_rows = copy.rows == 1 || copy.dst_pitch == copy.src_pitch;
    let lower_pitch = if copy.dst.0 < copy.src.0 { copy.dst_pitch } else { copy.src_pitch };
    let distance = copy.dst.0.abs_diff(copy.src.0) as usize;
    if (distance == 0 && same_rows) || distance >= (copy.rows - 1) * lower_pitch + copy.row_bytes {
        return false;
    }
    if copy.rows == 1 || !same_rows {
        return true;
    }
    let phase = distance % copy.src_pitch;
    phase < copy.row_bytes || phase > copy.src_pitch - copy.row_bytes
}
