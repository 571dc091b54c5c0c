// What both kernels of attention_prefill share: the plan of the work, and where its rows lie.
#pragma once
#include "args.cuh"
#include "prefill.cuh"

// One item of the plan for one head: up to PLAN_ROWS query rows of one sequence.
struct Work {
    i32 row;      // the first query row
    i32 row_end;  // behind the last one
    i32 shift;    // a row's position in its sequence is row + shift
    i32 keys;     // that the last row sees
    u32 head;
};

BCG_DEVICE u64 total_work(const AttentionPrefillArgs& a) {
    i32 items = a.plan[0];
    return (u64)(items < 0 ? 0 : min((u32)items, a.plan_items)) * a.q_heads;
}

// The item of this block's turn, if there is one: back and forth over the blocks, so that each gets as much work.
BCG_DEVICE bool next_work(u32 turn, u64 total, u64& index) {
    index = (u64)turn * gridDim.x + (turn % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    return index < total;
}

// Reads an item; `sequence` is where its page table is.
BCG_DEVICE Work load_work(const AttentionPrefillArgs& a, u64 index, u32& sequence) {
    const i32* item = a.plan + 1 + 2 * (index / a.q_heads);
    sequence = (u32)item[0];
    i32 end = a.cu_seqlens_q[sequence + 1];
    Work w;
    w.head = (u32)(index % a.q_heads);
    w.row = item[1];
    w.row_end = min(min(w.row + (i32)PLAN_ROWS, end), (i32)a.rows);
    w.shift = a.kv_lens[sequence] - end;
    w.keys = (i32)max(min((i64)w.row_end + w.shift, (i64)a.kv.max_pages * a.kv.page_size), (i64)0);
    return w;
}

// Where a key lies in the caches, NOWHERE behind the last one; `skipped` if its page is outside the cache.
BCG_DEVICE u32 find_key(const PagedKvArgs& kv, const i32* pages, u32 kv_head, i32 key, i32 keys, bool& skipped) {
    skipped = false;
    if (key >= keys) return NOWHERE;
    i64 page = pages[(u32)key / kv.page_size];
    skipped = page < 0 || page >= kv.num_pages;
    if (skipped) return NOWHERE;
    return (u32)((page * kv.page_stride + ((i64)((u32)key % kv.page_size) * kv.kv_heads + kv_head) * kv.head_dim) / 8);
}

BCG_DEVICE u32 find_query(const AttentionPrefillArgs& a, const Work& w, i32 row) {
    return row < w.row_end ? (u32)((row * a.q_stride + w.head * a.kv.head_dim) / 8) : NOWHERE;
}

// Writes the weighted means of rows `row` and `row + 8` of an item to the output.
template <typename T, u32 N>
BCG_DEVICE void store_rows(const TwoRows& rows, const AttentionPrefillArgs& a, const Work& w, i32 row, const float (&o)[N]) {
    rows.store((T*)a.out + w.head * (2 * N), (i64)a.q_heads * (2 * N), row, w.row_end, o);
}
