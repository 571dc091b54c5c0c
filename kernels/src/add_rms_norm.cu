// One block per row. Host reference, shapes and geometry: bcg-models/src/ops/add_rms_norm.rs.
#include "bcg.cuh"

struct AddRmsNormArgs {
    const void* x;
    const void* residual;
    const void* weight;
    void* normed;
    void* sum;
    i64 x_stride;
    i64 residual_stride;
    u32 columns;
    float eps;
};

template <typename T> BCG_DEVICE void add_rms_norm(const AddRmsNormArgs& a) {
    const T* x = (const T*)a.x + (i64)blockIdx.x * a.x_stride;
    const T* residual = (const T*)a.residual + (i64)blockIdx.x * a.residual_stride;
    const T* weight = (const T*)a.weight;
    T* normed = (T*)a.normed + (i64)blockIdx.x * a.columns;
    T* sum = (T*)a.sum + (i64)blockIdx.x * a.columns;
    float squares = 0.0f;
    for (u32 c = threadIdx.x; c < a.columns; c += blockDim.x) {
        T added = from_f32<T>(to_f32(x[c]) + to_f32(residual[c]));
        sum[c] = added;
        float v = to_f32(added);
        squares += v * v;
    }
    squares = block_reduce(squares, 0.0f, Sum());
    float scale = 1.0f / sqrtf(squares / (float)a.columns + a.eps);
    // Each thread reads back only the elements of `sum` that it wrote.
    for (u32 c = threadIdx.x; c < a.columns; c += blockDim.x) {
        float v = round_to<T>(to_f32(sum[c]) * scale);
        normed[c] = from_f32<T>(v * to_f32(weight[c]));
    }
}

extern "C" __global__ void add_rms_norm_bf16(AddRmsNormArgs a) { add_rms_norm<bf16>(a); }
extern "C" __global__ void add_rms_norm_f16(AddRmsNormArgs a) { add_rms_norm<f16>(a); }
extern "C" __global__ void add_rms_norm_f32(AddRmsNormArgs a) { add_rms_norm<float>(a); }
