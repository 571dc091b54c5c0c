// Rows in x, pieces of a row in y. Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "bcg.cuh"

template <typename T, bool WIDE> BCG_DEVICE void relu2(const Relu2Args& a) {
    constexpr u32 LEN = Pack<T>::LEN;
    const T* x = (const T*)a.x + (i64)blockIdx.x * a.x_stride;
    T* out = (T*)a.out + (i64)blockIdx.x * a.columns;
    wait_for_inputs();
    release_dependents();
    u32 step = gridDim.y * blockDim.x * LEN;
    for (u32 c = (blockIdx.y * blockDim.x + threadIdx.x) * LEN; c < a.columns; c += step) {
        Pack<T> values = load_pack<WIDE>(x, c, a.columns);
        float squares[LEN];
#pragma unroll
        for (u32 e = 0; e < LEN; e++) {
            float v = get(values, e);
            v = v < 0.0f ? 0.0f : v;  // keeps NaN
            squares[e] = v * v;
        }
        store_pack<WIDE>(out, c, a.columns, pack<T>(squares));
    }
}

template <typename T> BCG_DEVICE void relu2(const Relu2Args& a) {
    u64 low = (u64)a.x | (u64)a.out | (a.x_stride | a.columns) * sizeof(T);
    if (low % 16 == 0) relu2<T, true>(a);
    else relu2<T, false>(a);
}

extern "C" __global__ void relu2_bf16(Relu2Args a) { relu2<bf16>(a); }
extern "C" __global__ void relu2_f16(Relu2Args a) { relu2<f16>(a); }
extern "C" __global__ void relu2_f32(Relu2Args a) { relu2<float>(a); }
