// Thresholds in rows of logits: the value from which on the tokens of a row number so many, or weigh so much. By a
// cluster of blocks, in few passes over the row, with sums that have no order.
#pragma once
#include "logits.cuh"

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
        row.for_each<4>([&](u32 first, const Quad& logits, u32 number) {
            Quad z = scale(logits);
            if (number < num_kept) kept[number * LOGITS_THREADS + threadIdx.x] = z;
            f(first, z);
        });
    }

    template <typename F> BCG_DEVICE void for_each(F f) const {
        if (num_kept == 0) row.for_each<1>([&](u32 first, const Quad& logits, u32) { f(first, scale(logits)); });
        u32 first = (row.rank * LOGITS_THREADS + threadIdx.x) * 4;
#pragma unroll 1
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
