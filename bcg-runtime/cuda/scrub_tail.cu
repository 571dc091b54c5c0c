// Blocks take the padded rows in turn. Host reference, geometry: bcg-runtime/src/scrub.rs.
#include "args.cuh"
#include "bcg.cuh"

extern "C" __global__ void scrub_tail(ScrubTailArgs a) {
    wait_for_inputs();
    release_dependents();
    i64 valid = *a.valid_rows;
    for (i64 row = (valid > 0 ? valid : 0) + blockIdx.x; row < a.rows; row += gridDim.x)
        fill_row(a.x + row * a.stride_bytes, a.row_bytes, 0);
}
