// A block takes rows in turn: sums what this rank's experts made of a row of another rank and sends the sum there; then sums
// over the ranks for rows of its own. A slot holds a place for each row, and behind them one pack that always comes. Host
// reference: host.rs; shapes and geometry: mod.rs. Two blocks fit into a multiprocessor, since two ranks may share a GPU.
#include "collective.cuh"
#include "moe_combine.cuh"
#include "moe_exchange.cuh"

template <typename T, bool WIDE, u32 RANKS> struct Return {
    static constexpr u32 LEN = Pack<T>::LEN;

    const ReturnArgs& a;
    Collective c;
    i32 num_valid;

    BCG_DEVICE explicit Return(const ReturnArgs& a) : a(a), c(a.communicator), num_valid(*a.num_valid) {}

    // A token of a rank among those of all.
    BCG_DEVICE i64 row_of(u32 rank, u32 token) const { return (i64)rank * a.tokens_of_rank + a.first_token + token; }
    BCG_DEVICE bool is_valid(i64 row) const { return row < num_valid; }

    // This rank's part of a row: what its experts made of it, and its shared ones.
    BCG_DEVICE bool has_part(i64 row) const {
        if (!is_valid(row)) return false;
        if (a.shared) return true;
        bool has = false;
#pragma unroll 1
        for (u32 k = 0; k < a.chosen; k++) has |= a.places[row * a.chosen + k] >= 0;
        return has;
    }
    BCG_DEVICE Pack<T> part(i64 row, u32 pack) const {
        const T* shared = a.shared ? (const T*)a.shared + row * a.shared_stride : nullptr;
        return combined<WIDE>(
            (const T*)a.y, a.places + row * a.chosen, a.received_weights + row * a.chosen, a.chosen, shared, pack * LEN, a.columns
        );
    }
    BCG_DEVICE void store(i64 row, u32 pack, const Pack<T>& p) const {
        store_pack<WIDE>((T*)a.out + row * a.columns, pack * LEN, a.columns, p);
    }

    BCG_DEVICE void send(u32 to, u32 token) const {
        i64 row = row_of(to, token);
        bool has = has_part(row);
        float nothing[LEN];  // zeros that change no sum, not even of zeros below zero
#pragma unroll
        for (u32 e = 0; e < LEN; e++) nothing[e] = -0.0f;
#pragma unroll 1
        for (u32 p = threadIdx.x; p < a.row_packs; p += blockDim.x) {
            if (has) c.send(to, token * a.row_packs + p, part(row, p));
            store(row, p, pack<T>(nothing));
        }
    }

    BCG_DEVICE void sum(u32 token) {
        i64 row = row_of(c.c.rank, token);
        u32 ranks = 0;  // a bit for each that has a part
        if (is_valid(row)) {
            const i32* experts = a.experts + (i64)(a.first_token + token) * a.chosen;
            ranks = a.shared ? (1u << c.c.num_ranks) - 1 : owners_of(experts, a.chosen, a.experts_of_rank, c.c.num_ranks);
        }
#pragma unroll 1
        for (u32 p = threadIdx.x; p < a.row_packs; p += blockDim.x) {
            Pack<T> own = {}, packs[SLOTS<RANKS>] = {};
            if (ranks >> c.c.rank & 1) own = part(row, p);
            c.receive(packs, [&](u32 k, u32& rank, u32& at) {
                rank = c.template rank_of<RANKS>(k), at = token * a.row_packs + p;
                return c.is_other(rank) && (ranks >> rank & 1) != 0;
            });
            store(row, p, c.template sum<RANKS, 1>(packs, 0, own));
        }
    }

    BCG_DEVICE void run() {
        u32 num_ranks = c.c.num_ranks, items = (num_ranks - 1) * a.tokens, last = a.tokens * a.row_packs;
        bool is_first = blockIdx.x == 0 && threadIdx.x == 0;
        if (is_first) {
#pragma unroll 1
            for (u32 distance = 1; distance < num_ranks; distance++) c.send(c.rank_at(distance), last, Pack<T>{});
        }
#pragma unroll 1
        for (u32 item = blockIdx.x; item < items; item += gridDim.x) send(c.rank_at(1 + item / a.tokens), item % a.tokens);
#pragma unroll 1
        for (u32 token = blockIdx.x; token < a.tokens; token += gridDim.x) sum(token);
        if (is_first) {
#pragma unroll 1
            for (u32 r = 0; r < num_ranks; r++) {
                Pack<T> packs[1];
                c.receive(packs, [&](u32, u32& rank, u32& at) {
                    rank = r, at = last;
                    return c.is_other(r);
                });
            }
        }
        c.end();
    }
};

template <typename T, u32 RANKS> BCG_DEVICE void moe_return(const ReturnArgs& a) {
    u64 low = (u64)a.y | (u64)a.shared | (u64)a.out | (a.shared_stride | a.columns) * sizeof(T);
    if (low % 16 == 0) Return<T, true, RANKS>(a).run();
    else Return<T, false, RANKS>(a).run();
}

template <typename T> BCG_DEVICE void moe_return(const ReturnArgs& a) {
    wait_for_inputs();
    if (a.communicator.num_ranks == 2) moe_return<T, 2>(a);
    else moe_return<T, RANKS_MAX>(a);
}

extern "C" __global__ void __launch_bounds__(512, 2) moe_return_bf16(ReturnArgs a) { moe_return<bf16>(a); }
extern "C" __global__ void __launch_bounds__(512, 2) moe_return_f16(ReturnArgs a) { moe_return<f16>(a); }
extern "C" __global__ void __launch_bounds__(512, 2) moe_return_f32(ReturnArgs a) { moe_return<float>(a); }
