// One row for each block in x. Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "bcg.cuh"

extern "C" __global__ void copy_rows(CopyRowsArgs a) {
    wait_for_inputs();
    release_dependents();
    i64 row = blockIdx.x;
    copy_row(a.dst + row * a.dst_stride_bytes, a.src + row * a.src_stride_bytes, a.row_bytes);
}
