// One warp per query row and head. Host reference, shapes and geometry: bcg-models/src/ops/attention_prefill.rs.
#include "paged_attention.cuh"

struct AttentionPrefillArgs {
    const void* q;
    void* out;
    const i32* cu_seqlens_q;
    const i32* kv_lens;
    PagedKv kv;
    i64 q_stride;
    u32 rows;
    u32 sequences;
    u32 q_heads;
    float scale;
};

template <typename T> BCG_DEVICE void attention_prefill(const AttentionPrefillArgs& a) {
    i64 item = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (item >= (i64)a.rows * a.q_heads) return;
    i64 row = item / a.q_heads;
    u32 head = (u32)(item % a.q_heads);
    if (row < a.cu_seqlens_q[0] || row >= a.cu_seqlens_q[a.sequences]) return;  // a padded row: left untouched
    u32 low = 0, high = a.sequences;  // cu_seqlens_q[low] <= row < cu_seqlens_q[high]
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (a.cu_seqlens_q[middle] <= row) low = middle;
        else high = middle;
    }
    // The sequence's last query sees all its keys, the one before it one key less.
    i64 end = (i64)a.kv_lens[low] - (a.cu_seqlens_q[low + 1] - 1 - row);
    i64 capacity = (i64)a.kv.max_pages * a.kv.page_size;
    if (end > capacity) end = capacity;
    const T* q = (const T*)a.q + row * a.q_stride + (i64)head * a.kv.head_dim;
    Softmax s;
    softmax_init(s);
    attend(s, a.kv, q, a.scale, low, head / (a.q_heads / a.kv.kv_heads), 0, end, 1);
    softmax_store(s, a.kv.head_dim, (T*)a.out + item * a.kv.head_dim);
}

extern "C" __global__ void attention_prefill_bf16(AttentionPrefillArgs a) { attention_prefill<bf16>(a); }
extern "C" __global__ void attention_prefill_f16(AttentionPrefillArgs a) { attention_prefill<f16>(a); }
extern "C" __global__ void attention_prefill_f32(AttentionPrefillArgs a) { attention_prefill<float>(a); }
