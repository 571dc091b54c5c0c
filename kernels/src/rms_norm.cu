// One block per row. Host reference, shapes and geometry: bcg-models/src/ops/rms_norm.rs.
#include "bcg.cuh"

struct RmsNormArgs {
    const void* x;
    const void* weight;
    void* out;
    i64 x_stride;
    u32 columns;
    float eps;
};

template <typename T> BCG_DEVICE void rms_norm(const RmsNormArgs& a) {
    const T* x = (const T*)a.x + (i64)blockIdx.x * a.x_stride;
    const T* weight = (const T*)a.weight;
    T* out = (T*)a.out + (i64)blockIdx.x * a.columns;
    float sum = 0.0f;
    for (u32 c = threadIdx.x; c < a.columns; c += blockDim.x) {
        float v = to_f32(x[c]);
        sum += v * v;
    }
    sum = block_reduce(sum, 0.0f, Sum());
    float scale = 1.0f / sqrtf(sum / (float)a.columns + a.eps);
    for (u32 c = threadIdx.x; c < a.columns; c += blockDim.x) {
        float normed = round_to<T>(to_f32(x[c]) * scale);
        out[c] = from_f32<T>(normed * to_f32(weight[c]));
    }
}

extern "C" __global__ void rms_norm_bf16(RmsNormArgs a) { rms_norm<bf16>(a); }
extern "C" __global__ void rms_norm_f16(RmsNormArgs a) { rms_norm<f16>(a); }
extern "C" __global__ void rms_norm_f32(RmsNormArgs a) { rms_norm<float>(a); }
