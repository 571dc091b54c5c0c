// One block per token. Host reference, shapes and geometry: bcg-models/src/ops/embedding.rs.
#include "bcg.cuh"

struct EmbeddingArgs {
    const i32* ids;
    const u8* table;
    u8* out;
    i64 table_stride_bytes;
    i64 row_bytes;
    i64 table_rows;
};

extern "C" __global__ void embedding(EmbeddingArgs a) {
    i64 id = a.ids[blockIdx.x];
    u8* out = a.out + (i64)blockIdx.x * a.row_bytes;
    if (id >= 0 && id < a.table_rows) block_copy(out, a.table + id * a.table_stride_bytes, a.row_bytes);
    else block_zero(out, a.row_bytes);
}
