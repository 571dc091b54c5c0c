// One block for a head of a sequence, which passes over its state once: a group of lanes for each row, 16 bytes a lane.
// Host reference: host.rs; shapes and geometry: mod.rs.
#include "ssm.cuh"

constexpr u32 ROWS = 4;  // rows of the state that a group of lanes has on its way at once

// Elements first … of a row of B or C in f32, as many as a lane has of a row of the state; zeros beyond the row.
template <typename T, u32 LEN> BCG_DEVICE void load_columns(float (&to)[LEN], const T* row, u32 first, u32 columns) {
#pragma unroll
    for (u32 e = 0; e < LEN; e++) to[e] = first + e < columns ? to_f32(row[first + e]) : 0.0f;
}

template <typename T, typename S, bool WIDE> BCG_DEVICE void ssm_update(const SsmArgs& a) {
    constexpr u32 LEN = Pack<S>::LEN;
    u32 t = blockIdx.x / a.heads, head = blockIdx.x % a.heads, group = head / a.group_heads;
    // The lanes of a row: a power of two that covers it, if a warp can.
    u32 packs = (a.state_size + LEN - 1) / LEN, lanes = packs > 16 ? 32 : packs > 8 ? 16 : packs > 4 ? 8 : 4;
    u32 lane = threadIdx.x % lanes, first_row = threadIdx.x / lanes, step = blockDim.x / lanes;
    SsmHead params = load_head<T>(a, head);
    wait_for_inputs();
    release_dependents();
    const S* before = state_of<S>(a, a.slots.read[t], head);
    S* after = state_of<S>(a, a.slots.write[t], head);
    const T* x = (const T*)a.x + (i64)t * a.x_stride + (i64)head * a.head_dim;
    const T* b = (const T*)a.b + (i64)t * a.b_stride + (i64)group * a.state_size;
    const T* c = (const T*)a.c + (i64)t * a.c_stride + (i64)group * a.state_size;
    T* out = (T*)a.out + (i64)blockIdx.x * a.head_dim;
    float dt = time_step(a, params, to_f32(((const T*)a.dt)[(i64)t * a.dt_stride + head]));
    float decay = expf(dt * params.a);
    // All lanes of a warp take part in each turn, since they sum by shuffles.
    for (u32 base = first_row; base < a.head_dim + first_row; base += ROWS * step) {
        float xs[ROWS], sums[ROWS] = {};
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) xs[r] = base + r * step < a.head_dim ? to_f32(x[base + r * step]) : 0.0f;
        for (u32 n = lane * LEN; n < packs * LEN; n += lanes * LEN) {
            Pack<S> h[ROWS] = {};
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
                u32 p = base + r * step;
                if (before && p < a.head_dim) h[r] = load_pack<WIDE>(before + p * a.state_size, n, a.state_size);
            }
            float bs[LEN], cs[LEN];
            load_columns(bs, b, n, a.state_size);
            load_columns(cs, c, n, a.state_size);
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
                u32 p = base + r * step;
                float next[LEN];
#pragma unroll
                for (u32 e = 0; e < LEN; e++) {
                    next[e] = decay * get(h[r], e) + dt * xs[r] * bs[e];
                    sums[r] += cs[e] * next[e];
                }
                if (after && p < a.head_dim) store_pack<WIDE>(after + p * a.state_size, n, a.state_size, pack<S>(next));
            }
        }
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            for (u32 offset = lanes / 2; offset > 0; offset /= 2)
                sums[r] += __shfl_xor_sync(FULL_WARP, sums[r], offset);
            u32 p = base + r * step;
            if (lane == r % lanes && p < a.head_dim) out[p] = from_f32<T>(sums[r] + params.d * xs[r]);
        }
    }
}

template <typename T, typename S> BCG_DEVICE void ssm_update(const SsmArgs& a) {
    u64 low = (u64)a.state | (a.slot_stride | a.state_size) * sizeof(S);
    if (low % 16 == 0) ssm_update<T, S, true>(a);
    else ssm_update<T, S, false>(a);
}

// The dtype of the state, then that of all else. So many blocks a multiprocessor that some load while others store, and no
// more than registers are there for.
#define SSM_UPDATE(name, T, S, blocks) \
    extern "C" __global__ void __launch_bounds__(THREADS, blocks) name(SsmArgs a) { ssm_update<T, S>(a); }

SSM_UPDATE(ssm_update_state_f32_bf16, bf16, float, 4)
SSM_UPDATE(ssm_update_state_f32_f16, f16, float, 4)
SSM_UPDATE(ssm_update_state_f32_f32, float, float, 4)
SSM_UPDATE(ssm_update_state_bf16_bf16, bf16, bf16, 3)
SSM_UPDATE(ssm_update_state_bf16_f16, f16, bf16, 3)
SSM_UPDATE(ssm_update_state_bf16_f32, float, bf16, 3)
