// Rows in x, pieces of a row in y. Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "silu.cuh"

template <typename T, bool WIDE> BCG_DEVICE void silu_mul(const SiluMulArgs& a) {
    constexpr u32 LEN = Pack<T>::LEN;
    const T* gates = (const T*)a.gate_up + (i64)blockIdx.x * a.stride;
    T* out = (T*)a.out + (i64)blockIdx.x * a.columns;
    wait_for_inputs();
    release_dependents();
    u32 step = gridDim.y * blockDim.x * LEN;
    for (u32 c = (blockIdx.y * blockDim.x + threadIdx.x) * LEN; c < a.columns; c += step) {
        Pack<T> gate = load_pack<WIDE>(gates, c, a.columns), up = load_pack<WIDE>(gates + a.columns, c, a.columns);
        float product[LEN];
#pragma unroll
        for (u32 e = 0; e < LEN; e++) product[e] = silu_mul<T>(get(gate, e), get(up, e));
        store_pack<WIDE>(out, c, a.columns, pack<T>(product));
    }
}

template <typename T> BCG_DEVICE void silu_mul(const SiluMulArgs& a) {
    u64 low = (u64)a.gate_up | (u64)a.out | (a.stride | a.columns) * sizeof(T);
    if (low % 16 == 0) silu_mul<T, true>(a);
    else silu_mul<T, false>(a);
}

extern "C" __global__ void silu_mul_bf16(SiluMulArgs a) { silu_mul<bf16>(a); }
extern "C" __global__ void silu_mul_f16(SiluMulArgs a) { silu_mul<f16>(a); }
extern "C" __global__ void silu_mul_f32(SiluMulArgs a) { silu_mul<float>(a); }
