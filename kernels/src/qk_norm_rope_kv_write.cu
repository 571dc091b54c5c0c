// One warp per token and head (Hq query heads, then Hkv key heads, then Hkv value heads).
// Host reference, shapes and geometry: bcg-models/src/ops/qk_norm_rope_kv_write.rs.
#include "bcg.cuh"

struct QkNormRopeKvWriteArgs {
    const void* qkv;
    const void* q_weight;
    const void* k_weight;
    const float* inv_freq;
    const i32* positions;
    const i32* slots;
    void* q_out;
    void* k_cache;
    void* v_cache;
    i64 qkv_stride;
    i64 page_stride;  // elements from one page of a cache to the next
    i64 num_pages;
    u32 tokens;
    u32 q_heads;
    u32 kv_heads;
    u32 head_dim;
    u32 page_size;
    float eps;
};

constexpr u32 PER_LANE_MAX = 8;  // head_dim up to 256

// Normalises one head and rotates it; lane l holds the elements l, l + 32, …, so both halves of a pair are its own
// only when D is a multiple of 64; shared memory serves every D.
template <typename T>
BCG_DEVICE void norm_rope(const QkNormRopeKvWriteArgs& a, const T* in, const T* weight, T* out, float* head, i32 position) {
    u32 lane = threadIdx.x % 32, half = a.head_dim / 2;
    float values[PER_LANE_MAX], sum = 0.0f;
#pragma unroll
    for (u32 j = 0; j < PER_LANE_MAX; j++) {
        u32 d = lane + 32 * j;
        values[j] = d < a.head_dim ? to_f32(in[d]) : 0.0f;
        sum += values[j] * values[j];
    }
    sum = warp_reduce(sum, Sum());
    float scale = 1.0f / sqrtf(sum / (float)a.head_dim + a.eps);
#pragma unroll
    for (u32 j = 0; j < PER_LANE_MAX; j++) {
        u32 d = lane + 32 * j;
        if (d < a.head_dim) head[d] = round_to<T>(round_to<T>(values[j] * scale) * to_f32(weight[d]));
    }
    __syncwarp();
    for (u32 i = lane; i < half; i += 32) {
        float angle = (float)position * a.inv_freq[i], sine, cosine;
        sincosf(angle, &sine, &cosine);
        float low = head[i], high = head[i + half];
        out[i] = from_f32<T>(low * cosine - high * sine);
        out[i + half] = from_f32<T>(high * cosine + low * sine);
    }
}

template <typename T> BCG_DEVICE void qk_norm_rope_kv_write(const QkNormRopeKvWriteArgs& a) {
    extern __shared__ float heads[];
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, all = a.q_heads + 2 * a.kv_heads;
    i64 item = (i64)blockIdx.x * (blockDim.x / 32) + warp;
    if (item >= (i64)a.tokens * all) return;
    i64 token = item / all;
    u32 head = (u32)(item % all);
    const T* in = (const T*)a.qkv + token * a.qkv_stride + (i64)head * a.head_dim;
    float* scratch = heads + warp * a.head_dim;
    if (head < a.q_heads) {
        T* out = (T*)a.q_out + (token * a.q_heads + head) * a.head_dim;
        norm_rope(a, in, (const T*)a.q_weight, out, scratch, a.positions[token]);
        return;
    }
    i64 slot = a.slots[token];
    if (slot < 0 || slot >= a.num_pages * a.page_size) return;  // a padded row
    bool is_key = head < a.q_heads + a.kv_heads;
    u32 kv_head = (head - a.q_heads) % a.kv_heads;
    i64 place = slot / a.page_size * a.page_stride + (slot % a.page_size * a.kv_heads + kv_head) * a.head_dim;
    if (is_key) {
        norm_rope(a, in, (const T*)a.k_weight, (T*)a.k_cache + place, scratch, a.positions[token]);
    } else {
        T* out = (T*)a.v_cache + place;
        for (u32 d = lane; d < a.head_dim; d += 32) out[d] = in[d];
    }
}

extern "C" __global__ void qk_norm_rope_kv_write_bf16(QkNormRopeKvWriteArgs a) { qk_norm_rope_kv_write<bf16>(a); }
extern "C" __global__ void qk_norm_rope_kv_write_f16(QkNormRopeKvWriteArgs a) { qk_norm_rope_kv_write<f16>(a); }
extern "C" __global__ void qk_norm_rope_kv_write_f32(QkNormRopeKvWriteArgs a) { qk_norm_rope_kv_write<float>(a); }
