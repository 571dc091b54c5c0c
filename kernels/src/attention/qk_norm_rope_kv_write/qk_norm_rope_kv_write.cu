// One block per token; a group of lanes per head (Hq query heads, then Hkv key heads, then Hkv value heads).
// Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "bcg.cuh"


// A lane's pairs of one head: elements first … and, D / 2 further on, their partners.
template <typename T> struct Pairs {
    Pack<T> low, high;
};

template <bool WIDE, typename T> BCG_DEVICE Pairs<T> load_pairs(const T* head, u32 first, u32 half) {
    return {load_pack<WIDE>(head, first, half), load_pack<WIDE>(head + half, first, half)};
}

// What the heads of a token share: the turns of its pairs, and its place in a page, -1 for none.
struct Token {
    float cosines[HEAD_DIM_MAX / 2], sines[HEAD_DIM_MAX / 2];
    i64 place;
};

// The first thread finds the place, the first D / 2 the turns.
BCG_DEVICE void find_token(Token& t, const QkNormRopeKvWriteArgs& a) {
    u32 half = a.head_dim / 2;
    float position = (float)a.positions[blockIdx.x];
    for (u32 i = threadIdx.x; i < half; i += blockDim.x) sincosf(position * a.inv_freq[i], &t.sines[i], &t.cosines[i]);
    if (threadIdx.x == blockDim.x - 1) {
        i32 slot = a.slots[blockIdx.x];
        u32 page = (u32)slot / a.page_size, offset = (u32)slot % a.page_size;
        i64 place = page * a.page_stride + (i64)offset * a.kv_heads * a.head_dim;
        t.place = slot >= 0 && page < a.num_pages ? place : -1;  // a padded row has none
    }
}

// Normalises one head by its group of lanes and turns its pairs, leaving values; lanes beyond the head hold zeros.
// Called by whole warps.
template <typename T>
BCG_DEVICE void norm_rope(Pairs<T>& x, const Pairs<T>& weight, const Token& token, u32 first,
                          const QkNormRopeKvWriteArgs& a, bool is_value) {
    constexpr u32 LEN = Pack<T>::LEN;
    float sum = 0.0f;
#pragma unroll
    for (u32 e = 0; e < LEN; e++) sum += get(x.low, e) * get(x.low, e) + get(x.high, e) * get(x.high, e);
    for (u32 offset = a.group / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, offset);
    if (is_value) return;
    float scale = 1.0f / sqrtf(sum / (float)a.head_dim + a.eps);
    float lows[LEN], highs[LEN];
#pragma unroll
    for (u32 e = 0; e < LEN; e++) {
        float cosine = token.cosines[first + e], sine = token.sines[first + e];
        float low = round_to<T>(round_to<T>(get(x.low, e) * scale) * get(weight.low, e));
        float high = round_to<T>(round_to<T>(get(x.high, e) * scale) * get(weight.high, e));
        lows[e] = low * cosine - high * sine;
        highs[e] = high * cosine + low * sine;
    }
    x = {pack<T>(lows), pack<T>(highs)};
}

template <typename T, bool WIDE> BCG_DEVICE void qk_norm_rope_kv_write(const QkNormRopeKvWriteArgs& a) {
    __shared__ __align__(16) Token token;
    u32 half = a.head_dim / 2, all = a.q_heads + 2 * a.kv_heads, shift = 31 - __clz(a.group);
    u32 first = (threadIdx.x & (a.group - 1)) * Pack<T>::LEN, end = first < half ? half : 0;
    u32 head = threadIdx.x >> shift, heads = blockDim.x >> shift;
    const T* qkv = (const T*)a.qkv + blockIdx.x * a.qkv_stride;
    auto weights = [&] { return load_pairs<WIDE>((const T*)(head < a.q_heads ? a.q_weight : a.k_weight), first, half); };
    auto elements = [&] { return load_pairs<WIDE>(qkv + (i64)head * a.head_dim, first, head < all ? half : 0); };
    Pairs<T> weight = weights();
    wait_for_inputs();
    release_dependents();
    Pairs<T> x = elements();
    find_token(token, a);
    __syncthreads();
    for (u32 base = 0; base < all; base += heads, head += heads) {
        if (base > 0) {
            weight = weights();
            x = elements();
        }
        bool is_q = head < a.q_heads, is_value = head >= a.q_heads + a.kv_heads;
        norm_rope(x, weight, token, first & (HEAD_DIM_MAX / 2 - 1), a, is_value);
        T* out = (T*)a.q_out + ((i64)blockIdx.x * a.q_heads + head) * a.head_dim;
        if (!is_q) {
            u32 kv_head = head - a.q_heads - (is_value ? a.kv_heads : 0);
            out = (T*)(is_value ? a.v_cache : a.k_cache) + token.place + (i64)kv_head * a.head_dim;
        }
        if (head >= all || (!is_q && token.place < 0)) continue;
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

// 16-bit elements leave room for two blocks of the most threads that the op asks for; f32 needs its registers.
extern "C" __global__ __launch_bounds__(THREADS_MAX, 2) void qk_norm_rope_kv_write_bf16(QkNormRopeKvWriteArgs a) {
    qk_norm_rope_kv_write<bf16>(a);
}
extern "C" __global__ __launch_bounds__(THREADS_MAX, 2) void qk_norm_rope_kv_write_f16(QkNormRopeKvWriteArgs a) {
    qk_norm_rope_kv_write<f16>(a);
}
extern "C" __global__ __launch_bounds__(THREADS_MAX) void qk_norm_rope_kv_write_f32(QkNormRopeKvWriteArgs a) {
    qk_norm_rope_kv_write<float>(a);
}
