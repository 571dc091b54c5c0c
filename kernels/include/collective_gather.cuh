// Rows handed on as they are. Host reference, shapes and checks: kernels/src/collective/gather.rs.
#pragma once
#include "collective.cuh"

template <typename T, bool WIDE, u32 RANKS> BCG_DEVICE void gather(const GatherArgs& a) {
    constexpr u32 N = AT_ONCE<RANKS>;
    u32 step = gridDim.x * blockDim.x, mine = blockIdx.x * blockDim.x + threadIdx.x;
    PackedRows<T, WIDE> x(a.x, a.x_stride, a.columns);
    auto piece = [&](u32 rank) { return PackedRows<T, WIDE>((T*)a.out + rank * a.out_step, a.out_stride, a.columns); };
    wait_for_inputs();
    Collective c(a.communicator);
    auto gives = [&](u32 rank) { return rank != c.c.rank && (a.to_ranks >> rank & 1); };
    auto takes = [&](u32 rank) { return rank != c.c.rank && rank < c.c.num_ranks && (a.from_ranks >> rank & 1); };
    bool takes_own = a.from_ranks >> c.c.rank & 1, reads = takes_own || (a.to_ranks & ~(1u << c.c.rank));
    PackedRows<T, WIDE> own = piece(c.c.rank);
    auto send = [&](u32 first) {
        if (!reads) return;
        Pack<T> packs[N];
#pragma unroll
        for (u32 k = 0; k < N; k++)
            if (first + k * step < a.packs) packs[k] = x.load(a.first_pack + first + k * step);
        for (u32 distance = 1; distance < c.c.num_ranks; distance++) {
            u32 to = c.rank_at(distance);
#pragma unroll
            for (u32 k = 0; k < N; k++)
                if (gives(to) && first + k * step < a.packs) c.send(to, first + k * step, packs[k]);
        }
#pragma unroll
        for (u32 k = 0; k < N; k++)
            if (takes_own && first + k * step < a.packs) own.store(a.first_pack + first + k * step, as_sent(packs[k]));
    };
    // Ranks that have nothing for each other send a pack that says so, since no rank may be ahead by two collectives.
    bool is_first = mine == 0;
    if (is_first)
        for (u32 distance = 1; distance < c.c.num_ranks; distance++)
            if (u32 to = c.rank_at(distance); !gives(to)) c.send(to, 0, Pack<T>{});
    send(mine);
    for (u32 first = mine; first < a.packs; first += N * step) {
        send(first + N * step);
        Pack<T> packs[RANKS][N];
        c.receive(packs, [&](u32 r, u32 k) { return takes(r) && first + k * step < a.packs ? first + k * step : NOWHERE; });
#pragma unroll
        for (u32 r = 0; r < RANKS; r++) {
#pragma unroll
            for (u32 k = 0; k < N; k++)
                if (takes(r) && first + k * step < a.packs) piece(r).store(a.first_pack + first + k * step, packs[r][k]);
        }
    }
    if (is_first) {
        Pack<T> packs[RANKS][1];
        c.receive(packs, [&](u32 r, u32) { return takes(r) ? NOWHERE : 0; });
    }
    c.end();
}

template <typename T> BCG_DEVICE void gather(const GatherArgs& a) {
    u64 low = (u64)a.x | (u64)a.out | (a.x_stride | a.out_stride | a.out_step | a.columns) * sizeof(T);
    if (a.communicator.num_ranks == 2) {
        if (low % 16 == 0) gather<T, true, 2>(a);
        else gather<T, false, 2>(a);
    } else {
        if (low % 16 == 0) gather<T, true, RANKS_MAX>(a);
        else gather<T, false, RANKS_MAX>(a);
    }
}
