// A block for each row. Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "bcg.cuh"

template <typename T, bool WIDE> BCG_DEVICE void moe_place(const PlaceArgs& a) {
    constexpr u32 LEN = Pack<T>::LEN;
    wait_for_inputs();
    release_dependents();
    bool is_own = blockIdx.x / a.tokens == a.rank;
    const T* first = (const T*)a.parts + (i64)(blockIdx.x % a.tokens) * a.columns;
    T* out = (T*)a.out + (i64)blockIdx.x * a.columns;
    for (u32 c = threadIdx.x * LEN; c < a.columns; c += blockDim.x * LEN) {
        float sums[LEN];
#pragma unroll
        for (u32 e = 0; e < LEN; e++) sums[e] = -0.0f;
        for (u32 r = 0; is_own && r < a.num_ranks; r++) {
            Pack<T> p = load_pack<WIDE>(first + (i64)r * a.tokens * a.columns, c, a.columns);
#pragma unroll
            for (u32 e = 0; e < LEN; e++) sums[e] += get(p, e);
        }
        store_pack<WIDE>(out, c, a.columns, pack<T>(sums));
    }
}

template <typename T> BCG_DEVICE void moe_place(const PlaceArgs& a) {
    u64 low = (u64)a.parts | (u64)a.out | a.columns * sizeof(T);
    if (low % 16 == 0) moe_place<T, true>(a);
    else moe_place<T, false>(a);
}

extern "C" __global__ void moe_place_bf16(PlaceArgs a) { moe_place<bf16>(a); }
extern "C" __global__ void moe_place_f16(PlaceArgs a) { moe_place<f16>(a); }
extern "C" __global__ void moe_place_f32(PlaceArgs a) { moe_place<float>(a); }
