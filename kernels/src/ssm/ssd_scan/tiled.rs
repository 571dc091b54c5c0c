//! The scan of [`ssd_scan()`](crate::ssd_scan()) on tensor cores, for bf16 and published sizes; CUDA source: `tiled.cu`.
//!
//! - A block owns a head of a sequence and walks over its rows in chunks. The blocks share the heads of all sequences by
//!   what these cost, which each works out on the device, so the geometry of a launch depends on nothing live.
//! - What is not exact in bf16 is split into two bf16, so `out` and states are those of f32.
//!
//! Chosen by `ssd_scan`, which checks the shapes. Never picked on the host device.

use bcg_runtime::{DType, Device, DevicePtr, Dims, Kernel, Source};
use half::bf16;

use super::host::{host_bf16, host_f32};
use super::{SsmArgs, SsmInputs};
use crate::arch::is_large;

pub(super) static SOURCE: Source = source!("ssm/ssd_scan/tiled.cu")
    .takes::<SsmArgs>()
    .define("HEAD_DIM", HEAD_DIM)
    .define("CHUNK", CHUNK)
    .define("THREADS", THREADS as usize)
    .define("BLOCKS", BLOCKS as usize);

/// P that the kernels are made for.
const HEAD_DIM: usize = 64;
/// Rows of a chunk.
const CHUNK: usize = 64;
const THREADS: u32 = 256;
/// Blocks of a multiprocessor: one waits for its state while another computes.
const BLOCKS: u32 = 2;

/// For N of 64 and 128, of states in f32 and in bf16.
// SAFETY: `ssd_scan` has checked the shapes when it launches, and the source indexes by these alone.
static N64: [Kernel<SsmArgs>; 2] = [
    unsafe { Kernel::new("ssd_scan_tiled_n64_f32", &SOURCE, host_f32::<bf16>) }.programmatic(),
    unsafe { Kernel::new("ssd_scan_tiled_n64_bf16", &SOURCE, host_bf16::<bf16>) }.programmatic(),
];
// SAFETY: as above.
static N128: [Kernel<SsmArgs>; 2] = [
    unsafe { Kernel::new("ssd_scan_tiled_n128_f32", &SOURCE, host_f32::<bf16>) }.programmatic(),
    unsafe { Kernel::new("ssd_scan_tiled_n128_bf16", &SOURCE, host_bf16::<bf16>) }.programmatic(),
];

/// Shared memory of a block, `Memory` in the source.
const fn shared_bytes(state_size: usize) -> usize {
    let chunks = 2 * CHUNK * (2 * state_size + HEAD_DIM) * size_of::<bf16>();
    let tiles = CHUNK / 16;
    let weights = 2 * tiles * (tiles + 1) / 2 * 16 * 16 * size_of::<bf16>();
    let sums = CHUNK * HEAD_DIM * size_of::<f32>();
    let decays = 2 * 4 * CHUNK * size_of::<f32>();
    let shares = (2 * THREADS as usize / 32 + 2) * size_of::<u32>();
    (chunks + weights + sums + decays + shares).next_multiple_of(16)
}

/// Finds the kernel for a device, dtypes and sizes, where there is one, with its geometry.
pub(super) fn choose(
    device: &Device,
    input: &SsmInputs<'_>,
    args: &SsmArgs,
) -> Option<(&'static Kernel<SsmArgs>, Dims)> {
    // Smaller GPUs have less shared memory than a block needs.
    let is_able = device.compute_capability().is_some_and(is_large);
    let kernels = match args.state_size {
        64 => &N64,
        128 => &N128,
        _ => return None,
    };
    let kernel = match input.state.dtype() {
        DType::F32 => &kernels[0],
        DType::Bf16 => &kernels[1],
        _ => return None,
    };
    let is_known = input.x.dtype() == DType::Bf16 && args.head_dim as usize == HEAD_DIM && args.rows > 0;
    if !is_able || !is_known || !is_in_words(input, args) || !is_countable(args) {
        return None;
    }
    let dims = Dims::linear(BLOCKS * device.num_multiprocessors(), THREADS);
    Some((kernel, Dims { shared_bytes: shared_bytes(args.state_size as usize) as u32, ..dims }))
}

/// Tells whether all rows and states lie at multiples of 16 bytes.
fn is_in_words(input: &SsmInputs<'_>, args: &SsmArgs) -> bool {
    let is_in_words = |address: DevicePtr, stride: i64, dtype: DType| {
        address.as_u64().is_multiple_of(16) && (stride as usize * dtype.size_bytes()).is_multiple_of(16)
    };
    is_in_words(args.x, args.x_stride, DType::Bf16)
        && is_in_words(args.b, args.b_stride, DType::Bf16)
        && is_in_words(args.c, args.c_stride, DType::Bf16)
        && is_in_words(args.state, args.slot_stride, input.state.dtype())
        && args.out.as_u64().is_multiple_of(16)
}

/// Tells whether the heads of all sequences can be counted in 32 bits.
fn is_countable(args: &SsmArgs) -> bool {
    args.sequences.checked_mul(args.heads).is_some_and(|heads| heads < u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_blocks_fit_into_a_multiprocessor() {
        // Of 228 KiB, each block takes 1 KiB for itself.
        assert!([64, 128].iter().all(|n| BLOCKS as usize * (shared_bytes(*n) + 1024) <= 228 << 10));
        assert_eq!(shared_bytes(128), 110_672);
    }
}
