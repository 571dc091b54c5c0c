// One block per row. Host reference, shapes and geometry: bcg-models/src/ops/scrub_tail.rs.
#include "bcg.cuh"

struct ScrubTailArgs {
    u8* x;
    const i32* valid_rows;
    i64 stride_bytes;
    i64 row_bytes;
};

extern "C" __global__ void scrub_tail(ScrubTailArgs a) {
    i64 row = blockIdx.x;
    if (row >= *a.valid_rows) block_zero(a.x + row * a.stride_bytes, a.row_bytes);
}
