// One token for each block in x, pieces of its key and value in y. Host reference: host.rs;
// shapes and geometry: mod.rs.
#include "bcg.cuh"

struct KvWriteArgs {
    const u8* k;
    const u8* v;
    const i32* slots;
    u8* k_cache;
    u8* v_cache;
    i64 k_stride_bytes;
    i64 v_stride_bytes;
    i64 k_page_bytes;  // from one page to the next
    i64 v_page_bytes;
    i64 k_bytes;
    i64 v_bytes;
    i64 num_pages;
    u32 page_size;
    u32 padding;
};

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
