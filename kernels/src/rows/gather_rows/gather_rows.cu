// One output row for each block in x. Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "bcg.cuh"

extern "C" __global__ void gather_rows(GatherRowsArgs a) {
    wait_for_inputs();
    release_dependents();
    i64 row = a.index[blockIdx.x] - a.first_row;
    u8* out = a.out + (i64)blockIdx.x * a.row_bytes;
    if (row >= 0 && row < a.x_rows) copy_row(out, a.x + row * a.x_stride_bytes, a.row_bytes);
    else fill_row(out, a.row_bytes, 0);
}
