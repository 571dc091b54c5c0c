// Online softmax of one query head over paged keys and values, by one warp; shared by prefill and decode.
// HEAD_DIM_MAX stands in kernels/src/attention/paged_kv.rs.
#pragma once
#include "args.cuh"
#include "bcg.cuh"

constexpr u32 PER_LANE_MAX = HEAD_DIM_MAX / 32;  // lane l holds the elements l, l + 32, …

// What a warp knows after some keys: the largest score, the sum of exponentials relative to it, the weighted values.
struct Softmax {
    float max;
    float sum;
    float acc[PER_LANE_MAX];
};

BCG_DEVICE void softmax_init(Softmax& s) {
    s.max = minus_infinity();
    s.sum = 0.0f;
    for (u32 j = 0; j < PER_LANE_MAX; j++) s.acc[j] = 0.0f;
}

// Attends to the keys first, first + step, … below end of sequence b. A page outside the cache is skipped.
template <typename T>
BCG_DEVICE void attend(Softmax& s, const PagedKvArgs& kv, const T* q, float scale, i64 b, u32 kv_head, i64 first, i64 end, i64 step) {
    u32 lane = threadIdx.x % 32, pieces = kv.head_dim / 32;
    float query[PER_LANE_MAX];
#pragma unroll
    for (u32 j = 0; j < PER_LANE_MAX; j++) query[j] = j < pieces ? to_f32(q[lane + 32 * j]) : 0.0f;
    for (i64 key = first; key < end; key += step) {
        i64 page = kv.page_table[b * kv.max_pages + key / kv.page_size];
        if (page < 0 || page >= kv.num_pages) continue;
        i64 place = page * kv.page_stride + (key % kv.page_size * kv.kv_heads + kv_head) * kv.head_dim + lane;
        const T* k = (const T*)kv.k + place;
        const T* v = (const T*)kv.v + place;
        float dot = 0.0f;
#pragma unroll
        for (u32 j = 0; j < PER_LANE_MAX; j++)
            if (j < pieces) dot += query[j] * to_f32(k[32 * j]);
        float score = warp_reduce(dot, Sum()) * scale;
        float max = fmaxf(s.max, score);
        float kept = expf(s.max - max), weight = expf(score - max);
        s.max = max;
        s.sum = s.sum * kept + weight;
#pragma unroll
        for (u32 j = 0; j < PER_LANE_MAX; j++)
            if (j < pieces) s.acc[j] = s.acc[j] * kept + weight * to_f32(v[32 * j]);
    }
}

// Writes the weighted mean; zeros where no key was seen.
template <typename T> BCG_DEVICE void softmax_store(const Softmax& s, u32 head_dim, T* out) {
    u32 lane = threadIdx.x % 32;
    float inverse = s.sum > 0.0f ? 1.0f / s.sum : 0.0f;
#pragma unroll
    for (u32 j = 0; j < PER_LANE_MAX; j++)
        if (j < head_dim / 32) out[lane + 32 * j] = from_f32<T>(s.acc[j] * inverse);
}
