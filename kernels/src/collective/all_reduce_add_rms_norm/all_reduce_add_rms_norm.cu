// One block for each row, as in add_rms_norm.cu, or one for several rows, of which it sends some ahead. Host reference:
// host.rs; shapes and geometry: mod.rs. Two blocks fit into a multiprocessor, since two ranks may share a GPU.
#include "collective.cuh"
#include "rms_norm.cuh"

// Rows that a block sends ahead of the one that it waits for.
constexpr u32 AHEAD = 4;

template <typename T, bool WIDE, u32 RANKS> BCG_DEVICE void all_reduce_add_rms_norm(const NormArgs& a) {
    constexpr u32 LEN = Pack<T>::LEN;
    constexpr u32 N = RANKS == 2 ? PACKS : 1;  // packs of each rank that a thread waits for together
    u32 step = blockDim.x * LEN, tile = PACKS * step, mine = threadIdx.x * LEN;
    const T* weight = (const T*)a.weight;
    wait_for_inputs();
    Collective c(a.communicator);
    auto send = [&](u32 row) {
        if (row >= a.rows) return;
        const T* x = (const T*)a.x + row * a.x_stride;
#pragma unroll 1
        for (u32 first = mine; first < a.columns; first += tile) {
            Pack<T> packs[PACKS];
#pragma unroll
            for (u32 p = 0; p < PACKS; p++) packs[p] = load_pack<WIDE>(x, first + p * step, a.columns);
#pragma unroll
            for (u32 p = 0; p < PACKS; p++)
                if (first + p * step < a.columns) c.send_to_all(row * a.row_packs + (first + p * step) / LEN, packs[p]);
        }
    };
#pragma unroll 1
    for (u32 i = 0; i < AHEAD; i++) send(blockIdx.x + i * gridDim.x);
    Pack<T> weights[PACKS];
#pragma unroll
    for (u32 p = 0; p < PACKS; p++) weights[p] = load_pack<WIDE>(weight, mine + p * step, a.columns);
#pragma unroll 1
    for (u32 row = blockIdx.x; row < a.rows; row += gridDim.x) {
        send(row + AHEAD * gridDim.x);
        const T* x = (const T*)a.x + row * a.x_stride;
        const T* residual = (const T*)a.residual + row * a.residual_stride;
        T* sum = (T*)a.sum + (i64)row * a.columns;
        Pack<T> values[PACKS];
        float squares = 0.0f;
#pragma unroll 1
        for (u32 first = mine; first < a.columns; first += tile) {
            Pack<T> added[PACKS];
#pragma unroll
            for (u32 p = 0; p < PACKS; p++) added[p] = load_pack<WIDE>(residual, first + p * step, a.columns);
#pragma unroll
            for (u32 begin = 0; begin < PACKS; begin += N) {
                u32 column = first + begin * step;
                Pack<T> own[N], packs[SLOTS<RANKS> * N];
#pragma unroll
                for (u32 k = 0; k < N; k++) own[k] = load_pack<WIDE>(x, column + k * step, a.columns);
                c.receive(packs, [&](u32 k, u32& rank, u32& at) {
                    u32 first = column + k % N * step;
                    rank = c.rank_of<RANKS>(k / N), at = row * a.row_packs + first / LEN;
                    return c.is_other(rank) && first < a.columns;
                });
#pragma unroll
                for (u32 k = 0; k < N; k++) {
                    u32 p = begin + k, at = column + k * step;
                    Pack<T> reduced = at < a.columns ? c.sum<RANKS, N>(packs, k, own[k]) : Pack<T>{};
                    float sums[LEN];
#pragma unroll
                    for (u32 e = 0; e < LEN; e++) sums[e] = get(reduced, e) + get(added[p], e);
                    values[p] = pack<T>(sums);
#pragma unroll
                    for (u32 e = 0; e < LEN; e++) squares += get(values[p], e) * get(values[p], e);
                    store_pack<WIDE>(sum, at, a.columns, values[p]);
                }
            }
        }
        if (row + gridDim.x >= a.rows) c.end();
        store_normed<T, WIDE>((T*)a.normed + (i64)row * a.columns, sum, weight, values, weights, a.columns, squares, a.eps);
    }
}

template <typename T> BCG_DEVICE void all_reduce_add_rms_norm(const NormArgs& a) {
    u64 low = (u64)a.x | (u64)a.residual | (u64)a.weight | (u64)a.normed | (u64)a.sum;
    low |= (a.x_stride | a.residual_stride | a.columns) * sizeof(T);
    if (a.communicator.num_ranks == 2) {
        if (low % 16 == 0) all_reduce_add_rms_norm<T, true, 2>(a);
        else all_reduce_add_rms_norm<T, false, 2>(a);
    } else {
        if (low % 16 == 0) all_reduce_add_rms_norm<T, true, RANKS_MAX>(a);
        else all_reduce_add_rms_norm<T, false, RANKS_MAX>(a);
    }
}

extern "C" __global__ void __launch_bounds__(512, 2) all_reduce_add_rms_norm_bf16(NormArgs a) {
    all_reduce_add_rms_norm<bf16>(a);
}
extern "C" __global__ void __launch_bounds__(512, 2) all_reduce_add_rms_norm_f16(NormArgs a) {
    all_reduce_add_rms_norm<f16>(a);
}
extern "C" __global__ void __launch_bounds__(512, 2) all_reduce_add_rms_norm_f32(NormArgs a) {
    all_reduce_add_rms_norm<float>(a);
}
