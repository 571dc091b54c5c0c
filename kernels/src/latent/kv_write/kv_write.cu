// One block per token: norms the latent, rotates the rope key and the queries' rope parts, writes latent and rope key.
// Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "bcg.cuh"

constexpr u32 PER_THREAD = LATENT_DIM_MAX / THREADS;  // elements of a latent
constexpr u32 HALF_MAX = ROPE_DIM_MAX / 2;            // pairs of a rope part

template <typename T> BCG_DEVICE void mla_kv_write(const MlaKvWriteArgs& a) {
    __shared__ float cosines[HALF_MAX], sines[HALF_MAX];
    u32 half = a.rope_dim / 2;
    i64 t = blockIdx.x;
    const T* weight = (const T*)a.weight;
    float weights[PER_THREAD];
#pragma unroll
    for (u32 j = 0; j < PER_THREAD; j++) {
        u32 i = threadIdx.x + j * THREADS;
        weights[j] = i < a.latent_dim ? to_f32(weight[i]) : 0.0f;
    }
    wait_for_inputs();
    release_dependents();
    if (threadIdx.x < half) {
        float sine, cosine;
        sincosf((float)a.positions[t] * a.inv_freq[threadIdx.x], &sine, &cosine);
        sines[threadIdx.x] = sine * a.rope_scale;
        cosines[threadIdx.x] = cosine * a.rope_scale;
    }
    i32 slot = a.slots[t];
    u32 page = (u32)slot / a.page_size, offset = (u32)slot % a.page_size;
    bool has_place = slot >= 0 && page < a.num_pages;  // a padded row has none
    const T* kv_a = (const T*)a.kv_a + t * a.kv_a_stride;
    float values[PER_THREAD], sum = 0.0f;
#pragma unroll
    for (u32 j = 0; j < PER_THREAD; j++) {
        u32 i = threadIdx.x + j * THREADS;
        values[j] = i < a.latent_dim ? to_f32(kv_a[i]) : 0.0f;
        sum += values[j] * values[j];
    }
    float scale = 1.0f / sqrtf(block_reduce(sum, 0.0f, Sum()) / (float)a.latent_dim + a.eps);  // the turns are there, too
    if (has_place) {
        T* latent = (T*)a.latents + page * a.latent_page_stride + (i64)offset * a.latent_dim;
#pragma unroll
        for (u32 j = 0; j < PER_THREAD; j++) {
            u32 i = threadIdx.x + j * THREADS;
            if (i < a.latent_dim) latent[i] = from_f32<T>(round_to<T>(values[j] * scale) * weights[j]);
        }
    }
    // The pairs of all heads, then those of the rope key.
    const T* q = (const T*)a.q + t * a.q_stride + (a.head_dim - a.rope_dim);
    T* q_pe = (T*)a.q_pe + t * a.heads * a.rope_dim;
    T* rope_key = (T*)a.rope_keys + page * a.rope_page_stride + (i64)offset * a.rope_dim;
    for (u32 p = threadIdx.x; p < (a.heads + 1) * half; p += THREADS) {
        u32 head = p / half, i = p % half;
        bool is_key = head == a.heads;
        if (is_key && !has_place) continue;
        const T* from = is_key ? kv_a + a.latent_dim : q + (i64)head * a.head_dim;
        T* to = is_key ? rope_key : q_pe + (i64)head * a.rope_dim;
        u32 first = a.is_interleaved ? 2 * i : i, second = a.is_interleaved ? 2 * i + 1 : i + half;
        float x = to_f32(from[first]), y = to_f32(from[second]);
        to[first] = from_f32<T>(x * cosines[i] - y * sines[i]);
        to[second] = from_f32<T>(y * cosines[i] + x * sines[i]);
    }
}

extern "C" __global__ __launch_bounds__(THREADS) void mla_kv_write_bf16(MlaKvWriteArgs a) { mla_kv_write<bf16>(a); }
extern "C" __global__ __launch_bounds__(THREADS) void mla_kv_write_f16(MlaKvWriteArgs a) { mla_kv_write<f16>(a); }
extern "C" __global__ __launch_bounds__(THREADS) void mla_kv_write_f32(MlaKvWriteArgs a) { mla_kv_write<float>(a); }
