// One row for each block in x. Host reference: host.rs; shapes and geometry: mod.rs.
#include "bcg.cuh"

struct FillArgs {
    u8* x;
    u64 pattern;  // the element, repeated to 8 bytes
    i64 stride_bytes;
    i64 row_bytes;
};

extern "C" __global__ void fill(FillArgs a) {
    wait_for_inputs();
    release_dependents();
    fill_row(a.x + (i64)blockIdx.x * a.stride_bytes, a.row_bytes, a.pattern);
}
