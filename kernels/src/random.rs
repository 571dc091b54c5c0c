//! Random bits that depend on a counter alone, by SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
//! generators", 2014); CUDA twin: `kernels/include/random.cuh`.

/// From one counter to the next.
pub(super) const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// 64 random bits for each counter.
pub(super) const fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
