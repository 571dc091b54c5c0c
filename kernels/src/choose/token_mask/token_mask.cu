// Masks in x, pieces of a row in y. Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "bcg.cuh"

extern "C" __global__ void token_mask(TokenMaskArgs a) {
    wait_for_inputs();
    release_dependents();
    u32 b = (u32)a.rows[blockIdx.x];  // a negative one is large
    if (b >= a.num_rows) return;
    float* logits = a.logits + b * a.stride;
    const u32* mask = a.mask + (i64)blockIdx.x * a.words;
    for (u32 v = blockIdx.y * blockDim.x + threadIdx.x; v < a.columns; v += gridDim.y * blockDim.x)
        if ((mask[v / 32] >> v % 32 & 1) == 0) logits[v] = minus_infinity();
}
