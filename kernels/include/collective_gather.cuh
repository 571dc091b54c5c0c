// Rows handed on as they are. Host reference, shapes and checks: kernels/src/collective/gather.rs.
#pragma once
#include "collective.cuh"

template <typename T, bool WIDE> BCG_DEVICE void gather(const GatherArgs& a) {
    constexpr u32 N = WIDE ? 4 : 1;  // packs that a thread waits for together
    u32 step = gridDim.x * blockDim.x, mine = blockIdx.x * blockDim.x + threadIdx.x;
    auto piece_for = [&](u32 rank) { return PackedRows<T, WIDE>((const T*)a.x + rank * a.x_step, a.x_stride, a.columns); };
    auto piece = [&](u32 rank) { return PackedRows<T, WIDE>((T*)a.out + rank * a.out_step, a.out_stride, a.columns); };
    wait_for_inputs();
    Collective c(a.communicator);
    u32 num_ranks = c.c.num_ranks, items = (num_ranks - 1) * a.packs;
    auto gives = [&](u32 rank) { return (a.to_ranks >> rank & 1) != 0; };
    auto takes = [&](u32 rank) { return (a.from_ranks >> rank & 1) != 0; };
    // An item is a distance and a pack. Both ends of a distance have the same items in the same order, so nobody waits for
    // what another one sends only after it has got what comes later.
    auto distance_of = [&](u32 item) { return 1 + item / a.packs; };
    auto pack_of = [&](u32 item) { return item % a.packs; };
    auto send = [&](u32 first) {
        Pack<T> packs[N];
#pragma unroll
        for (u32 k = 0; k < N; k++) {
            u32 item = first + k * step;
            if (item >= items) continue;
            u32 to = c.rank_at(distance_of(item));
            if (gives(to)) packs[k] = piece_for(to).load(a.first_pack + pack_of(item));
        }
#pragma unroll
        for (u32 k = 0; k < N; k++) {
            u32 item = first + k * step;
            if (item >= items) continue;
            u32 to = c.rank_at(distance_of(item));
            if (gives(to)) c.send(to, pack_of(item), packs[k]);
        }
    };
    // Ranks that have nothing for each other send a pack that says so, since no rank may be ahead by two collectives.
    bool is_first = mine == 0;
    if (is_first) {
#pragma unroll 1
        for (u32 distance = 1; distance < num_ranks; distance++)
            if (u32 to = c.rank_at(distance); !gives(to)) c.send(to, 0, Pack<T>{});
    }
    send(mine);
    if (takes(c.c.rank)) {
        PackedRows<T, WIDE> x = piece_for(c.c.rank), own = piece(c.c.rank);
#pragma unroll 1
        for (u32 pack = mine; pack < a.packs; pack += step) own.store(a.first_pack + pack, as_sent(x.load(a.first_pack + pack)));
    }
#pragma unroll 1
    for (u32 first = mine; first < items; first += N * step) {
        send(first + N * step);
        Pack<T> packs[N];
        auto from = [&](u32 k, u32& rank, u32& at) {
            u32 item = first + k * step;
            if (item >= items) return false;
            rank = c.rank_at(num_ranks - distance_of(item)), at = pack_of(item);
            return takes(rank);
        };
        c.receive(packs, from);
#pragma unroll
        for (u32 k = 0; k < N; k++) {
            u32 rank, at;
            if (from(k, rank, at)) piece(rank).store(a.first_pack + at, packs[k]);
        }
    }
    if (is_first) {
#pragma unroll 1
        for (u32 r = 0; r < num_ranks; r++) {
            Pack<T> packs[1];
            c.receive(packs, [&](u32, u32& rank, u32& at) {
                rank = r, at = 0;
                return c.is_other(r) && !takes(r);
            });
        }
    }
    c.end();
}

template <typename T> BCG_DEVICE void gather(const GatherArgs& a) {
    u64 low = (u64)a.x | (u64)a.out | (a.x_stride | a.x_step | a.out_stride | a.out_step | a.columns) * sizeof(T);
    if (low % 16 == 0) gather<T, true>(a);
    else gather<T, false>(a);
}
