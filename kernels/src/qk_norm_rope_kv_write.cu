// One block per token; a group of lanes per head (Hq query heads, then Hkv key heads, then Hkv value heads).
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
    u32 q_heads;
    u32 kv_heads;
    u32 head_dim;
    u32 page_size;
    u32 group;  // lanes per head: the power of two from D / 2 / Pack::LEN on
    float eps;
};

// A lane's pairs of one head: elements first … and, D / 2 further on, their partners.
template <typename T> struct Pairs {
    Pack<T> low, high;
};

template <bool WIDE, typename T> BCG_DEVICE Pairs<T> load_pairs(const T* head, u32 first, u32 half) {
    return {load_pack<WIDE>(head, first, half), load_pack<WIDE>(head + half, first, half)};
}

// Normalises one head by its group of lanes and turns its pairs, leaving values; lanes beyond the head hold zeros.
// Called by whole warps.
template <typename T>
BCG_DEVICE void norm_rope(Pairs<T>& x, const Pairs<T>& weight, const float* cosines, const float* sines,
                          const QkNormRopeKvWriteArgs& a, bool is_value) {
    constexpr u32 LEN = Pack<T>::LEN;
    float sum = 0.0f;
#pragma unroll
    for (u32 e = 0; e < LEN; e++) {
        float low = to_f32(x.low.v[e]), high = to_f32(x.high.v[e]);
        sum += low * low + high * high;
    }
    for (u32 offset = a.group / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, offset);
    if (is_value) return;
    float scale = 1.0f / sqrtf(sum / (float)a.head_dim + a.eps);
#pragma unroll
    for (u32 e = 0; e < LEN; e++) {
        float low = round_to<T>(round_to<T>(to_f32(x.low.v[e]) * scale) * to_f32(weight.low.v[e]));
        float high = round_to<T>(round_to<T>(to_f32(x.high.v[e]) * scale) * to_f32(weight.high.v[e]));
        x.low.v[e] = from_f32<T>(low * cosines[e] - high * sines[e]);
        x.high.v[e] = from_f32<T>(high * cosines[e] + low * sines[e]);
    }
}

template <typename T, bool WIDE> BCG_DEVICE void qk_norm_rope_kv_write(const QkNormRopeKvWriteArgs& a) {
    constexpr u32 LEN = Pack<T>::LEN;
    extern __shared__ float4 shared[];
    float* turns = (float*)shared;  // the cosines of the token's pairs, then the sines
    u32 half = a.head_dim / 2, all = a.q_heads + 2 * a.kv_heads, shift = 31 - __clz(a.group);
    u32 first = (threadIdx.x & (a.group - 1)) * LEN, head = threadIdx.x >> shift, heads = blockDim.x >> shift;
    i64 token = blockIdx.x;
    const T* qkv = (const T*)a.qkv + token * a.qkv_stride;
    auto weights = [&] { return load_pairs<WIDE>((const T*)(head < a.q_heads ? a.q_weight : a.k_weight), first, half); };
    auto elements = [&] { return load_pairs<WIDE>(qkv + (i64)head * a.head_dim, first, head < all ? half : 0); };
    Pairs<T> weight = weights();
    wait_for_inputs();
    release_dependents();
    Pairs<T> x = elements();
    i32 slot = a.slots[token];
    float position = (float)a.positions[token];
    for (u32 i = threadIdx.x; i < half; i += blockDim.x) sincosf(position * a.inv_freq[i], turns + half + i, turns + i);
    __syncthreads();
    float cosines[LEN], sines[LEN];
#pragma unroll
    for (u32 e = 0; e < LEN; e++) {
        cosines[e] = first < half ? turns[first + e] : 0.0f;
        sines[e] = first < half ? turns[half + first + e] : 0.0f;
    }
    bool has_slot = slot >= 0 && slot < a.num_pages * a.page_size;  // a padded row has none
    u32 page = (u32)slot / a.page_size, offset = (u32)slot % a.page_size;
    i64 place = page * a.page_stride + (i64)offset * a.kv_heads * a.head_dim;
    for (u32 base = 0; base < all; base += heads, head += heads) {
        if (base > 0) {
            weight = weights();
            x = elements();
        }
        bool is_q = head < a.q_heads, is_v = head >= a.q_heads + a.kv_heads;
        norm_rope(x, weight, cosines, sines, a, is_v);
        T* out = (T*)a.q_out + (token * a.q_heads + head) * a.head_dim;
        if (!is_q) {
            u32 kv_head = head - a.q_heads - (is_v ? a.kv_heads : 0);
            out = (T*)(is_v ? a.v_cache : a.k_cache) + place + (i64)kv_head * a.head_dim;
        }
        u32 end = head < all && (is_q || has_slot) ? half : 0;
        store_pack<WIDE>(out, first, end, x.low);
        store_pack<WIDE>(out + half, first, end, x.high);
    }
}

template <typename T> BCG_DEVICE void qk_norm_rope_kv_write(const QkNormRopeKvWriteArgs& a) {
    u64 low = (u64)a.qkv | (u64)a.q_weight | (u64)a.k_weight | (u64)a.q_out | (u64)a.k_cache | (u64)a.v_cache;
    low |= (a.qkv_stride | a.page_stride) * sizeof(T);
    if (low % 16 == 0) qk_norm_rope_kv_write<T, true>(a);
    else qk_norm_rope_kv_write<T, false>(a);
}

extern "C" __global__ void qk_norm_rope_kv_write_bf16(QkNormRopeKvWriteArgs a) { qk_norm_rope_kv_write<bf16>(a); }
extern "C" __global__ void qk_norm_rope_kv_write_f16(QkNormRopeKvWriteArgs a) { qk_norm_rope_kv_write<f16>(a); }
extern "C" __global__ void qk_norm_rope_kv_write_f32(QkNormRopeKvWriteArgs a) { qk_norm_rope_kv_write<float>(a); }
