// Rows in x, pieces of a row in y. Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "bcg.cuh"

constexpr u32 AT_ONCE = 4;  // rows that a thread loads ahead

template <typename T, bool WIDE> BCG_DEVICE void moe_combine(const MoeCombineArgs& a) {
    constexpr u32 LEN = Pack<T>::LEN;
    const T* y = (const T*)a.y;
    T* out = (T*)a.out + (i64)blockIdx.x * a.columns;
    wait_for_inputs();
    release_dependents();
    const i32* places = a.places + (i64)blockIdx.x * a.chosen;
    const float* weights = a.weights + (i64)blockIdx.x * a.chosen;
    const T* shared = a.shared && a.experts[(i64)blockIdx.x * a.chosen] >= 0 ? (const T*)a.shared + (i64)blockIdx.x * a.shared_stride : nullptr;
    u32 step = gridDim.y * blockDim.x * LEN;
    for (u32 c = (blockIdx.y * blockDim.x + threadIdx.x) * LEN; c < a.columns; c += step) {
        Pack<T> last = {};
        if (shared) last = load_pack<WIDE>(shared, c, a.columns);
        float sums[LEN] = {};
        for (u32 k = 0; k < a.chosen; k += AT_ONCE) {
            Pack<T> packs[AT_ONCE];
            float by[AT_ONCE];
#pragma unroll
            for (u32 u = 0; u < AT_ONCE; u++) {
                i32 place = k + u < a.chosen ? places[k + u] : -1;
                by[u] = place >= 0 ? weights[k + u] : 0.0f;
                packs[u] = {};
                if (place >= 0) packs[u] = load_pack<WIDE>(y + (i64)place * a.columns, c, a.columns);
            }
#pragma unroll
            for (u32 u = 0; u < AT_ONCE; u++)
#pragma unroll
                for (u32 e = 0; e < LEN; e++) sums[e] += by[u] * get(packs[u], e);
        }
#pragma unroll
        for (u32 e = 0; e < LEN; e++) sums[e] += get(last, e);
        store_pack<WIDE>(out, c, a.columns, pack<T>(sums));
    }
}

template <typename T> BCG_DEVICE void moe_combine(const MoeCombineArgs& a) {
    u64 low = (u64)a.y | (u64)a.shared | (u64)a.out | (a.shared_stride | a.columns) * sizeof(T);
    if (low % 16 == 0) moe_combine<T, true>(a);
    else moe_combine<T, false>(a);
}

extern "C" __global__ void moe_combine_bf16(MoeCombineArgs a) { moe_combine<bf16>(a); }
extern "C" __global__ void moe_combine_f16(MoeCombineArgs a) { moe_combine<f16>(a); }
extern "C" __global__ void moe_combine_f32(MoeCombineArgs a) { moe_combine<float>(a); }
