// For any dtype and head dim: one block per sequence and query head. Its warps take the keys in turn and are merged in
// the order of the warps.
// Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "paged_attention.cuh"

template <typename T> BCG_DEVICE void attention_decode(const AttentionDecodeArgs& a) {
    __shared__ Softmax parts[WARPS][32];
    wait_for_inputs();
    release_dependents();
    i64 b = blockIdx.x / a.q_heads;
    u32 head = blockIdx.x % a.q_heads, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    i64 end = a.kv_lens[b], capacity = (i64)a.kv.max_pages * a.kv.page_size;
    if (end > capacity) end = capacity;
    const T* q = (const T*)a.q + b * a.q_stride + (i64)head * a.kv.head_dim;
    Softmax s;
    softmax_init(s);
    attend(s, a.kv, q, a.scale, b, head / (a.q_heads / a.kv.kv_heads), warp, end, WARPS);
    parts[warp][lane] = s;
    __syncthreads();
    if (warp != 0) return;
    for (u32 w = 1; w < WARPS; w++) {
        const Softmax& other = parts[w][lane];
        if (other.sum == 0.0f) continue;  // a warp without a key
        float max = fmaxf(s.max, other.max);
        float kept = expf(s.max - max), weight = expf(other.max - max);
        s.max = max;
        s.sum = s.sum * kept + other.sum * weight;
        for (u32 j = 0; j < PER_LANE_MAX; j++) s.acc[j] = s.acc[j] * kept + other.acc[j] * weight;
    }
    softmax_store(s, a.kv.head_dim, (T*)a.out + (i64)blockIdx.x * a.kv.head_dim);
}

extern "C" __global__ void attention_decode_bf16(AttentionDecodeArgs a) { attention_decode<bf16>(a); }
extern "C" __global__ void attention_decode_f16(AttentionDecodeArgs a) { attention_decode<f16>(a); }
extern "C" __global__ void attention_decode_f32(AttentionDecodeArgs a) { attention_decode<float>(a); }
