// One row for each block in x. Host reference, shapes and geometry: bcg-models/src/ops/scrub_tail.rs.
#include "bcg.cuh"

struct ScrubTailArgs {
    u8* x;
    const i32* valid_rows;
    i64 stride_bytes;
    i64 row_bytes;
};

extern "C" __global__ void scrub_tail(ScrubTailArgs a) {
    wait_for_inputs();
    release_dependents();
    i64 row = blockIdx.x;
    if (row >= *a.valid_rows) fill_row(a.x + row * a.stride_bytes, a.row_bytes, 0);
}
