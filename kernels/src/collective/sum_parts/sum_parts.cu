// Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "bcg.cuh"

template <typename T, bool WIDE> BCG_DEVICE void sum_parts(const SumPartsArgs& a) {
    constexpr u32 LEN = Pack<T>::LEN;
    wait_for_inputs();
    release_dependents();
    u64 step = (u64)gridDim.x * blockDim.x * LEN;
    for (u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * LEN; i < a.elements; i += step) {
        float sums[LEN];
        Pack<T> first = load_pack<WIDE>((const T*)a.parts, (u32)i, a.elements);
#pragma unroll
        for (u32 e = 0; e < LEN; e++) sums[e] = get(first, e);
        for (u32 part = 1; part < a.num_parts; part++) {
            Pack<T> values = load_pack<WIDE>((const T*)a.parts + part * a.part_step, (u32)i, a.elements);
#pragma unroll
            for (u32 e = 0; e < LEN; e++) sums[e] += get(values, e);
        }
        store_pack<WIDE>((T*)a.out, (u32)i, a.elements, pack<T>(sums));
    }
}

template <typename T> BCG_DEVICE void sum_parts(const SumPartsArgs& a) {
    u64 low = (u64)a.parts | (u64)a.out | (a.part_step | a.elements) * sizeof(T);
    if (low % 16 == 0) sum_parts<T, true>(a);
    else sum_parts<T, false>(a);
}

extern "C" __global__ void sum_parts_bf16(SumPartsArgs a) { sum_parts<bf16>(a); }
extern "C" __global__ void sum_parts_f16(SumPartsArgs a) { sum_parts<f16>(a); }
extern "C" __global__ void sum_parts_f32(SumPartsArgs a) { sum_parts<float>(a); }
