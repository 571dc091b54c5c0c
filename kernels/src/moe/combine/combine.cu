// Rows in x, pieces of a row in y. Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "moe_combine.cuh"

template <typename T, bool WIDE> BCG_DEVICE void moe_combine(const MoeCombineArgs& a) {
    constexpr u32 LEN = Pack<T>::LEN;
    const T* y = (const T*)a.y;
    T* out = (T*)a.out + (i64)blockIdx.x * a.columns;
    wait_for_inputs();
    release_dependents();
    const i32* places = a.places + (i64)blockIdx.x * a.chosen;
    const float* weights = a.weights + (i64)blockIdx.x * a.chosen;
    const T* shared = nullptr;
    if (a.shared && (i32)blockIdx.x < *a.num_valid) shared = (const T*)a.shared + (i64)blockIdx.x * a.shared_stride;
    u32 step = gridDim.y * blockDim.x * LEN;
    for (u32 c = (blockIdx.y * blockDim.x + threadIdx.x) * LEN; c < a.columns; c += step)
        store_pack<WIDE>(out, c, a.columns, combined<WIDE>(y, places, weights, a.chosen, shared, c, a.columns));
}

template <typename T> BCG_DEVICE void moe_combine(const MoeCombineArgs& a) {
    u64 low = (u64)a.y | (u64)a.shared | (u64)a.out | (a.shared_stride | a.columns) * sizeof(T);
    if (low % 16 == 0) moe_combine<T, true>(a);
    else moe_combine<T, false>(a);
}

extern "C" __global__ void moe_combine_bf16(MoeCombineArgs a) { moe_combine<bf16>(a); }
extern "C" __global__ void moe_combine_f16(MoeCombineArgs a) { moe_combine<f16>(a); }
extern "C" __global__ void moe_combine_f32(MoeCombineArgs a) { moe_combine<float>(a); }
