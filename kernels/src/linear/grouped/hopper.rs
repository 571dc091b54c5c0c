//! Products of the rows of many tokens with the matrices of their experts, on compute capability 9.0; CUDA source: `hopper.cu`.
//!
//! A row of the output depends on that row of `x` and the expert's matrix alone, and the order of its sums on nothing else.
//!
//! Called by `grouped_linear` and `grouped_gate_up`, which check the shapes. Never picked on the host device.

use bcg_runtime::{Arch, DType, Device, DevicePtr, Dims, Kernel, KernelArgs, OpStream, Result, Source};

use super::args::GroupedArgs;
use super::host::{hopper_gate_up, hopper_linear};
use crate::arch::MAP_BYTES;
use crate::check::Check;

pub(super) static SOURCE: Source = source!("linear/grouped/hopper.cu")
    .takes::<GroupedHopperArgs>()
    .define("THREADS", THREADS as usize)
    .define("MAP_BYTES", MAP_BYTES)
    .define("EXPERT_BYTES", EXPERT_BYTES as usize)
    .define("RING_SLOTS", RING_SLOTS as usize)
    .define("RING_BYTES", RING_BYTES as usize)
    .define("SMALL_BYTES", SMALL_BYTES as usize);

const CHECK: Check = Check::new("grouped_linear");

/// Threads of a block: one warpgroup copies, two multiply.
const THREADS: u32 = 3 * 128;
/// The most experts: each block sorts them all.
const EXPERTS_MAX: u32 = 512;
/// Columns of a block of the weight in shared memory; the kernels take no smaller depth.
const DEPTH_MIN: u32 = 64;
/// Slots of the ring.
const RING_SLOTS: u32 = 4;
/// Slots of the ring in shared memory, each of 384 rows of 128 bytes.
const RING_BYTES: u32 = RING_SLOTS * 384 * 128;
/// What follows the ring: a tensor map and barriers.
const SMALL_BYTES: u32 = MAP_BYTES as u32 + 64;
/// Shared memory for each expert.
const EXPERT_BYTES: u32 = 24;
const _: () = assert!(RING_BYTES + SMALL_BYTES + EXPERT_BYTES * EXPERTS_MAX <= 227 << 10);
/// From this many rows of an expert on, on average, the large items serve better: they read less from the cache for each
/// product, but there are fewer of them to share among the blocks.
const ROWS_OF_LARGE_ITEMS: usize = 32;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
pub(super) struct GroupedHopperArgs {
    pub(super) grouped: GroupedArgs,
    /// A tensor map for each block.
    #[points_to(u8)]
    maps: DevicePtr,
}

/// The kernels for small and for large items.
macro_rules! hopper {
    ($name:literal, $host:ident) => {
        [
            // SAFETY: the comment at the use of this macro names the checks.
            unsafe { Kernel::new(concat!($name, "_hopper_64"), &SOURCE, $host) }.programmatic(),
            // SAFETY: as above.
            unsafe { Kernel::new(concat!($name, "_hopper_128"), &SOURCE, $host) }.programmatic(),
        ]
    };
}

// SAFETY: `grouped_gate_up` and `grouped_linear` have checked the shapes when `launch` runs, and the source indexes by
// these alone.
static GATE_UP: [Kernel<GroupedHopperArgs>; 2] = hopper!("grouped_gate_up", hopper_gate_up);
// SAFETY: as above.
static LINEAR: [Kernel<GroupedHopperArgs>; 2] = hopper!("grouped_linear", hopper_linear);

/// Tells whether [`launch`] serves this product of bf16 on a device.
pub(super) fn applies(device: &Device, is_gated: bool, a: &GroupedArgs) -> bool {
    let matrix_rows = u64::from(a.outputs) * if is_gated { 2 } else { 1 };
    device.compute_capability() == Some(Arch::new(9, 0))
        && (1..=EXPERTS_MAX).contains(&a.experts)
        && a.depth >= DEPTH_MIN
        && a.outputs > 0
        && a.outputs.is_multiple_of(8)
        && a.places > 0
        && u64::from(a.experts) * matrix_rows <= i32::MAX as u64
        && a.is_in_words()
}

/// Enqueues the product of rows that chose among so many experts, these and others.
pub(super) fn launch(cx: &mut OpStream, is_gated: bool, grouped: GroupedArgs, chosen_among: usize) -> Result<()> {
    let blocks = cx.device().num_multiprocessors();
    // A tensor map for each block.
    let maps = cx.empty(&[blocks as usize, MAP_BYTES / size_of::<i32>()], DType::I32)?;
    let is_large = grouped.places as usize > ROWS_OF_LARGE_ITEMS * chosen_among;
    let kernels = if is_gated { &GATE_UP } else { &LINEAR };
    // In eights, because the kernel may read its list of experts in wide words, beyond the last one.
    let listed = CHECK.u32("E", grouped.experts as usize)?.next_multiple_of(8);
    let shared_bytes = RING_BYTES + SMALL_BYTES + EXPERT_BYTES * listed;
    let dims = Dims { shared_bytes, ..Dims::linear(blocks, THREADS) };
    let args = GroupedHopperArgs { grouped, maps: cx.addr(&maps)? };
    cx.launch(&kernels[usize::from(is_large)], dims, args)
}
