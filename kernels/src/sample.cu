// A cluster of blocks per row. Temperature, then top-k, then top-p, then min-p, then the Gumbel maximum of what is left.
// Host reference, shapes and geometry: bcg-models/src/ops/sample.rs.
#include "logits.cuh"

struct SampleArgs {
    const float* logits;
    const float* temperature;
    const i32* top_k;
    const float* top_p;
    const float* min_p;
    const i64* seed;
    const i64* step;
    i32* out;
    i64 stride;
    u32 columns;
    u32 num_kept;  // quads of a thread in dynamic shared memory: its whole share of the row, or none
};

constexpr u32 NUM_BINS = 2048, BIN_BITS = 11;
constexpr u32 SLICE = NUM_BINS / CLUSTER_BLOCKS;  // bins that a block sums over the cluster
constexpr u32 PER_THREAD = (SLICE + LOGITS_THREADS - 1) / LOGITS_THREADS;

struct Found {
    u32 bin;  // NUM_BINS: none
    u64 above;
};

// Tokens that the filters may keep, in no order, where they are few.
constexpr u32 FINALISTS = NUM_BINS / 2;
struct Finalists {
    u64 amounts[FINALISTS];
    float values[FINALISTS];
    u32 tokens[FINALISTS];
};

struct Bins {
    u32 low[NUM_BINS], high[NUM_BINS];  // the halves of what each bin amounts to
};

struct Shared {
    u64 maxima[CLUSTER], winners[CLUSTER], totals[CLUSTER];
    u64 warps[LOGITS_THREADS / 32];
    union {
        Bins bins;
        Finalists list;
    };
    u32 listed;
    Found found;
};

constexpr u64 GOLDEN = 0x9e3779b97f4a7c15ull;

// 64 random bits for each counter: the same on the host.
BCG_DEVICE u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// The number in (0, 1) that 23 bits make.
BCG_DEVICE float uniform(u32 bits) { return ((float)bits + 0.5f) * (1.0f / 8388608.0f); }

struct Larger {
    BCG_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }  // of a number and NaN, the number
};

// The likelihood of a token relative to the likeliest.
BCG_DEVICE float weight(float z, float top) { return z == top ? 1.0f : expf(z - top); }

// A weight as a whole number, so that sums have no order.
BCG_DEVICE u64 fixed(float weight) { return __float2ull_rn(weight * 17592186044416.0f); }

// The logits divided by the temperature; kept in shared memory, where each thread reads what it wrote.
struct ScaledRow {
    LogitsRow row;
    float temperature;
    Quad* kept;
    u32 num_kept;  // 0: computed again by each pass

    BCG_DEVICE Quad scale(Quad quad) const {
#pragma unroll
        for (u32 e = 0; e < 4; e++) quad.v[e] /= temperature;
        return quad;
    }

    // The first pass: calls f(first column, quad) and keeps the quads.
    template <typename F> BCG_DEVICE void first_pass(F f) const {
        row.for_each([&](u32 first, const Quad& logits, u32 number) {
            Quad z = scale(logits);
            if (number < num_kept) kept[number * LOGITS_THREADS + threadIdx.x] = z;
            f(first, z);
        });
    }

    template <typename F> BCG_DEVICE void for_each(F f) const {
        if (num_kept == 0) row.for_each([&](u32 first, const Quad& logits, u32) { f(first, scale(logits)); });
        u32 first = (row.rank * LOGITS_THREADS + threadIdx.x) * 4;
        for (u32 n = 0; n < num_kept; n++, first += CLUSTER_BLOCKS * LOGITS_THREADS * 4)
            f(first, kept[n * LOGITS_THREADS + threadIdx.x]);
    }
};

// The sum of v over the threads of the block up to this one.
BCG_DEVICE u64 block_scan(u64 v, u64* warps) {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (u32 offset = 1; offset < 32; offset *= 2) {
        u64 other = __shfl_up_sync(FULL_WARP, v, offset);
        if (lane >= offset) v += other;
    }
    if (lane == 31) warps[warp] = v;
    __syncthreads();
    for (u32 w = 0; w < warp; w++) v += warps[w];
    return v;
}

// Searches the bins, from 0 on, for the one where what lies above it and in it first amounts to `wanted`. A negative
// `wanted` stands for that fraction of all, which is returned in it.
BCG_DEVICE Found find_bin(Shared& s, u32 rank, u64 above, double& wanted) {
    cluster_sync();  // the bins of all blocks are full
    u64 amounts[PER_THREAD], sum = 0;
    bool is_used = threadIdx.x * PER_THREAD < SLICE;
#pragma unroll
    for (u32 j = 0; j < PER_THREAD; j++) {
        u32 bin = rank * SLICE + threadIdx.x * PER_THREAD + j;
        amounts[j] = 0;
        for (u32 r = 0; r < CLUSTER_BLOCKS && is_used; r++) {
            const Bins& bins = in_block(&s, r)->bins;
            amounts[j] += (u64)bins.high[bin] << 32 | bins.low[bin];
        }
        sum += amounts[j];
    }
    u64 end = block_scan(sum, s.warps);
    if (threadIdx.x == LOGITS_THREADS - 1)
        for (u32 r = 0; r < CLUSTER_BLOCKS; r++) in_block(&s, r)->totals[rank] = end;
    if (threadIdx.x == 0) s.found.bin = NUM_BINS;
    cluster_sync();  // the totals are there, the bins are read
    u64 before = above, total = 0;
    for (u32 r = 0; r < CLUSTER_BLOCKS; r++) {
        if (r < rank) before += s.totals[r];
        total += s.totals[r];
    }
    if (wanted < 0.0) wanted = fmax(-wanted * (double)total, 1.0);
    before += end - sum;
#pragma unroll
    for (u32 j = 0; j < PER_THREAD; j++) {
        if ((double)before < wanted && (double)(before + amounts[j]) >= wanted)
            for (u32 r = 0; r < CLUSTER_BLOCKS; r++)
                in_block(&s, r)->found = {rank * SLICE + threadIdx.x * PER_THREAD + j, before};
        before += amounts[j];
    }
    cluster_sync();
    return s.found;
}

// Bins of equal width below the largest value; the last one reaches down to -infinity.
constexpr float BINS_PER_UNIT = 64.0f;
BCG_DEVICE u32 coarse_bin(float z, float top) {
    return min(__float2uint_rz((top - z) * BINS_PER_UNIT), NUM_BINS - 1);  // infinity - infinity counts as 0
}

// Searches the largest value from which on the row's tokens amount to `wanted` (see find_bin), counted or by their
// weights. Bins by value first, then each time finer ones by order() within the bin that was found.
template <bool IS_MASS> struct Search {
    float top, threshold;  // the largest value; what is found, at first the least value that counts
    double wanted;
    u64 above = 0;
    u32 low, high, coarse = NUM_BINS, shift = 0;

    BCG_DEVICE Search(float top, float least, double wanted)
        : top(top), threshold(least), wanted(wanted), low(order(least)), high(order(top)) {}

    BCG_DEVICE void fill(const ScaledRow& row, Bins& bins) const {
        for (u32 bin = threadIdx.x; bin < NUM_BINS; bin += LOGITS_THREADS) bins.low[bin] = bins.high[bin] = 0;
        __syncthreads();
        float from = unorder(low), to = unorder(high);
        row.for_each([&](u32, const Quad& quad) {
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                float z = quad.v[e];
                if (!(z >= from && z <= to)) continue;
                u32 bin = coarse_bin(z, top);
                if (coarse < NUM_BINS) {
                    if (bin != coarse) continue;
                    bin = (high - order(z)) >> shift;
                }
                u64 amount = IS_MASS ? fixed(weight(z, top)) : 1;
                u32 part = (u32)amount, carry = 0;
                if (IS_MASS) carry = (u32)(amount >> 32) + (atomicAdd(&bins.low[bin], part) > ~part);
                else atomicAdd(&bins.low[bin], part);
                if (carry) atomicAdd(&bins.high[bin], carry);
            }
        });
    }

    // A value that no token of the first bins up to the one found is below.
    BCG_DEVICE float edge() const {
        return coarse < NUM_BINS - 1 ? top - ((float)coarse + 1.1f) / BINS_PER_UNIT : minus_infinity();
    }

    // Halves the search many times; tells whether it has come to its end. Called by all threads of the cluster.
    BCG_DEVICE bool step(const ScaledRow& row, Shared& s) {
        fill(row, s.bins);
        Found found = find_bin(s, row.row.rank, above, wanted);
        if (found.bin == NUM_BINS) return true;  // all together amount to less
        above = found.above;
        if (coarse == NUM_BINS) {
            coarse = found.bin;
            low = max(low, order(edge()));
            high = min(high, order(top - ((float)coarse - 0.1f) / BINS_PER_UNIT));
        } else {
            high -= found.bin << shift;
            if (shift == 0) {
                threshold = unorder(high);
                return true;
            }
            low = max(low, high - ((1u << shift) - 1));
        }
        u32 width = high - low;
        shift = width < NUM_BINS ? 0 : 32 - __clz(width) - BIN_BITS;
        return false;
    }

    BCG_DEVICE float find(const ScaledRow& row, Shared& s) {
        while (!step(row, s)) {}
        return threshold;
    }
};

// Lists the tokens from `least` on in the first block of the cluster and returns their number; lists none if they are
// more than FINALISTS. Called by all threads of the cluster.
BCG_DEVICE u32 gather(const ScaledRow& row, Shared& s, float least) {
    if (threadIdx.x == 0) s.listed = 0;
    __syncthreads();
    row.for_each([&](u32 first, const Quad& quad) {
#pragma unroll
        for (u32 e = 0; e < 4; e++) {
            if (!(quad.v[e] >= least)) continue;
            u32 place = atomicAdd(&s.listed, 1);
            if (place >= FINALISTS) continue;
            s.list.values[place] = quad.v[e];
            s.list.tokens[place] = first + e;
        }
    });
    __syncthreads();
    u32 mine = s.listed, rank = row.row.rank;
    if (threadIdx.x < CLUSTER_BLOCKS) in_block(&s, threadIdx.x)->totals[rank] = mine;
    cluster_sync();
    u32 before = 0, total = 0;
    for (u32 r = 0; r < CLUSTER_BLOCKS; r++) {
        if (r < rank) before += (u32)s.totals[r];
        total += (u32)s.totals[r];
    }
    if (total > FINALISTS) return total;
    Finalists& list = in_block(&s, 0)->list;
    for (u32 i = threadIdx.x; i < mine && rank > 0; i += LOGITS_THREADS) {
        list.values[before + i] = s.list.values[i];
        list.tokens[before + i] = s.list.tokens[i];
    }
    cluster_sync();
    return total;
}

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

    BCG_DEVICE float score(float z, u32 bits) const { return z - logf(-logf(uniform(bits))); }

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
        ScaledRow passing = {row.row, row.temperature, nullptr, 0};
        passing.for_each([&](u32 first, const Quad& z) { race.enter(first, z); });
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
    row.for_each([&](u32 first, const Quad& logits, u32) {
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
