// Sums over the ranks in one step. Host reference, shapes and checks: kernels/src/collective/reduce.rs.
#pragma once
#include "collective.cuh"

// Every rank sends each other one its piece, and sums what comes. A thread sends the packs after those that it waits for, so
// that the link is busy meanwhile. Every block has packs.
template <typename T, bool WIDE, u32 RANKS> BCG_DEVICE void reduce(const ReduceArgs& a) {
    constexpr u32 N = WIDE && RANKS == 2 ? 4 : 1;  // packs of each rank that a thread waits for together
    u32 step = gridDim.x * blockDim.x, mine = blockIdx.x * blockDim.x + threadIdx.x;
    PackedRows<T, WIDE> out(a.out, a.columns, a.columns);
    auto piece = [&](u32 rank) { return PackedRows<T, WIDE>((const T*)a.x + rank * a.x_step, a.x_stride, a.columns); };
    wait_for_inputs();
    Collective c(a.communicator);
    PackedRows<T, WIDE> own_piece = piece(c.c.rank);
    auto send = [&](u32 first) {
        if (first >= a.packs) return;
#pragma unroll 1
        for (u32 distance = 1; distance < c.c.num_ranks; distance++) {
            u32 to = c.rank_at(distance);
            PackedRows<T, WIDE> x = piece(to);
            Pack<T> packs[N];
#pragma unroll
            for (u32 k = 0; k < N; k++)
                if (first + k * step < a.packs) packs[k] = x.load(a.first_pack + first + k * step);
#pragma unroll
            for (u32 k = 0; k < N; k++)
                if (first + k * step < a.packs) c.send(to, first + k * step, packs[k]);
        }
    };
    send(mine);
#pragma unroll 1
    for (u32 block_first = blockIdx.x * blockDim.x; block_first < a.packs; block_first += N * step) {
        u32 first = block_first + threadIdx.x;
        send(first + N * step);
        Pack<T> own[N], packs[SLOTS<RANKS> * N];
#pragma unroll
        for (u32 k = 0; k < N; k++)
            if (first + k * step < a.packs) own[k] = own_piece.load(a.first_pack + first + k * step);
        c.receive(packs, [&](u32 k, u32& rank, u32& at) {
            rank = c.rank_of<RANKS>(k / N), at = first + k % N * step;
            return c.is_other(rank) && at < a.packs;
        });
        if (block_first + N * step >= a.packs) c.end();
#pragma unroll
        for (u32 k = 0; k < N; k++)
            if (first + k * step < a.packs) out.store(a.first_pack + first + k * step, c.sum<RANKS, N>(packs, k, own[k]));
    }
}

// The same where each rank sums a share of the message and sends the sum to all: two crossings, fewer bytes. Its slot holds
// a share of what the sender has, then one of what it has summed.
template <typename T, bool WIDE, u32 RANKS> BCG_DEVICE void reduce_two_shot(const ReduceArgs& a) {
    u32 step = gridDim.x * blockDim.x, mine = blockIdx.x * blockDim.x + threadIdx.x;
    PackedRows<T, WIDE> x(a.x, a.x_stride, a.columns), out(a.out, a.columns, a.columns);
    wait_for_inputs();
    Collective c(a.communicator);
    u32 share = (a.packs - 1) / c.c.num_ranks + 1;
    // Whether a rank's share has a pack i, and which of this launch's that is.
    auto has = [&](u32 rank, u32 i) { return i < share && rank * share + i < a.packs; };
    auto pack_of = [&](u32 rank, u32 i) { return a.first_pack + rank * share + i; };
    auto send = [&](u32 i) {
#pragma unroll 1
        for (u32 distance = 1; distance < c.c.num_ranks; distance++) {
            u32 to = c.rank_at(distance);
            if (has(to, i)) c.send(to, i, x.load(pack_of(to, i)));
        }
    };
    send(mine);
#pragma unroll 1
    for (u32 i = mine; i < share + step; i += step) {
        send(i + step);
        Pack<T> packs[RANKS];
        if (has(c.c.rank, i)) {
            Pack<T> own = x.load(pack_of(c.c.rank, i));
            c.receive(packs, [&](u32 k, u32& rank, u32& at) {
                rank = k, at = i;
                return c.is_other(rank);
            });
            Pack<T> sum = c.sum<RANKS, 1>(packs, 0, own);
            c.send_to_all(share + i, sum);
            out.store(pack_of(c.c.rank, i), sum);
        }
        if (i < mine + step) continue;
        u32 before = i - step;
        c.receive(packs, [&](u32 k, u32& rank, u32& at) {
            rank = k, at = share + before;
            return c.is_other(rank) && has(rank, before);
        });
#pragma unroll
        for (u32 r = 0; r < RANKS; r++)
            if (c.is_other(r) && has(r, before)) out.store(pack_of(r, before), packs[r]);
    }
    c.end();
}

template <typename T> BCG_DEVICE bool is_wide(const ReduceArgs& a) {
    return ((u64)a.x | (u64)a.out | (a.x_stride | a.x_step | a.columns) * sizeof(T)) % 16 == 0;
}

template <typename T> BCG_DEVICE void reduce(const ReduceArgs& a) {
    if (a.communicator.num_ranks == 2) {
        if (is_wide<T>(a)) reduce<T, true, 2>(a);
        else reduce<T, false, 2>(a);
    } else {
        if (is_wide<T>(a)) reduce<T, true, RANKS_MAX>(a);
        else reduce<T, false, RANKS_MAX>(a);
    }
}

template <typename T> BCG_DEVICE void reduce_two_shot(const ReduceArgs& a) {
    if (is_wide<T>(a)) reduce_two_shot<T, true, RANKS_MAX>(a);
    else reduce_two_shot<T, false, RANKS_MAX>(a);
}
