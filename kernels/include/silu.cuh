// SiLU alone, and as a gate that is rounded as transformers does.
#pragma once
#include "bcg.cuh"

// v / (1 + e^-v) in five instructions, so that a kernel of 4 bytes a value stays bound by memory; relative error below
// 2^-19 where |v| < 16.
BCG_DEVICE float silu(float v) {
    float e, sigmoid;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(v * -1.4426950408889634f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(sigmoid) : "f"(1.0f + e));
    return v * sigmoid;
}

// SiLU of `gate`, rounded to T, times `up`; the caller rounds the product. Rust twin: kernels/src/activation/silu_mul/host.rs.
template <typename T> BCG_DEVICE float silu_mul(float gate, float up) {
    return round_to<T>(__fdividef(gate, 1.0f + expf(-gate))) * up;
}
