// The arguments of the kernels of attention_decode. Rust twin: mod.rs.
#pragma once
#include "decode_plan.cuh"
#include "paged_attention.cuh"

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
