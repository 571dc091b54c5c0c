// One row for each block in x. Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "bcg.cuh"

extern "C" __global__ void fill(FillArgs a) {
    wait_for_inputs();
    release_dependents();
    fill_row(a.x + (i64)blockIdx.x * a.stride_bytes, a.row_bytes, a.pattern);
}
