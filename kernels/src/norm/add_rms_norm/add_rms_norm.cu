// One block per row, which its threads keep in registers if it fits. Host reference: host.rs;
// shapes and geometry: mod.rs.
#include "args.cuh"
#include "rms_norm.cuh"

template <typename T, bool WIDE> BCG_DEVICE void add_rms_norm(const AddRmsNormArgs& a) {
    constexpr u32 LEN = Pack<T>::LEN;
    const T* x = (const T*)a.x + (i64)blockIdx.x * a.x_stride;
    const T* residual = (const T*)a.residual + (i64)blockIdx.x * a.residual_stride;
    const T* weight = (const T*)a.weight;
    T* normed = (T*)a.normed + (i64)blockIdx.x * a.columns;
    T* sum = (T*)a.sum + (i64)blockIdx.x * a.columns;
    u32 step = blockDim.x * LEN, tile = PACKS * step, mine = threadIdx.x * LEN;
    Pack<T> values[PACKS], weights[PACKS];
#pragma unroll
    for (u32 p = 0; p < PACKS; p++) weights[p] = load_pack<WIDE>(weight, mine + p * step, a.columns);
    wait_for_inputs();
    release_dependents();
    float squares = 0.0f;
    for (u32 first = mine; first < a.columns; first += tile) {
        Pack<T> added[PACKS];
#pragma unroll
        for (u32 p = 0; p < PACKS; p++) {
            values[p] = load_pack<WIDE>(x, first + p * step, a.columns);
            added[p] = load_pack<WIDE>(residual, first + p * step, a.columns);
        }
#pragma unroll
        for (u32 p = 0; p < PACKS; p++) {
            float sums[LEN];
#pragma unroll
            for (u32 e = 0; e < LEN; e++) sums[e] = get(values[p], e) + get(added[p], e);
            values[p] = pack<T>(sums);
#pragma unroll
            for (u32 e = 0; e < LEN; e++) squares += get(values[p], e) * get(values[p], e);
            store_pack<WIDE>(sum, first + p * step, a.columns, values[p]);
        }
    }
    store_normed<T, WIDE>(normed, sum, weight, values, weights, a.columns, squares, a.eps);
}

template <typename T> BCG_DEVICE void add_rms_norm(const AddRmsNormArgs& a) {
    u64 low = (u64)a.x | (u64)a.residual | (u64)a.weight | (u64)a.normed | (u64)a.sum;
    low |= (a.x_stride | a.residual_stride | a.columns) * sizeof(T);
    if (low % 16 == 0) add_rms_norm<T, true>(a);
    else add_rms_norm<T, false>(a);
}

extern "C" __global__ void add_rms_norm_bf16(AddRmsNormArgs a) { add_rms_norm<bf16>(a); }
extern "C" __global__ void add_rms_norm_f16(AddRmsNormArgs a) { add_rms_norm<f16>(a); }
extern "C" __global__ void add_rms_norm_f32(AddRmsNormArgs a) { add_rms_norm<float>(a); }
