// For any dtype and widths: a block takes the rows of an item for one head, one after the other. It turns the query into a
// latent, attends to latents as a decode does, and turns the mean into a value.
// Host reference: host.rs; shapes and geometry: mod.rs.
#include "mla_prefill.cuh"

constexpr u32 THREADS = 32 * ATTEND_WARPS;
constexpr u32 LATENT_MAX = 32 * LATENT_PER_LANE;

template <typename T> BCG_DEVICE void attend_row(const MlaPrefillArgs& a, const PlanItem& p, u32 head, i64 row) {
    __shared__ float latent[LATENT_MAX];
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, latent_dim = a.kv.latent_dim;
    const T* q = (const T*)a.q + row * a.q_stride + (i64)head * (a.nope_dim + a.kv.rope_dim);
    const T* q_pe = (const T*)a.q_pe + (row * a.heads + head) * a.kv.rope_dim;
    const T* weight = (const T*)a.weight + (i64)head * (a.nope_dim + a.value_dim) * latent_dim;
    for (u32 l = threadIdx.x; l < latent_dim; l += THREADS) {
        float sum = 0.0f;
        for (u32 d = 0; d < a.nope_dim; d++) sum += to_f32(q[d]) * to_f32(weight[(i64)d * latent_dim + l]);
        latent[l] = sum;
    }
    __syncthreads();
    LatentQuery query;
#pragma unroll
    for (u32 j = 0; j < LATENT_PER_LANE; j++) query.latent[j] = j < latent_dim / 32 ? latent[lane + 32 * j] : 0.0f;
#pragma unroll
    for (u32 j = 0; j < ROPE_PER_LANE; j++) query.rope[j] = j < a.kv.rope_dim / 32 ? to_f32(q_pe[lane + 32 * j]) : 0.0f;
    i64 end = min(row + p.shift + 1, (i64)p.keys);
    LatentSoftmax s = attend<T>(a.kv, query, a.scale, p.sequence, warp, end, ATTEND_WARPS);
    merge_warps(s);  // all threads have read the query
    if (warp == 0) {
#pragma unroll
        for (u32 j = 0; j < LATENT_PER_LANE; j++)
            if (j < latent_dim / 32) latent[lane + 32 * j] = s.acc[j];
    }
    __syncthreads();
    weight += (i64)a.nope_dim * latent_dim;
    T* out = (T*)a.out + (row * a.heads + head) * a.value_dim;
    for (u32 v = warp; v < a.value_dim; v += ATTEND_WARPS) {
        float sum = 0.0f;
        for (u32 l = lane; l < latent_dim; l += 32) sum += latent[l] * to_f32(weight[(i64)v * latent_dim + l]);
        sum = warp_reduce(sum, Sum());
        if (lane == 0) out[v] = from_f32<T>(sum);
    }
    __syncthreads();  // before the next row's query
}

template <typename T> BCG_DEVICE void mla_prefill(const MlaPrefillArgs& a) {
    wait_for_inputs();
    release_dependents();
    u64 total = (u64)num_items(a) * a.heads, index;
    for (u32 turn = 0; next_turn(turn, total, index); turn++) {
        PlanItem p = load_item(a, (u32)(index / a.heads));
        for (i64 row = p.row; row < p.row_end; row++) attend_row<T>(a, p, (u32)(index % a.heads), row);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) mla_prefill_bf16(MlaPrefillArgs a) { mla_prefill<bf16>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) mla_prefill_f16(MlaPrefillArgs a) { mla_prefill<f16>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) mla_prefill_f32(MlaPrefillArgs a) { mla_prefill<float>(a); }
