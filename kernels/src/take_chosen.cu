// One token for each thread. Host reference, shapes and geometry: bcg-models/src/ops/take_chosen.rs.
#include "bcg.cuh"

struct TakeChosenArgs {
    i32* tokens;
    const i32* chosen;
    u32 rows;
    u32 num_chosen;
};

extern "C" __global__ void take_chosen(TakeChosenArgs a) {
    wait_for_inputs();
    release_dependents();
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.rows) return;
    i32 token = a.tokens[i];
    if (token >= 0) return;
    u32 row = (u32)(-1 - token);
    a.tokens[i] = row < a.num_chosen ? a.chosen[row] : 0;
}
