// One token for each block in x, pieces of its key and value in y. Host reference: host.rs;
// shapes and geometry: mod.rs.
#include "args.cuh"
#include "bcg.cuh"

extern "C" __global__ void kv_write(KvWriteArgs a) {
    wait_for_inputs();
    release_dependents();
    i64 t = blockIdx.x;
    i32 slot = a.slots[t];
    u32 page = (u32)slot / a.page_size, offset = (u32)slot % a.page_size;
    if (slot < 0 || page >= a.num_pages) return;  // a padded row has none
    copy_row(a.k_cache + page * a.k_page_bytes + offset * a.k_bytes, a.k + t * a.k_stride_bytes, a.k_bytes);
    copy_row(a.v_cache + page * a.v_page_bytes + offset * a.v_bytes, a.v + t * a.v_stride_bytes, a.v_bytes);
}
