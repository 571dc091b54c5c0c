// The gated activation of one element.
#pragma once
#include "bcg.cuh"

// silu(gate) * up, where the first factor is rounded to T; the caller rounds the product.
template <typename T> BCG_DEVICE float silu_times(float gate, float up) {
    return round_to<T>(__fdividef(gate, 1.0f + expf(-gate))) * up;
}
