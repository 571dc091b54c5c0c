// One entry for each thread. Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "bcg.cuh"

extern "C" __global__ void logit_bias(LogitBiasArgs a) {
    wait_for_inputs();
    release_dependents();
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.num_entries) return;
    u32 b = (u32)a.rows[i], token = (u32)a.tokens[i];  // a negative one is large
    if (b < a.num_rows && token < a.columns) a.logits[b * a.stride + token] += a.values[i];
}
