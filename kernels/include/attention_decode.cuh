// The arguments of the kernels of attention_decode. Rust twin: kernels/src/attention/decode/mod.rs.
#pragma once
#include "paged_attention.cuh"

// A block's share of the work; Rust twin and rules: kernels/src/attention/decode_plan.rs.
struct BlockPlan {
    i32 sequence, item, tile, tiles;  // where the block begins, and how much it takes
    i32 first, last;                  // the blocks that the block's first and last item begin and end on
    i32 len;                          // keys of the sequence that it begins with
    u32 arrivals;  // pieces that are written of the item that begins but does not end on this block; 0 between runs
};

struct AttentionDecodeArgs {
    const void* q;
    void* out;
    const i32* kv_lens;
    BlockPlan* plan;
    float* partials;  // [2 blocks, heads, D], then [2 blocks, heads, 2]: the largest score and the sum
    PagedKv kv;
    i64 q_stride;
    u32 sequences;
    u32 q_heads;
    float scale;
    u32 padding;
};
