// One block per row. Temperature, then top-k, then top-p, then min-p, then the Gumbel maximum of what is left.
// Host reference, shapes and geometry: bcg-models/src/ops/sample.rs.
#include "bcg.cuh"

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
    u32 padding;
};

// Orders floats like the unsigned numbers that this makes; NaN becomes 0, below everything.
BCG_DEVICE u32 order(float v) {
    if (v != v) return 0;
    if (v == 0.0f) v = 0.0f;  // -0 and 0 are equal
    u32 bits = __float_as_uint(v);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

BCG_DEVICE u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// A number in (0, 1) for each seed, step and token: the same on the host.
BCG_DEVICE float uniform(u64 stream, u32 token) {
    u64 bits = mix(stream + 0x9e3779b97f4a7c15ull * ((u64)token + 1)) >> 41;
    return ((float)bits + 0.5f) * (1.0f / 8388608.0f);
}

struct Row {
    const float* logits;
    u32 columns;
    float temperature;

    BCG_DEVICE float scaled(u32 c) const { return temperature > 0.0f ? logits[c] / temperature : logits[c]; }
};

BCG_DEVICE float weight(float z, float max) { return z == max ? 1.0f : expf(z - max); }

BCG_DEVICE i64 count_from(const Row& row, u32 threshold) {
    i64 count = 0;
    for (u32 c = threadIdx.x; c < row.columns; c += blockDim.x) count += order(row.scaled(c)) >= threshold;
    return block_reduce(count, 0ll, Sum());
}

BCG_DEVICE double mass_from(const Row& row, u32 threshold, float max) {
    double mass = 0.0;
    for (u32 c = threadIdx.x; c < row.columns; c += blockDim.x) {
        float z = row.scaled(c);
        u32 key = order(z);
        if (key != 0 && key >= threshold) mass += (double)weight(z, max);
    }
    return block_reduce(mass, 0.0, Sum());
}

// The largest threshold that keeps at least `wanted` of count or mass; found bit by bit, at least `threshold`.
BCG_DEVICE u32 top_k_threshold(const Row& row, i64 wanted) {
    u32 threshold = 0;
    for (int bit = 31; bit >= 0; bit--) {
        u32 candidate = threshold | 1u << bit;
        if (count_from(row, candidate) >= wanted) threshold = candidate;
    }
    return threshold;
}

BCG_DEVICE u32 top_p_threshold(const Row& row, u32 kept, float top_p, float max) {
    double wanted = (double)top_p * mass_from(row, kept, max);
    u32 threshold = 0;
    for (int bit = 31; bit >= 0; bit--) {
        u32 candidate = threshold | 1u << bit;
        if (mass_from(row, candidate > kept ? candidate : kept, max) >= wanted) threshold = candidate;
    }
    return threshold > kept ? threshold : kept;
}

BCG_DEVICE u32 kept_from(const Row& row, const SampleArgs& a, float max) {
    i32 top_k = a.top_k[blockIdx.x];
    float top_p = a.top_p[blockIdx.x];
    u32 threshold = 1;  // NaN is never kept
    if (top_k > 0 && (u32)top_k < row.columns) threshold = top_k_threshold(row, top_k);
    if (threshold == 0) threshold = 1;
    if (top_p < 1.0f) threshold = top_p_threshold(row, threshold, top_p, max);
    u32 largest = order(max);
    return threshold < largest ? threshold : largest;
}

extern "C" __global__ void sample(SampleArgs a) {
    Row row = {a.logits + (i64)blockIdx.x * a.stride, a.columns, a.temperature[blockIdx.x]};
    bool greedy = !(row.temperature > 0.0f);
    float max = minus_infinity();
    for (u32 c = threadIdx.x; c < row.columns; c += blockDim.x) {
        float z = row.scaled(c);
        if (z > max) max = z;
    }
    max = block_reduce(max, minus_infinity(), Max());
    u32 threshold = greedy ? order(max) : kept_from(row, a, max);
    float min_p = greedy ? 0.0f : a.min_p[blockIdx.x];
    u64 stream = mix((u64)a.seed[blockIdx.x] + 0x9e3779b97f4a7c15ull * ((u64)a.step[blockIdx.x] + 1));
    float best = minus_infinity();
    u32 index = 0xffffffffu;
    for (u32 c = threadIdx.x; c < row.columns; c += blockDim.x) {
        float z = row.scaled(c);
        u32 key = order(z);
        if (key == 0 || key < threshold || (z != max && weight(z, max) < min_p)) continue;
        float score = greedy ? z : z - logf(-logf(uniform(stream, c)));
        if (score > best || (score == best && c < index)) {
            best = score;
            index = c;
        }
    }
    float top = block_reduce(best, minus_infinity(), Max());
    u32 first = block_reduce(best == top ? index : 0xffffffffu, 0xffffffffu, [](u32 x, u32 y) { return x < y ? x : y; });
    if (threadIdx.x == 0) a.out[blockIdx.x] = first == 0xffffffffu ? 0 : (i32)first;
}
