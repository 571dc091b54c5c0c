// For any dtype and widths: one block per sequence and query head. Its warps take the keys in turn and are merged in the
// order of the warps. Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "latent_attention.cuh"

template <typename T> BCG_DEVICE void mla_decode(const MlaDecodeArgs& a) {
    wait_for_inputs();
    release_dependents();
    i64 b = blockIdx.x / a.heads, end = min((i64)a.kv_lens[b], (i64)a.kv.max_pages * a.kv.page_size);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const T* q_latent = (const T*)a.q_latent + (i64)blockIdx.x * a.kv.latent_dim + lane;
    const T* q_pe = (const T*)a.q_pe + (i64)blockIdx.x * a.kv.rope_dim + lane;
    LatentQuery q;
#pragma unroll
    for (u32 j = 0; j < LATENT_PER_LANE; j++) q.latent[j] = j < a.kv.latent_dim / 32 ? to_f32(q_latent[32 * j]) : 0.0f;
#pragma unroll
    for (u32 j = 0; j < ROPE_PER_LANE; j++) q.rope[j] = j < a.kv.rope_dim / 32 ? to_f32(q_pe[32 * j]) : 0.0f;
    LatentSoftmax s = attend<T>(a.kv, q, a.scale, b, warp, end, ATTEND_WARPS);
    merge_warps(s);
    if (warp != 0) return;
    T* out = (T*)a.out + (i64)blockIdx.x * a.kv.latent_dim + lane;
#pragma unroll
    for (u32 j = 0; j < LATENT_PER_LANE; j++)
        if (j < a.kv.latent_dim / 32) out[32 * j] = from_f32<T>(s.acc[j]);
}

extern "C" __global__ void mla_decode_bf16(MlaDecodeArgs a) { mla_decode<bf16>(a); }
extern "C" __global__ void mla_decode_f16(MlaDecodeArgs a) { mla_decode<f16>(a); }
extern "C" __global__ void mla_decode_f32(MlaDecodeArgs a) { mla_decode<float>(a); }
