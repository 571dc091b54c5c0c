// A block takes tokens in turn: sends the choices of each to every rank, and its row to those that own one of its experts;
// then takes what others sent. In a slot stand the choices of all tokens, then a place for the row of each. Host reference:
// host.rs; shapes and geometry: mod.rs. Two blocks fit into a multiprocessor, since two ranks may share a GPU.
#include "collective.cuh"
#include "moe_exchange.cuh"

template <typename T, bool WIDE> struct Dispatch {
    static constexpr u32 LEN = Pack<T>::LEN;
    static constexpr u32 N = WIDE ? 4 : 1;  // packs that a thread waits for together

    const DispatchArgs& a;
    Collective c;
    u32 choice_packs;  // of a token

    BCG_DEVICE explicit Dispatch(const DispatchArgs& a)
        : a(a), c(a.communicator), choice_packs((a.chosen + CHOICES_OF_PACK - 1) / CHOICES_OF_PACK) {}

    BCG_DEVICE u32 row_at(u32 token) const { return a.tokens * choice_packs + token * a.row_packs; }
    // A token of a rank among those that this rank has when all have sent theirs.
    BCG_DEVICE i64 row_of(u32 rank, u32 token) const { return (i64)rank * a.tokens_of_rank + a.first_token + token; }
    BCG_DEVICE T* out_row(i64 row) const { return (T*)a.rows + row * a.columns; }

    BCG_DEVICE void send(u32 token) const {
        i64 t = a.first_token + token, own = row_of(c.c.rank, token);
        const i32* experts = a.experts + t * a.chosen;
        const float* weights = a.weights + t * a.chosen;
        u32 owners = owners_of(experts, a.chosen, a.experts_of_rank, c.c.num_ranks);
#pragma unroll 1
        for (u32 i = threadIdx.x; i < c.c.num_ranks * choice_packs; i += blockDim.x) {
            u32 to = c.rank_at(i / choice_packs), at = i % choice_packs, k = at * CHOICES_OF_PACK;
            Pack<float> p = pack_choices(experts, weights, k, a.chosen, to, a.experts_of_rank);
            if (to == c.c.rank)
                unpack_choices(as_sent(p), a.received_experts + own * a.chosen, a.received_weights + own * a.chosen, k, a.chosen);
            else c.send(to, token * choice_packs + at, p);
        }
        const T* x = (const T*)a.x + t * a.x_stride;
#pragma unroll 1
        for (u32 p = threadIdx.x; p < a.row_packs && owners != 0; p += blockDim.x) {
            Pack<T> v = load_pack<WIDE>(x, p * LEN, a.columns);
#pragma unroll 1
            for (u32 distance = 1; distance < c.c.num_ranks; distance++)
                if (u32 to = c.rank_at(distance); owners >> to & 1) c.send(to, row_at(token) + p, v);
            if (owners >> c.c.rank & 1) store_pack<WIDE>(out_row(own), p * LEN, a.columns, as_sent(v));
        }
    }

    BCG_DEVICE void receive(u32 from, u32 token) {
        i64 row = row_of(from, token);
        bool has = false;
#pragma unroll 1
        for (u32 i = threadIdx.x; i < choice_packs; i += blockDim.x) {
            Pack<float> p[1];
            c.receive(p, [&](u32, u32& rank, u32& at) {
                rank = from, at = token * choice_packs + i;
                return true;
            });
            u32 k = i * CHOICES_OF_PACK;
            has |= unpack_choices(p[0], a.received_experts + row * a.chosen, a.received_weights + row * a.chosen, k, a.chosen);
        }
        if (!__syncthreads_or(has)) return;
        T* out = out_row(row);
#pragma unroll 1
        for (u32 first = threadIdx.x; first < a.row_packs; first += N * blockDim.x) {
            Pack<T> packs[N];
            c.receive(packs, [&](u32 k, u32& rank, u32& at) {
                u32 p = first + k * blockDim.x;
                rank = from, at = row_at(token) + p;
                return p < a.row_packs;
            });
#pragma unroll
            for (u32 k = 0; k < N; k++)
                if (u32 p = first + k * blockDim.x; p < a.row_packs) store_pack<WIDE>(out, p * LEN, a.columns, packs[k]);
        }
    }

    BCG_DEVICE void run() {
#pragma unroll 1
        for (u32 token = blockIdx.x; token < a.tokens; token += gridDim.x) send(token);
        u32 items = (c.c.num_ranks - 1) * a.tokens;
#pragma unroll 1
        for (u32 item = blockIdx.x; item < items; item += gridDim.x)
            receive(c.rank_at(c.c.num_ranks - 1 - item / a.tokens), item % a.tokens);
        c.end();
    }
};

template <typename T> BCG_DEVICE void moe_dispatch(const DispatchArgs& a) {
    u64 low = (u64)a.x | (u64)a.rows | (a.x_stride | a.columns) * sizeof(T);
    wait_for_inputs();
    if (low % 16 == 0) Dispatch<T, true>(a).run();
    else Dispatch<T, false>(a).run();
}

extern "C" __global__ void __launch_bounds__(512, 2) moe_dispatch_bf16(DispatchArgs a) { moe_dispatch<bf16>(a); }
extern "C" __global__ void __launch_bounds__(512, 2) moe_dispatch_f16(DispatchArgs a) { moe_dispatch<f16>(a); }
extern "C" __global__ void __launch_bounds__(512, 2) moe_dispatch_f32(DispatchArgs a) { moe_dispatch<float>(a); }
