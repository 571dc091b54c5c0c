// What the kernels over rows of logits share: a cluster of blocks for each row, an order of floats, the best of a row.
// CLUSTER, blocks of a row, and LOGITS_THREADS, of a block, stand in kernels/src/choose/logits.rs.
#pragma once
#include "bcg.cuh"


// Without clusters the first of a row's blocks does all of its work.
#if __CUDA_ARCH__ >= 900
#define ROW_CLUSTER __cluster_dims__(CLUSTER, 1, 1)
constexpr u32 CLUSTER_BLOCKS = CLUSTER;
#else
#define ROW_CLUSTER
constexpr u32 CLUSTER_BLOCKS = 1;
#endif

// Called in pairs by all threads of a cluster, and once ahead of the first access to another block's shared memory.
BCG_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

BCG_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

BCG_DEVICE void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

// The twin of a variable in shared memory in another block of the cluster.
template <typename V> BCG_DEVICE V* in_block(V* shared, u32 rank) {
#if __CUDA_ARCH__ >= 900
    u64 address;
    asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"((u64)shared), "r"(rank));
    return (V*)address;
#else
    return shared;
#endif
}

// Orders floats like the unsigned numbers that this makes; NaN becomes 0, below everything.
BCG_DEVICE u32 order(float v) {
    if (v != v) return 0;
    u32 bits = __float_as_uint(v + 0.0f);  // -0 and 0 are equal
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The float of an order other than 0.
BCG_DEVICE float unorder(u32 key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

BCG_DEVICE float not_a_number() { return __int_as_float(0x7fc00000); }

// Orders logits of a row: the larger value is ahead, then the lower index. 0 for NaN, below everything.
BCG_DEVICE u64 logit_key(float v, u32 i) { return v != v ? 0 : (u64)order(v) << 32 | (u32)~i; }

// The index in the largest logit_key() of a row, 0 if there is none.
BCG_DEVICE i32 best_index(u64 key) { return key == 0 ? 0 : (i32)~(u32)key; }

// The likelihood of a token relative to the likeliest.
BCG_DEVICE float weight(float z, float top) { return z == top ? 1.0f : expf(z - top); }

// The best that a thread has met: the larger value wins, then the lower index; NaN never does.
struct Best {
    float value;
    u32 index;

    BCG_DEVICE Best() : value(not_a_number()), index(0) {}

    // Offers values in ascending order of their indices.
    BCG_DEVICE void offer(float v, u32 i) {
        if (v > value || value != value) {
            value = v;
            index = i;
        }
    }

    // Orders the best of several threads; 0 for none.
    BCG_DEVICE u64 key() const { return logit_key(value, index); }
};

// Four neighbouring logits.
struct Quad {
    float v[4];
};

// A block's share of a row of logits, in quads of columns dealt to all threads of the cluster in turn.
struct LogitsRow {
    const float* logits;
    u32 columns;
    u32 rank;   // of the block in its cluster
    bool wide;  // a quad is one access

    BCG_DEVICE LogitsRow(const float* all, i64 stride, u32 columns, u32 row = blockIdx.x / CLUSTER)
        : logits(all + row * stride), columns(columns), rank(blockIdx.x % CLUSTER),
          wide(((u64)all | (u64)stride * 4 | (u64)columns * 4) % 16 == 0) {}

    // Four logits; NaN beyond the row.
    BCG_DEVICE Quad load(u32 first) const {
        const float nan = not_a_number();
        float4 v = make_float4(nan, nan, nan, nan);
        if (wide) {
            if (first < columns) v = *(const float4*)(logits + first);
        } else {
            if (first < columns) v.x = logits[first];
            if (first + 1 < columns) v.y = logits[first + 1];
            if (first + 2 < columns) v.z = logits[first + 2];
            if (first + 3 < columns) v.w = logits[first + 3];
        }
        return {{v.x, v.y, v.z, v.w}};
    }

    // Calls f(first column, quad, number of the quad), ascending, equally often in all threads of the block; UNROLL quads
    // are on their way at once.
    template <u32 UNROLL, typename F> BCG_DEVICE void for_each(F f) const {
        constexpr u32 STEP = CLUSTER_BLOCKS * LOGITS_THREADS * 4;
        u32 mine = (rank * LOGITS_THREADS + threadIdx.x) * 4, number = 0;
#pragma unroll 1
        for (u32 base = 0; base < columns; base += UNROLL * STEP) {
            Quad quads[UNROLL];
#pragma unroll
            for (u32 u = 0; u < UNROLL; u++) quads[u] = load(base + mine + u * STEP);
#pragma unroll
            for (u32 u = 0; u < UNROLL; u++) f(base + mine + u * STEP, quads[u], number++);
        }
    }
};

// Reduces over the cluster; every thread gets the result. `slots` is shared, and free since the last cluster_sync().
template <typename V, typename Op> BCG_DEVICE V cluster_reduce(V v, V identity, Op op, V* slots) {
    v = block_reduce(v, identity, op);
    if (threadIdx.x < CLUSTER_BLOCKS) in_block(slots, threadIdx.x)[blockIdx.x % CLUSTER] = v;
    cluster_sync();
    for (u32 r = 0; r < CLUSTER_BLOCKS; r++) identity = op(identity, slots[r]);
    return identity;
}
