// The gated activation, rounded as transformers does. Rust twin: bcg-models/src/ops/silu_mul.rs.
#pragma once
#include "bcg.cuh"

// SiLU of `gate`, rounded to T, times `up`; the caller rounds the product.
template <typename T> BCG_DEVICE float silu_mul(float gate, float up) {
    return round_to<T>(__fdividef(gate, 1.0f + expf(-gate))) * up;
}
