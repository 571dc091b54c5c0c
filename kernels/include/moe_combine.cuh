// The weighted sum of what a token's experts made of it.
#pragma once
#include "bcg.cuh"

constexpr u32 ROWS_AT_ONCE = 4;  // rows that a thread loads ahead, of those that it loads in whole packs

// Elements c … of sum_k weights[k] * y[places[k]] + shared, over the choices that have a place, in f32 in the order of k,
// rounded once. `shared` may be null.
template <bool WIDE, typename T>
BCG_DEVICE Pack<T> combined(const T* y, const i32* places, const float* weights, u32 chosen, const T* shared, u32 c, u32 columns) {
    constexpr u32 LEN = Pack<T>::LEN, AT_ONCE = WIDE ? ROWS_AT_ONCE : 1;
    Pack<T> last = {};
    if (shared) last = load_pack<WIDE>(shared, c, columns);
    float sums[LEN] = {};
    for (u32 k = 0; k < chosen; k += AT_ONCE) {
        Pack<T> packs[AT_ONCE];
        float by[AT_ONCE];
#pragma unroll
        for (u32 u = 0; u < AT_ONCE; u++) {
            i32 place = k + u < chosen ? places[k + u] : -1;
            by[u] = place >= 0 ? weights[k + u] : 0.0f;
            packs[u] = {};
            if (place >= 0) packs[u] = load_pack<WIDE>(y + (i64)place * columns, c, columns);
        }
#pragma unroll
        for (u32 u = 0; u < AT_ONCE; u++)
#pragma unroll
            for (u32 e = 0; e < LEN; e++) sums[e] += by[u] * get(packs[u], e);
    }
#pragma unroll
    for (u32 e = 0; e < LEN; e++) sums[e] += get(last, e);
    return pack<T>(sums);
}
