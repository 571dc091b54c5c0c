// What the kernels of mla_prefill share: the items of the plan. Rust twin: mod.rs.
#pragma once
#include "args.cuh"
#include "latent_attention.cuh"

// One item of the plan: up to PLAN_ROWS query rows of one sequence.
struct PlanItem {
    u32 sequence;
    i32 row;      // the first query row
    i32 row_end;  // behind the last one
    i32 shift;    // a row's position in its sequence is row + shift
    i32 keys;     // that the last row sees
};

BCG_DEVICE u32 num_items(const MlaPrefillArgs& a) {
    i32 items = a.plan[0];
    return items < 0 ? 0 : min((u32)items, a.plan_items);
}

// The keys of a sequence, as far as its page table goes.
BCG_DEVICE i32 num_keys(const MlaPrefillArgs& a, u32 sequence) {
    return (i32)max(min((i64)a.kv_lens[sequence], (i64)a.kv.max_pages * a.kv.page_size), (i64)0);
}

BCG_DEVICE PlanItem load_item(const MlaPrefillArgs& a, u32 index) {
    const i32* item = a.plan + 1 + 2 * index;
    PlanItem p;
    p.sequence = (u32)item[0];
    i32 end = a.cu_seqlens_q[p.sequence + 1];
    p.row = item[1];
    p.row_end = min(min(p.row + (i32)PLAN_ROWS, end), (i32)a.rows);
    p.shift = a.kv_lens[p.sequence] - end;
    p.keys = max(min(p.row_end + p.shift, num_keys(a, p.sequence)), 0);
    return p;
}

// The item of this block's turn, if there is one: back and forth over the blocks, so that each gets as much work.
BCG_DEVICE bool next_turn(u32 turn, u64 total, u64& index) {
    index = (u64)turn * gridDim.x + (turn % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    return index < total;
}
