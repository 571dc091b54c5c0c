// One token and one page number for each thread. Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "bcg.cuh"

extern "C" __global__ void unpack_inputs(UnpackInputsArgs a) {
    wait_for_inputs();
    release_dependents();
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.sequences * a.width) a.page_table[(i64)(i / a.width) * a.table_stride + i % a.width] = a.packed[i];
    if (i >= a.rows) return;
    i32 token = a.tokens[i];
    if (token >= 0) return;
    u32 row = (u32)(-1 - token);
    a.tokens[i] = row < a.num_chosen ? a.chosen[row] : 0;
}
