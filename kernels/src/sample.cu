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
    u32 num_kept;  // packs of a thread in dynamic shared memory: its whole share of the row, or none
};

constexpr u32 NUM_BINS = 2048, BIN_BITS = 11;
constexpr u32 SLICE = NUM_BINS / CLUSTER_BLOCKS;  // bins that a block sums over the cluster
constexpr u32 PER_THREAD = (SLICE + LOGITS_THREADS - 1) / LOGITS_THREADS;

struct Found {
    u32 bin;  // NUM_BINS: none
    u64 above;
};

struct Shared {
    u64 maxima[CLUSTER], winners[CLUSTER], totals[CLUSTER];
    u64 warps[LOGITS_THREADS / 32];
    u32 low[NUM_BINS], high[NUM_BINS];  // the halves of what each bin amounts to
    Found found;
};

BCG_DEVICE u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// 23 random bits for each seed, step and token: the same on the host.
BCG_DEVICE u32 random_bits(u64 stream, u32 token) {
    return (u32)(mix(stream + 0x9e3779b97f4a7c15ull * ((u64)token + 1)) >> 41);
}

// The number in (0, 1) that 23 bits make.
BCG_DEVICE float uniform(u32 bits) { return ((float)bits + 0.5f) * (1.0f / 8388608.0f); }

// The likelihood of a token relative to the likeliest.
BCG_DEVICE float weight(float z, float top) { return z == top ? 1.0f : expf(z - top); }

// A weight as a whole number, so that sums have no order.
BCG_DEVICE u64 fixed(float weight) { return __float2ull_rn(weight * 17592186044416.0f); }

// The logits divided by the temperature; kept in shared memory, where each thread reads what it wrote.
struct ScaledRow {
    LogitsRow row;
    float temperature;
    Pack<float>* kept;
    u32 num_kept;  // 0: computed again by each pass

    BCG_DEVICE Pack<float> scale(Pack<float> pack) const {
#pragma unroll
        for (u32 e = 0; e < 4; e++) pack.v[e] /= temperature;
        return pack;
    }

    // The first pass: calls f(first column, pack) and keeps the packs.
    template <typename F> BCG_DEVICE void first_pass(F f) const {
        row.for_each([&](u32 first, const Pack<float>& logits, u32 number) {
            Pack<float> z = scale(logits);
            if (number < num_kept) kept[number * LOGITS_THREADS + threadIdx.x] = z;
            f(first, z);
        });
    }

    template <typename F> BCG_DEVICE void for_each(F f) const {
        if (num_kept == 0) row.for_each([&](u32 first, const Pack<float>& logits, u32) { f(first, scale(logits)); });
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
            const Shared* other = in_block(&s, r);
            amounts[j] += (u64)other->high[bin] << 32 | other->low[bin];
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

// Bins of equal width below the maximum; the last one reaches down to -infinity.
constexpr float BINS_PER_UNIT = 64.0f;
BCG_DEVICE u32 coarse_bin(float z, float top) {
    return z == top ? 0 : (u32)fminf((top - z) * BINS_PER_UNIT, (float)(NUM_BINS - 1));
}

// The largest key, at least `least`, from which on the row's tokens amount to `wanted` (see find_bin), counted or by
// their weights. Bins by value first, then each time finer ones by key within the bin that was found.
template <bool IS_MASS>
BCG_DEVICE u32 find_threshold(const ScaledRow& row, Shared& s, u32 least, float top, double wanted) {
    u32 coarse = NUM_BINS, low = 1, high = order(top), shift = 32;
    for (u64 above = 0;;) {
        for (u32 bin = threadIdx.x; bin < NUM_BINS; bin += LOGITS_THREADS) s.low[bin] = s.high[bin] = 0;
        __syncthreads();
        row.for_each([&](u32, const Pack<float>& pack) {
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                float z = pack.v[e];
                u32 key = order(z), bin = coarse_bin(z, top);
                if (key < least) continue;
                if (coarse < NUM_BINS) {
                    if (bin != coarse || key < low || key > high) continue;
                    bin = (high - key) >> shift;
                }
                u64 amount = IS_MASS ? fixed(weight(z, top)) : 1;
                u32 part = (u32)amount, carry = 0;
                if (IS_MASS) carry = (u32)(amount >> 32) + (atomicAdd(&s.low[bin], part) > ~part);
                else atomicAdd(&s.low[bin], part);
                if (carry) atomicAdd(&s.high[bin], carry);
            }
        });
        Found found = find_bin(s, row.row.rank, above, wanted);
        if (found.bin == NUM_BINS) return least;  // all together amount to less
        above = found.above;
        if (coarse == NUM_BINS) {  // the bin, a little wider than rounding can make it
            coarse = found.bin;
            high = min(high, order(top - ((float)coarse - 0.1f) / BINS_PER_UNIT));
            if (coarse < NUM_BINS - 1) low = order(top - ((float)coarse + 1.1f) / BINS_PER_UNIT);
        } else {
            high -= found.bin << shift;
            if (shift == 0) return high;
            low = max(low, high - ((1u << shift) - 1));
        }
        u32 width = high - low;
        shift = width < NUM_BINS ? 0 : 32 - __clz(width) - BIN_BITS;
    }
}

// The best score that a thread has met, and the best that its warp has.
struct Race {
    u64 stream;
    float best, bar;
    u32 index;

    BCG_DEVICE Race(const SampleArgs& a, u32 b)
        : stream(mix((u64)a.seed[b] + 0x9e3779b97f4a7c15ull * ((u64)a.step[b] + 1))), best(minus_infinity()),
          bar(minus_infinity()), index(0xffffffffu) {}

    // Enters the tokens of a pack; NaN takes no part.
    BCG_DEVICE void enter(u32 first, const Pack<float>& pack) {
#pragma unroll
        for (u32 e = 0; e < 4; e++) {
            float z = pack.v[e];
            u32 bits = random_bits(stream, first + e);
            // -log(u) is at least 1 - u, so the score is at most this; the margin covers the quick logarithm.
            if (!(z - (__logf(uniform(0x7fffff - bits)) - 0.01f) >= bar)) continue;
            float score = z - logf(-logf(uniform(bits)));
            if (score > best || (score == best && index == 0xffffffffu)) {
                best = score;
                index = first + e;
            }
        }
        bar = warp_reduce(best, Max());
    }

    BCG_DEVICE u64 winner() const { return index == 0xffffffffu ? 0 : candidate(order(best), index); }
};

BCG_DEVICE u64 draw(const SampleArgs& a, const ScaledRow& row, Shared& s, u32 b) {
    Race race(a, b);
    i32 top_k = a.top_k[b];
    float top_p = a.top_p[b], min_p = a.min_p[b];
    bool has_top_k = top_k > 0 && (u32)top_k < a.columns;
    if (!has_top_k && !(top_p < 1.0f) && !(min_p > 0.0f)) {
        ScaledRow passing = {row.row, row.temperature, nullptr, 0};
        passing.for_each([&](u32 first, const Pack<float>& z) { race.enter(first, z); });
        cluster_wait();
        return race.winner();
    }
    u32 largest = 0;
    row.first_pass([&](u32, const Pack<float>& z) {
#pragma unroll
        for (u32 e = 0; e < 4; e++) largest = max(largest, order(z.v[e]));
    });
    cluster_wait();
    largest = (u32)cluster_reduce((u64)largest, 0ull, Max(), s.maxima);
    if (largest == 0) return 0;  // nothing but NaN
    float top = __uint_as_float(largest >> 31 ? largest & 0x7fffffffu : ~largest);
    u32 threshold = 1;  // NaN is never kept
    if (has_top_k) threshold = find_threshold<false>(row, s, threshold, top, (double)top_k);
    if (top_p < 1.0f) threshold = find_threshold<true>(row, s, threshold, top, -(double)fmaxf(top_p, 1e-30f));
    row.for_each([&](u32 first, Pack<float> z) {
        bool any = false;
#pragma unroll
        for (u32 e = 0; e < 4; e++) {
            u32 key = order(z.v[e]);
            bool stays = key >= threshold && (key == largest || !(weight(z.v[e], top) < min_p));
            if (!stays) z.v[e] = __int_as_float(0x7fc00000);
            any |= stays;
        }
        if (__any_sync(FULL_WARP, any)) race.enter(first, z);
    });
    return race.winner();
}

BCG_DEVICE u64 greedy(const LogitsRow& row) {
    u32 key = 0, index = 0;
    row.for_each([&](u32 first, const Pack<float>& logits, u32) {
#pragma unroll
        for (u32 e = 0; e < 4; e++) {
            u32 k = order(logits.v[e]);
            if (k > key) {
                key = k;
                index = first + e;
            }
        }
    });
    cluster_wait();
    return candidate(key, index);
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
    ScaledRow scaled = {row, temperature, (Pack<float>*)kept, CLUSTER_BLOCKS == CLUSTER ? a.num_kept : 0};
    u64 best = temperature > 0.0f ? draw(a, scaled, s, b) : greedy(row);
    best = cluster_reduce(best, 0ull, Max(), s.winners);
    if (row.rank == 0 && threadIdx.x == 0) a.out[b] = candidate_index(best);
}
