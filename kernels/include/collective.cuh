// How the ranks of a world pass packs of 16 bytes to each other. Host side: kernels/src/collective/message.rs.
//
// Each rank has a plane that all others can write: two halves, in each a slot for every rank. A collective uses the half that
// the parity of its epoch says. It stores what it has for another rank into its own slot there; whoever waits looks at its own
// plane only. What was not yet written holds words of all ones, so the data itself tells that it has come: no flag, no fence,
// no address of another rank's tensor. Whoever took a pack puts the ones back.
//
// Why two halves are enough: in every collective a rank gets at least one pack of every other rank, and a rank sends in a
// collective only when its own kernel of the collective before has ended, the ones put back. So when a rank begins the
// collective after the next, all others have ended the one that used the same half.
//
// Epochs lie in device memory, one for each block that a grid may have, and every collective advances all of them: no
// argument changes from call to call, and kernels of different grids follow each other.
//
// The algorithm is that of NCCL's LL protocol and of the Lamport all-reduces of TensorRT-LLM and SGLang.
#pragma once
#include "args.cuh"
#include "bcg.cuh"

constexpr u32 RANKS_MAX = 8;
constexpr u32 NOT_WRITTEN = 0xffffffffu;
// After so many looks a thread waits a little before the next one: looks of many threads are in the way of what comes.
constexpr u32 QUICK_LOOKS = 6;
constexpr u32 LOOK_NS = 100;
// So many looks at the plane between two at the host's word and the clock: about half a millisecond.
constexpr u32 LOOKS = 1024;

template <typename T> BCG_DEVICE Pack<T> look(const uint4* place) {
    Pack<T> p;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(p.words[0]), "=r"(p.words[1]), "=r"(p.words[2]), "=r"(p.words[3])
                 : "l"(place)
                 : "memory");
    return p;
}
BCG_DEVICE void store(uint4* place, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(place), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
BCG_DEVICE u32 look_word(const u32* word) {
    u32 v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(word) : "memory");
    return v;
}
BCG_DEVICE void store_word(u32* word, u32 v) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(word), "r"(v) : "memory");
}
BCG_DEVICE u64 nanoseconds() {
    u64 t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t)::"memory");
    return t;
}

// A pack as it is sent: no word says "not yet written". Such a word is a NaN of f32, or two of bf16 or f16; so is the word
// below it.
template <typename T> BCG_DEVICE Pack<T> as_sent(Pack<T> p) {
#pragma unroll
    for (u32 w = 0; w < 4; w++) p.words[w] = min(p.words[w], NOT_WRITTEN - 1);
    return p;
}

template <typename T> BCG_DEVICE bool has_come(const Pack<T>& p) {
    return p.words[0] != NOT_WRITTEN && p.words[1] != NOT_WRITTEN && p.words[2] != NOT_WRITTEN && p.words[3] != NOT_WRITTEN;
}

// Rows as the packs of a message: a row begins with a pack of its own.
template <typename T, bool WIDE> struct PackedRows {
    T* base;
    i64 stride;
    u32 columns;
    u32 row_packs;

    BCG_DEVICE PackedRows(const void* base, i64 stride, u32 columns)
        : base((T*)base), stride(stride), columns(columns), row_packs((columns + Pack<T>::LEN - 1) / Pack<T>::LEN) {}

    BCG_DEVICE T* find(u32 pack, u32& first) const {
        u32 row = pack < row_packs ? 0 : pack / row_packs;
        first = (pack - row * row_packs) * Pack<T>::LEN;
        return base + row * stride;
    }
    BCG_DEVICE Pack<T> load(u32 pack) const {
        u32 first;
        const T* row = find(pack, first);
        return load_pack<WIDE>(row, first, columns);
    }
    BCG_DEVICE void store(u32 pack, const Pack<T>& p) const {
        u32 first;
        T* row = find(pack, first);
        store_pack<WIDE>(row, first, columns, p);
    }
};

// How many ranks' packs a thread holds to sum them.
template <u32 RANKS> constexpr u32 SLOTS = RANKS == 2 ? 1 : RANKS;

// One collective, as a block takes part in it.
struct Collective {
    const CommunicatorArgs& c;
    u32 epoch;
    u32 slot_packs;
    bool is_lost;

    // After wait_for_inputs(): the collective before advances the epochs.
    BCG_DEVICE explicit Collective(const CommunicatorArgs& c)
        : c(c), epoch(look_word(c.epochs + blockIdx.x)), slot_packs(c.slot_packs), is_lost(false) {
        // A kernel that starts early takes room on the GPU, which a rank that shares it may need to come here.
        if (!c.shares_gpus) release_dependents();
    }

    // The rank that is `distance` further, around a ring.
    BCG_DEVICE u32 rank_at(u32 distance) const {
        u32 rank = c.rank + distance;
        return rank < c.num_ranks ? rank : rank - c.num_ranks;
    }
    BCG_DEVICE bool is_other(u32 rank) const { return rank != c.rank && rank < c.num_ranks; }

    // Puts a pack into this rank's slot at another one.
    template <typename T> BCG_DEVICE void send(u32 to, u32 at, const Pack<T>& p) const {
        Pack<T> sent = as_sent(p);
        store(place(to, c.rank, at), sent.words[0], sent.words[1], sent.words[2], sent.words[3]);
    }
    template <typename T> BCG_DEVICE void send_to_all(u32 at, const Pack<T>& p) const {
#pragma unroll 1
        for (u32 distance = 1; distance < c.num_ranks; distance++) send(rank_at(distance), at, p);
    }

    // Waits for N packs, and puts the ones back. `from(k, rank, at)` says in which rank's slot, and where there, pack k comes,
    // or false if none does: what is in `packs` then stays. Once a rank is lost it waits for none, and what it gives means
    // nothing.
    template <typename T, u32 N, typename From> BCG_DEVICE void receive(Pack<T> (&packs)[N], From from) {
        uint4* places[N];
        u32 rank, at;
#pragma unroll
        for (u32 k = 0; k < N; k++) places[k] = from(k, rank, at) ? place(c.rank, rank, at) : nullptr;
        u64 began = 0;
#pragma unroll 1
        for (u32 looks = 1;; looks++) {
#pragma unroll
            for (u32 k = 0; k < N; k++)
                if (places[k]) packs[k] = look<T>(places[k]);
            u32 missing = N;
#pragma unroll
            for (u32 k = 0; k < N; k++)
                if (places[k] && !has_come(packs[k])) missing = k;
            if (missing == N) break;
            if (looks > QUICK_LOOKS) __nanosleep(LOOK_NS);
            if (is_lost || looks % LOOKS == 0) {
#pragma unroll
                for (u32 k = 0; k < N; k++)
                    if (k == missing) from(k, rank, at);
                if (gives_up(began, rank)) break;
            }
        }
#pragma unroll
        for (u32 k = 0; k < N; k++)
            if (places[k]) store(places[k], NOT_WRITTEN, NOT_WRITTEN, NOT_WRITTEN, NOT_WRITTEN);
    }

    // The sum of packs k of all ranks, in their order: this rank's own one, and those of the others, N apart. Of two ranks
    // there is one other, and either order gives the same bits.
    template <u32 RANKS, u32 N, typename T>
    BCG_DEVICE Pack<T> sum(const Pack<T> (&packs)[SLOTS<RANKS> * N], u32 k, const Pack<T>& own) const {
        float sums[Pack<T>::LEN];
        if constexpr (RANKS == 2) {
#pragma unroll
            for (u32 e = 0; e < Pack<T>::LEN; e++) sums[e] = get(own, e) + get(packs[k], e);
        } else {
#pragma unroll
            for (u32 r = 0; r < RANKS; r++) {
                if (r >= c.num_ranks) continue;
                Pack<T> p = r == c.rank ? own : packs[r * N + k];
#pragma unroll
                for (u32 e = 0; e < Pack<T>::LEN; e++) sums[e] = r == 0 ? get(p, e) : sums[e] + get(p, e);
            }
        }
        return pack<T>(sums);
    }
    // The rank of the packs from slot * N on, among those that `sum` takes.
    template <u32 RANKS> BCG_DEVICE u32 rank_of(u32 slot) const { return RANKS == 2 ? 1 - c.rank : slot; }

    // Called once by all threads of the block, when they have received all that comes. A kernel that takes the rest of the GPU
    // from now on keeps no rank waiting that shares it: this one needs nobody any more to end.
    BCG_DEVICE void end() const {
        __syncthreads();  // all have received, so they have also read the epoch
        release_dependents();
        u32 next = epoch + 1;
        if (threadIdx.x == 0) c.epochs[blockIdx.x] = next;
        if (blockIdx.x == 0)
            for (u32 b = gridDim.x + threadIdx.x; b < BLOCKS_MAX; b += blockDim.x) c.epochs[b] = next;
    }

private:
    // Pack `at` of the slot of rank `from` in the plane of rank `on`.
    BCG_DEVICE uint4* place(u32 on, u32 from, u32 at) const {
        return (uint4*)c.planes[on] + ((u64)(epoch % 2 * c.num_ranks + from) * slot_packs + at);
    }

    // Tells whether to wait no longer for a rank: the host says so, another thread does, or the time is over.
    BCG_DEVICE bool gives_up(u64& began, u32 rank) {
        if (is_lost) return true;
        u64 now = nanoseconds();
        if (began == 0) began = now;
        is_lost = look_word(c.words) != 0 || look_word(c.words + 1) != 0;
        if (!is_lost && now - began > c.timeout_ns) {
            store_word(c.words + 3, c.segment);
            store_word(c.words + 2, c.collective);
            __threadfence_system();  // the host reads them once it sees the word before
            store_word(c.words + 1, rank + 1);
            is_lost = true;
        }
        return is_lost;
    }
};
