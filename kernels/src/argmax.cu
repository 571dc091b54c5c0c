// One block per row. Host reference, shapes and geometry: bcg-models/src/ops/argmax.rs.
#include "bcg.cuh"

struct ArgmaxArgs {
    const float* logits;
    i32* out;
    i64 stride;
    u32 columns;
    u32 padding;
};

// The larger value wins, then the lower index; NaN is never offered.
struct Best {
    float value;
    u32 index;
};

BCG_DEVICE Best better(Best a, Best b) {
    return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

BCG_DEVICE Best warp_best(Best v) {
    for (int offset = 16; offset > 0; offset /= 2) {
        Best other = {__shfl_xor_sync(FULL_WARP, v.value, offset), __shfl_xor_sync(FULL_WARP, v.index, offset)};
        v = better(v, other);
    }
    return v;
}

extern "C" __global__ void argmax(ArgmaxArgs a) {
    __shared__ Best partial[32];
    const float* row = a.logits + (i64)blockIdx.x * a.stride;
    const Best none = {minus_infinity(), 0xffffffffu};
    Best best = none;
    for (u32 c = threadIdx.x; c < a.columns; c += blockDim.x) {
        float v = row[c];
        if (v == v) best = better(best, Best{v, c});
    }
    best = warp_best(best);
    u32 lane = threadIdx.x % 32;
    if (lane == 0) partial[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x < 32) {
        best = warp_best(lane < blockDim.x / 32 ? partial[lane] : none);
        if (lane == 0) a.out[blockIdx.x] = best.index == none.index ? 0 : (i32)best.index;
    }
}
