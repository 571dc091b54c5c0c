// Paged latents and rope keys, and the online softmax of one query head over them by the warps of a block; shared by the
// kernels of latent attention for any dtype. Their bounds and ATTEND_WARPS stand in kernels/src/latent/latent_kv.rs.
#pragma once
#include "args.cuh"
#include "bcg.cuh"

constexpr u32 LATENT_PER_LANE = LATENT_DIM_MAX / 32;  // lane l holds the elements l, l + 32, …
constexpr u32 ROPE_PER_LANE = ROPE_DIM_MAX / 32;

// A lane's part of a query.
struct LatentQuery {
    float latent[LATENT_PER_LANE];
    float rope[ROPE_PER_LANE];
};

// What a warp knows after some keys: the largest score, the sum of exponentials relative to it, the weighted latents.
struct LatentSoftmax {
    float max;
    float sum;
    float acc[LATENT_PER_LANE];
};

// Attends to the keys first, first + step, … below end of sequence b. A page outside the cache is skipped.
template <typename T>
BCG_DEVICE LatentSoftmax attend(const LatentKvArgs& kv, const LatentQuery& q, float scale, i64 b, i64 first, i64 end, i64 step) {
    u32 lane = threadIdx.x % 32, pieces = kv.latent_dim / 32, rope_pieces = kv.rope_dim / 32;
    LatentSoftmax s = {};
    s.max = minus_infinity();
    for (i64 key = first; key < end; key += step) {
        i64 page = kv.page_table[b * kv.max_pages + key / kv.page_size], offset = key % kv.page_size;
        if (page < 0 || page >= kv.num_pages) continue;
        const T* latent = (const T*)kv.latents + page * kv.latent_page_stride + offset * kv.latent_dim + lane;
        const T* rope = (const T*)kv.rope_keys + page * kv.rope_page_stride + offset * kv.rope_dim + lane;
        float values[LATENT_PER_LANE], dot = 0.0f;
#pragma unroll
        for (u32 j = 0; j < LATENT_PER_LANE; j++) {
            values[j] = j < pieces ? to_f32(latent[32 * j]) : 0.0f;
            dot += q.latent[j] * values[j];
        }
#pragma unroll
        for (u32 j = 0; j < ROPE_PER_LANE; j++)
            if (j < rope_pieces) dot += q.rope[j] * to_f32(rope[32 * j]);
        float score = warp_reduce(dot, Sum()) * scale;
        float max = fmaxf(s.max, score);
        float kept = expf(s.max - max), weight = expf(score - max);
        s.max = max;
        s.sum = s.sum * kept + weight;
#pragma unroll
        for (u32 j = 0; j < LATENT_PER_LANE; j++) s.acc[j] = s.acc[j] * kept + weight * values[j];
    }
    return s;
}

// Merges the warps of a block of ATTEND_WARPS warps, in their order; warp 0 gets the weighted mean, zeros where no key was
// seen. Called by all threads.
BCG_DEVICE void merge_warps(LatentSoftmax& s) {
    __shared__ LatentSoftmax parts[ATTEND_WARPS][32];
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();  // the call before may still be read
    parts[warp][lane] = s;
    __syncthreads();
    if (warp != 0) return;
    for (u32 w = 1; w < ATTEND_WARPS; w++) {
        const LatentSoftmax& other = parts[w][lane];
        if (other.sum == 0.0f) continue;  // a warp without a key
        float max = fmaxf(s.max, other.max);
        float kept = expf(s.max - max), weight = expf(other.max - max);
        s.max = max;
        s.sum = s.sum * kept + other.sum * weight;
#pragma unroll
        for (u32 j = 0; j < LATENT_PER_LANE; j++) s.acc[j] = s.acc[j] * kept + other.acc[j] * weight;
    }
    float inverse = s.sum > 0.0f ? 1.0f / s.sum : 0.0f;
#pragma unroll
    for (u32 j = 0; j < LATENT_PER_LANE; j++) s.acc[j] *= inverse;
}
