// One block per row, which its threads keep in registers if it fits. Host reference: host.rs;
// shapes and geometry: mod.rs.
#include "args.cuh"
#include "rms_norm.cuh"

template <typename T, bool WIDE> BCG_DEVICE void rms_norm(const RmsNormArgs& a) {
    constexpr u32 LEN = Pack<T>::LEN;
    const T* x = (const T*)a.x + (i64)blockIdx.x * a.x_stride;
    const T* weight = (const T*)a.weight;
    T* out = (T*)a.out + (i64)blockIdx.x * a.columns;
    u32 step = blockDim.x * LEN, tile = PACKS * step, mine = threadIdx.x * LEN;
    Pack<T> values[PACKS], weights[PACKS];
#pragma unroll
    for (u32 p = 0; p < PACKS; p++) weights[p] = load_pack<WIDE>(weight, mine + p * step, a.columns);
    wait_for_inputs();
    release_dependents();
    float sum = 0.0f;
    for (u32 first = mine; first < a.columns; first += tile) {
#pragma unroll
        for (u32 p = 0; p < PACKS; p++) values[p] = load_pack<WIDE>(x, first + p * step, a.columns);
#pragma unroll
        for (u32 p = 0; p < PACKS; p++)
#pragma unroll
            for (u32 e = 0; e < LEN; e++) sum += get(values[p], e) * get(values[p], e);
    }
    store_normed<T, WIDE>(out, x, weight, values, weights, a.columns, sum, a.eps);
}

template <typename T> BCG_DEVICE void rms_norm(const RmsNormArgs& a) {
    u64 low = (u64)a.x | (u64)a.weight | (u64)a.out | (a.x_stride | a.columns) * sizeof(T);
    if (low % 16 == 0) rms_norm<T, true>(a);
    else rms_norm<T, false>(a);
}

extern "C" __global__ void rms_norm_bf16(RmsNormArgs a) { rms_norm<bf16>(a); }
extern "C" __global__ void rms_norm_f16(RmsNormArgs a) { rms_norm<f16>(a); }
extern "C" __global__ void rms_norm_f32(RmsNormArgs a) { rms_norm<float>(a); }
