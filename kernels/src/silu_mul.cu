// One block per row. Host reference, shapes and geometry: bcg-models/src/ops/silu_mul.rs.
#include "bcg.cuh"

struct SiluMulArgs {
    const void* gate_up;
    void* out;
    i64 stride;
    u32 columns;
    u32 padding;
};

template <typename T> BCG_DEVICE void silu_mul(const SiluMulArgs& a) {
    const T* gate = (const T*)a.gate_up + (i64)blockIdx.x * a.stride;
    const T* up = gate + a.columns;
    T* out = (T*)a.out + (i64)blockIdx.x * a.columns;
    for (u32 c = threadIdx.x; c < a.columns; c += blockDim.x) {
        float g = to_f32(gate[c]);
        float silu = round_to<T>(g / (1.0f + expf(-g)));
        out[c] = from_f32<T>(silu * to_f32(up[c]));
    }
}

extern "C" __global__ void silu_mul_bf16(SiluMulArgs a) { silu_mul<bf16>(a); }
extern "C" __global__ void silu_mul_f16(SiluMulArgs a) { silu_mul<f16>(a); }
extern "C" __global__ void silu_mul_f32(SiluMulArgs a) { silu_mul<float>(a); }
