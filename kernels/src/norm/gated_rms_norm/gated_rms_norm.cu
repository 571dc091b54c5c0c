// One block per row and group, which its threads keep in registers if it fits. Host reference: host.rs;
// shapes and geometry: mod.rs.
#include "args.cuh"
#include "silu.cuh"

// The gated elements of a pack, in f32.
template <typename T> BCG_DEVICE void apply_gate(float (&to)[Pack<T>::LEN], const Pack<T>& y, const Pack<T>& gate) {
#pragma unroll
    for (u32 e = 0; e < Pack<T>::LEN; e++) to[e] = get(y, e) * silu(get(gate, e));
}

template <typename T, bool WIDE> BCG_DEVICE void gated_rms_norm(const GatedRmsNormArgs& a) {
    constexpr u32 LEN = Pack<T>::LEN;
    i64 row = blockIdx.x, first = (i64)blockIdx.y * a.group;
    const T* y = (const T*)a.y + row * a.y_stride + first;
    const T* gate = (const T*)a.gate + row * a.gate_stride + first;
    const T* weight = (const T*)a.weight + first;
    T* out = (T*)a.out + row * a.columns + first;
    u32 step = blockDim.x * LEN, mine = threadIdx.x * LEN;
    Pack<T> weights = load_pack<WIDE>(weight, mine, a.group);
    wait_for_inputs();
    release_dependents();
    float gated[LEN] = {}, squares = 0.0f;
    for (u32 c = mine; c < a.group; c += step) {
        apply_gate<T>(gated, load_pack<WIDE>(y, c, a.group), load_pack<WIDE>(gate, c, a.group));
#pragma unroll
        for (u32 e = 0; e < LEN; e++) squares += gated[e] * gated[e];
    }
    float scale = 1.0f / sqrtf(block_reduce(squares, 0.0f, Sum()) / (float)a.group + a.eps);
    for (u32 c = mine; c < a.group; c += step) {
        if (a.group > step) {
            apply_gate<T>(gated, load_pack<WIDE>(y, c, a.group), load_pack<WIDE>(gate, c, a.group));
            weights = load_pack<WIDE>(weight, c, a.group);
        }
        float normed[LEN];
#pragma unroll
        for (u32 e = 0; e < LEN; e++) normed[e] = round_to<T>(gated[e] * scale) * get(weights, e);
        store_pack<WIDE>(out, c, a.group, pack<T>(normed));
    }
}

template <typename T> BCG_DEVICE void gated_rms_norm(const GatedRmsNormArgs& a) {
    u64 low = (u64)a.y | (u64)a.gate | (u64)a.weight | (u64)a.out;
    low |= (a.y_stride | a.gate_stride | a.columns | a.group) * sizeof(T);
    if (low % 16 == 0) gated_rms_norm<T, true>(a);
    else gated_rms_norm<T, false>(a);
}

extern "C" __global__ void gated_rms_norm_bf16(GatedRmsNormArgs a) { gated_rms_norm<bf16>(a); }
extern "C" __global__ void gated_rms_norm_f16(GatedRmsNormArgs a) { gated_rms_norm<f16>(a); }
extern "C" __global__ void gated_rms_norm_f32(GatedRmsNormArgs a) { gated_rms_norm<float>(a); }
