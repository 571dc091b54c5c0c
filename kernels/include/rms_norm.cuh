// The second half of the RMS norms: from the squares of a row to what is stored. PACKS, words of a row and of the weight
// that a thread keeps, stands in kernels/src/norm/rms.rs.
#pragma once
#include "bcg.cuh"


// Normalises a row by all threads of the block, whose squares are summed here. A row of more words than they keep is read
// again from `row`, in which each thread reads what it read or wrote before.
template <typename T, bool WIDE>
BCG_DEVICE void store_normed(T* out, const T* row, const T* weight, Pack<T> (&values)[PACKS], Pack<T> (&weights)[PACKS],
                             u32 columns, float squares, float eps) {
    constexpr u32 LEN = Pack<T>::LEN;
    u32 step = blockDim.x * LEN, tile = PACKS * step;
    float scale = 1.0f / sqrtf(block_reduce(squares, 0.0f, Sum()) / (float)columns + eps);
    for (u32 first = threadIdx.x * LEN; first < columns; first += tile) {
#pragma unroll
        for (u32 p = 0; p < PACKS; p++) {
            u32 c = first + p * step;
            if (columns > tile) {
                values[p] = load_pack<WIDE>(row, c, columns);
                weights[p] = load_pack<WIDE>(weight, c, columns);
            }
            float normed[LEN];
#pragma unroll
            for (u32 e = 0; e < LEN; e++) normed[e] = round_to<T>(get(values[p], e) * scale) * get(weights[p], e);
            store_pack<WIDE>(out, c, columns, pack<T>(normed));
        }
    }
}
