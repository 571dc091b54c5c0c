// A cluster of blocks per row. Temperature, then top-k, then top-p, then min-p, then the Gumbel maximum of what is left.
// Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "logit_search.cuh"
#include "random.cuh"

// The number in (0, 1) that 23 bits make.
BCG_DEVICE float uniform(u32 bits) { return ((float)bits + 0.5f) * (1.0f / 8388608.0f); }

struct Larger {
    BCG_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }  // of a number and NaN, the number
};

// A token's score in the race. A call: it is rare, and long.
__device__ __noinline__ float score(float z, u32 bits) { return z - logf(-logf(uniform(bits))); }

// The Gumbel race: a token's score is its value plus a random number that its likelihood to win follows.
struct Race {
    u64 stream;
    Best best;
    float bar;  // the best score of the warp

    BCG_DEVICE Race(const SampleArgs& a, u32 b)
        : stream(mix((u64)a.seed[b] + GOLDEN * ((u64)a.step[b] + 1))), bar(minus_infinity()) {}

    // Enters the tokens of a quad; NaN takes no part. Called by whole warps.
    BCG_DEVICE void enter(u32 first, const Quad& quad) {
        u64 counter = stream + GOLDEN * ((u64)first + 1);
#pragma unroll
        for (u32 e = 0; e < 4; e++, counter += GOLDEN) {
            float z = quad.v[e];
            u32 bits = (u32)(mix(counter) >> 41);
            // -log(u) is at least 1 - u, so the score is at most this; the margin covers the quick logarithm.
            float rest = (2.0f - __uint_as_float(0x3f800000u | bits)) - 0.5f / 8388608.0f;
            if (z - (__logf(rest) - 0.01f) >= bar) best.offer(score(z, bits), first + e);
        }
        bar = fmaxf(bar, warp_reduce(best.value, Larger()));
    }

    // The key of one token.
    BCG_DEVICE u64 key(float z, u32 token) const {
        Best one;
        one.offer(score(z, (u32)(mix(stream + GOLDEN * ((u64)token + 1)) >> 41)), token);
        return one.key();
    }
};

// The filters of a row.
struct Filters {
    i32 top_k;
    float top_p, min_p;
    bool has_top_k, has_top_p, has_min_p;

    BCG_DEVICE Filters(const SampleArgs& a, u32 b)
        : top_k(a.top_k[b]), top_p(a.top_p[b]), min_p(a.min_p[b]), has_top_k(top_k > 0 && (u32)top_k < a.columns),
          has_top_p(top_p < 1.0f), has_min_p(min_p > 0.0f) {}

    BCG_DEVICE bool any() const { return has_top_k || has_top_p || has_min_p; }
    BCG_DEVICE bool passes_min_p(float z, float top) const {
        return !has_min_p || z == top || !(weight(z, top) < min_p);
    }
};

// What find_bin takes for the mass that top-p wants.
BCG_DEVICE double fraction(float top_p) { return -(double)fmaxf(top_p, 1e-30f); }

// Filters the listed tokens and lets them race, in one block: a token stays if the tokens above it are less than wanted.
// `wanted` is the mass for top-p where there is no top-k.
BCG_DEVICE u64 finish(const Race& race, const Filters& f, Finalists& list, u32 num, float top, double wanted) {
    constexpr u32 MINE = FINALISTS / LOGITS_THREADS;
    u64 above[MINE] = {}, kept = 0, best = 0;
    u32 ahead[MINE] = {};
    for (u32 i = threadIdx.x; i < num; i += LOGITS_THREADS) list.amounts[i] = fixed(weight(list.values[i], top));
    __syncthreads();
#pragma unroll
    for (u32 m = 0; m < MINE; m++) {
        u32 i = threadIdx.x + m * LOGITS_THREADS;
        for (u32 j = 0; j < num && i < num; j++) {
            if (!(list.values[j] > list.values[i])) continue;
            ahead[m]++;
            above[m] += list.amounts[j];
        }
        if (i < num && ahead[m] < (u32)f.top_k) kept += list.amounts[i];
    }
    if (f.has_top_k) wanted = fmax((double)fmaxf(f.top_p, 0.0f) * (double)block_reduce(kept, 0ull, Sum()), 1.0);
#pragma unroll
    for (u32 m = 0; m < MINE; m++) {
        u32 i = threadIdx.x + m * LOGITS_THREADS;
        if (i >= num || (f.has_top_k && ahead[m] >= (u32)f.top_k) || (f.has_top_p && (double)above[m] >= wanted)) continue;
        if (f.passes_min_p(list.values[i], top)) best = max(best, race.key(list.values[i], list.tokens[i]));
    }
    return best;
}

// The largest value of a row, which is kept for the passes that follow; NaN if there is no other.
BCG_DEVICE float largest(const ScaledRow& row, Shared& s) {
    float top = not_a_number();
    row.first_pass([&](u32, const Quad& z) {
#pragma unroll
        for (u32 e = 0; e < 4; e++) top = fmaxf(top, z.v[e]);  // of a number and NaN, the number
    });
    cluster_wait();
    u32 key = (u32)cluster_reduce((u64)order(top), 0ull, Max(), s.maxima);
    return key == 0 ? not_a_number() : unorder(key);
}

// The key of the best of a row that is not greedy.
BCG_DEVICE u64 draw(const SampleArgs& a, const ScaledRow& row, Shared& s, u32 b) {
    Race race(a, b);
    Filters f(a, b);
    if (!f.any()) {
        row.row.for_each<2>([&](u32 first, const Quad& logits, u32) { race.enter(first, row.scale(logits)); });
        cluster_wait();
        return race.best.key();
    }
    float top = largest(row, s), threshold = minus_infinity();
    if (top != top) return 0;  // nothing but NaN
    Search<false> by_count(top, threshold, (double)f.top_k);
    Search<true> by_mass(top, threshold, fraction(f.top_p));
    if (f.has_top_k || f.has_top_p) {
        bool is_done = f.has_top_k ? by_count.step(row, s) : by_mass.step(row, s);
        u32 num = is_done ? FINALISTS + 1 : gather(row, s, f.has_top_k ? by_count.edge() : by_mass.edge());
        if (num <= FINALISTS) return row.row.rank == 0 ? finish(race, f, s.list, num, top, by_mass.wanted) : 0;
        if (f.has_top_k) {
            threshold = is_done ? threshold : by_count.find(row, s);
            by_mass = Search<true>(top, threshold, fraction(f.top_p));
        }
        if (f.has_top_p) threshold = by_mass.find(row, s);
    }
    row.for_each([&](u32 first, Quad z) {
        bool any = false;
#pragma unroll
        for (u32 e = 0; e < 4; e++) {
            bool stays = z.v[e] >= threshold && f.passes_min_p(z.v[e], top);
            if (!stays) z.v[e] = not_a_number();
            any |= stays;
        }
        if (__any_sync(FULL_WARP, any)) race.enter(first, z);
    });
    return race.best.key();
}

BCG_DEVICE u64 greedy(const LogitsRow& row) {
    Best best;
    row.for_each<4>([&](u32 first, const Quad& logits, u32) {
#pragma unroll
        for (u32 e = 0; e < 4; e++) best.offer(logits.v[e], first + e);
    });
    cluster_wait();
    return best.key();
}

extern "C" __global__ ROW_CLUSTER __launch_bounds__(LOGITS_THREADS, 2) void sample(SampleArgs a) {
    extern __shared__ float4 kept[];
    __shared__ Shared s;
    u32 b = blockIdx.x / CLUSTER;
    LogitsRow row(a.logits, a.stride, a.columns);
    cluster_arrive();
    wait_for_inputs();
    release_dependents();
    if (row.rank >= CLUSTER_BLOCKS) return;
    float temperature = a.temperature[b];
    ScaledRow scaled = {row, temperature, (Quad*)kept, CLUSTER_BLOCKS == CLUSTER ? a.num_kept : 0};
    u64 best = temperature > 0.0f ? draw(a, scaled, s, b) : greedy(row);
    best = cluster_reduce(best, 0ull, Max(), s.winners);
    if (row.rank == 0 && threadIdx.x == 0) a.out[b] = best_index(best);
}
