// A thread for some neighbouring channels and rows: it slides down its rows with the K - 1 inputs before in registers.
// Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "silu.cuh"

constexpr u32 AHEAD = 3;  // rows that a thread has on their way

// A sequence and the rows that it has.
struct Sequence {
    u32 idx, first, end;
};

BCG_DEVICE Sequence load_sequence(const CausalConv1dArgs& a, u32 idx) {
    if (!a.cu_seqlens_q) return {idx, idx, idx + 1};
    return {idx, (u32)a.cu_seqlens_q[idx], (u32)a.cu_seqlens_q[idx + 1]};
}

// The sequences that end at row t or before it, counted by all threads of the block.
BCG_DEVICE u32 count_ended(const CausalConv1dArgs& a, u32 t) {
    u32 count = 0;
    for (u32 base = 0; base < a.sequences; base += blockDim.x) {
        u32 b = base + threadIdx.x;
        count += __syncthreads_count(b < a.sequences && (u32)a.cu_seqlens_q[b + 1] <= t);
    }
    return count;
}

// The states of a thread's channels lie together, `PAST` inputs for each: element e of input i of them.
template <u32 PAST, typename T> BCG_DEVICE float of_state(const Pack<T> (&packs)[PAST], u32 i, u32 e) {
    u32 place = e * PAST + i;
    return get(packs[place / Pack<T>::LEN], place % Pack<T>::LEN);
}

// Loads the PAST inputs before row t of a sequence, oldest first: rows of x, and before the first of them the state that is
// read, or zeros.
template <u32 PAST, bool WIDE, typename T>
BCG_DEVICE void load_past(Pack<T> (&past)[PAST], const CausalConv1dArgs& a, const Sequence& s, u32 t, u32 channel) {
    constexpr u32 LEN = Pack<T>::LEN;
    u32 seen = t - s.first;
    i32 slot = a.slots.read[s.idx];
    Pack<T> state[PAST] = {};
    if (seen < PAST && slot >= 0 && (u32)slot < a.num_slots) {
        const T* from = (const T*)a.state + slot * a.slot_stride;
#pragma unroll
        for (u32 i = 0; i < PAST; i++) state[i] = load_pack<WIDE>(from, channel * PAST + i * LEN, a.channels * PAST);
    }
#pragma unroll
    for (u32 i = 0; i < PAST; i++) {
        if (i + seen >= PAST) {
            past[i] = load_pack<WIDE>((const T*)a.x + (i64)(t + i - PAST) * a.x_stride, channel, a.channels);
            continue;
        }
        float values[LEN] = {};
#pragma unroll
        for (u32 j = i; j < PAST; j++)
#pragma unroll
            for (u32 e = 0; e < LEN; e++)
                if (j == i + seen) values[e] = of_state<PAST>(state, j, e);
        past[i] = pack<T>(values);
    }
}

// Writes the last PAST inputs of a sequence to its slot.
template <u32 PAST, bool WIDE, typename T>
BCG_DEVICE void store_past(const Pack<T> (&past)[PAST], const CausalConv1dArgs& a, const Sequence& s, u32 channel) {
    constexpr u32 LEN = Pack<T>::LEN;
    i32 slot = a.slots.write[s.idx];
    if (slot < 0 || (u32)slot >= a.num_slots) return;
    T* to = (T*)a.state + slot * a.slot_stride;
#pragma unroll
    for (u32 p = 0; p < PAST; p++) {
        float values[LEN];
#pragma unroll
        for (u32 e = 0; e < LEN; e++) values[e] = get(past[(p * LEN + e) % PAST], (p * LEN + e) / PAST);
        store_pack<WIDE>(to, channel * PAST + p * LEN, a.channels * PAST, pack<T>(values));
    }
}

template <typename T, u32 K, bool WIDE> BCG_DEVICE void causal_conv1d(const CausalConv1dArgs& a) {
    constexpr u32 LEN = Pack<T>::LEN, PAST = K - 1;
    u32 channel = (blockIdx.y * blockDim.x + threadIdx.x) * LEN;
    Pack<T> weight[K], bias = {};
#pragma unroll
    for (u32 k = 0; k < K; k++) weight[k] = load_pack<WIDE>((const T*)a.weight, channel * K + k * LEN, a.channels * K);
    if (a.bias) bias = load_pack<WIDE>((const T*)a.bias, channel, a.channels);
    wait_for_inputs();
    release_dependents();
    u32 t = blockIdx.x * a.tile_rows;
    u32 end = a.cu_seqlens_q ? min((u32)a.cu_seqlens_q[a.sequences], a.rows) : a.rows;
    end = min(t + a.tile_rows, end);
    u32 idx = a.cu_seqlens_q ? count_ended(a, t) : t;
    if (t >= end || channel >= a.channels) return;
    const T* x = (const T*)a.x;
    auto load_row = [&](u32 row) {
        return row < end ? load_pack<WIDE>(x + (i64)row * a.x_stride, channel, a.channels) : Pack<T>{};
    };
    Pack<T> ahead[AHEAD], past[PAST];
#pragma unroll
    for (u32 i = 0; i < AHEAD; i++) ahead[i] = load_row(t + i);
    Sequence s = load_sequence(a, idx);
    load_past<PAST, WIDE>(past, a, s, t, channel);
    for (; t < end; t++) {
        if (t == s.end) {
            do s = load_sequence(a, s.idx + 1);
            while (s.end == t);  // sequences without rows
            load_past<PAST, WIDE>(past, a, s, t, channel);
        }
        Pack<T> now = ahead[0];
#pragma unroll
        for (u32 i = 0; i + 1 < AHEAD; i++) ahead[i] = ahead[i + 1];
        ahead[AHEAD - 1] = load_row(t + AHEAD);
        float values[LEN];
#pragma unroll
        for (u32 e = 0; e < LEN; e++) {
            float sum = get(bias, e);
#pragma unroll
            for (u32 k = 0; k < PAST; k++) sum += of_state<K>(weight, k, e) * get(past[k], e);
            sum += of_state<K>(weight, PAST, e) * get(now, e);
            values[e] = silu(sum);
        }
        store_pack<WIDE>((T*)a.out + (i64)t * a.channels, channel, a.channels, pack<T>(values));
#pragma unroll
        for (u32 i = 0; i + 1 < PAST; i++) past[i] = past[i + 1];
        past[PAST - 1] = now;
        if (t + 1 == s.end) store_past<PAST, WIDE>(past, a, s, channel);
    }
}

template <typename T, bool WIDE> BCG_DEVICE void causal_conv1d(const CausalConv1dArgs& a) {
    if (a.kernel == 4) causal_conv1d<T, 4, WIDE>(a);
    else if (a.kernel == 3) causal_conv1d<T, 3, WIDE>(a);
    else causal_conv1d<T, 2, WIDE>(a);
}

template <typename T> BCG_DEVICE void causal_conv1d(const CausalConv1dArgs& a) {
    u64 low = (u64)a.x | (u64)a.weight | (u64)a.bias | (u64)a.state | (u64)a.out;
    low |= (a.x_stride | a.slot_stride | a.channels) * sizeof(T);
    if (low % 16 == 0) causal_conv1d<T, true>(a);
    else causal_conv1d<T, false>(a);
}

extern "C" __global__ __launch_bounds__(THREADS) void causal_conv1d_bf16(CausalConv1dArgs a) { causal_conv1d<bf16>(a); }
extern "C" __global__ __launch_bounds__(THREADS) void causal_conv1d_f16(CausalConv1dArgs a) { causal_conv1d<f16>(a); }
extern "C" __global__ __launch_bounds__(THREADS) void causal_conv1d_f32(CausalConv1dArgs a) { causal_conv1d<float>(a); }
