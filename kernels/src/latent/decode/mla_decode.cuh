// The arguments of the kernels of mla_decode. Rust twin: mod.rs.
#pragma once
#include "decode_plan.cuh"
#include "latent_attention.cuh"

struct MlaDecodeArgs {
    const void* q_latent;  // [B H, L]
    const void* q_pe;      // [B, H R]
    void* out;             // [B H, L]
    const i32* kv_lens;
    BlockPlan* plan;
    float* partials;  // [2 blocks, 16, L], then [2 blocks, 16, 2]: the largest score and the sum
    LatentKv kv;
    u32 sequences;
    u32 heads;
    float scale;
    u32 padding;
};
