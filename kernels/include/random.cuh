// Random bits that depend on a counter alone, by SplitMix64. Rust twin, with GOLDEN, the step from one counter to the next:
// kernels/src/random.rs.
#pragma once
#include "bcg.cuh"

// 64 random bits for each counter: the same on the host.
BCG_DEVICE u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}
