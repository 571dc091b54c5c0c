// One block per output row. Host reference, shapes and geometry: bcg-models/src/ops/gather_rows.rs.
#include "bcg.cuh"

struct GatherRowsArgs {
    const u8* x;
    const i32* index;
    u8* out;
    i64 x_stride_bytes;
    i64 row_bytes;
    i64 x_rows;
};

extern "C" __global__ void gather_rows(GatherRowsArgs a) {
    i64 row = a.index[blockIdx.x];
    u8* out = a.out + (i64)blockIdx.x * a.row_bytes;
    if (row >= 0 && row < a.x_rows) block_copy(out, a.x + row * a.x_stride_bytes, a.row_bytes);
    else block_zero(out, a.row_bytes);
}
