// Threads stride over all elements. Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "random.cuh"

template <typename T> BCG_DEVICE void fill_random(const FillRandomArgs& a) {
    T* x = (T*)a.x;
    i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < a.elements; i += step) {
        u64 z = mix(a.key + (u64)i * GOLDEN);
        i32 sum = (i32)(z & 0xffff) + (i32)(z >> 16 & 0xffff) + (i32)(z >> 32 & 0xffff) + (i32)(z >> 48);
        x[i] = from_f32<T>(__fmaf_rn((float)(sum - 131070), a.scale, a.mean));
    }
}

extern "C" __global__ void fill_random_bf16(FillRandomArgs a) { fill_random<bf16>(a); }
extern "C" __global__ void fill_random_f16(FillRandomArgs a) { fill_random<f16>(a); }
extern "C" __global__ void fill_random_f32(FillRandomArgs a) { fill_random<float>(a); }
