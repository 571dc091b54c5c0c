// Orders (token, k) pairs by the expert that each goes to: a stable counting sort by one block, which has whole warps and
// at least as many threads as the plan has experts. Rust twin: kernels/src/moe/permute/mod.rs.
#pragma once
#include "args.cuh"
#include "bcg.cuh"

constexpr u32 PAIRS_AT_ONCE = 8;  // pairs that a thread loads ahead

// Calls f(pair, expert) for the pairs of this warp, in order, by all lanes together. Experts are numbered from the first of
// the plan on; NO_EXPERT is that of pairs of others, of padded rows and behind the last pair. Each warp has a range of its own.
constexpr u32 NO_EXPERT = 0xffffffffu;

template <typename F> BCG_DEVICE void for_each_pair(const PlanOut& out, const i32* experts, u32 pairs, F f) {
    u32 range = (pairs + blockDim.x - 1) / blockDim.x * 32;  // of a warp
    u32 begin = threadIdx.x / 32 * range, end = min(begin + range, pairs);
    for (u32 first = begin + threadIdx.x % 32; first - threadIdx.x % 32 < end; first += 32 * PAIRS_AT_ONCE) {
        u32 expert[PAIRS_AT_ONCE];
#pragma unroll
        for (u32 u = 0; u < PAIRS_AT_ONCE; u++) {
            u32 pair = first + 32 * u;
            expert[u] = pair < end ? (u32)experts[pair] - out.first_expert : NO_EXPERT;
            if (expert[u] >= out.num_experts) expert[u] = NO_EXPERT;
        }
#pragma unroll
        for (u32 u = 0; u < PAIRS_AT_ONCE; u++) {
            if (first - threadIdx.x % 32 + 32 * u >= end) break;
            f(first + 32 * u, expert[u]);
        }
    }
}

// Sums of the values of the threads before this one. Called by all threads of the block.
BCG_DEVICE u32 sum_before(u32 value) {
    __shared__ u32 of_warps[32];
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, sum = value;
    for (u32 offset = 1; offset < 32; offset *= 2) {
        u32 other = __shfl_up_sync(FULL_WARP, sum, offset);
        if (lane >= offset) sum += other;
    }
    if (lane == 31) of_warps[warp] = sum;
    __syncthreads();
    u32 before = warp_reduce(lane < warp ? of_warps[lane] : 0u, Sum());
    return before + sum - value;
}

// Writes the plan of `pairs` experts. `counts` has room for a word of each expert of the plan for each warp; `staged`, in shared memory or
// null, for a half-word of each pair: then rows are gathered there, since scattered words are slow to write.
BCG_DEVICE void permute(const PlanOut& out, const i32* experts, u32 pairs, u32* counts, u16* staged) {
    u32 num_experts = out.num_experts, warps = blockDim.x / 32, lane = threadIdx.x % 32;
    u32* own = counts + threadIdx.x / 32 * num_experts;
    for (u32 i = threadIdx.x; i < warps * num_experts; i += blockDim.x) counts[i] = 0;
    __syncthreads();

    // 1. Each warp counts its pairs of each expert.
    for_each_pair(out, experts, pairs, [&](u32, u32 expert) {
        if (expert != NO_EXPERT) atomicAdd(&own[expert], 1u);
    });
    __syncthreads();

    // 2. Counts become the first place of each expert in each warp.
    __shared__ u32 in_use;
    u32 expert = threadIdx.x, total = 0;
    if (expert < num_experts) {
#pragma unroll 8
        for (u32 w = 0; w < warps; w++) total += counts[w * num_experts + expert];
    }
    u32 place = sum_before(total);
    if (expert < num_experts) {
        out.offsets[expert] = (i32)place;
        if (expert == num_experts - 1) {
            out.offsets[num_experts] = (i32)(place + total);
            in_use = place + total;
        }
#pragma unroll 8
        for (u32 w = 0; w < warps; w++) {
            u32 count = counts[w * num_experts + expert];
            counts[w * num_experts + expert] = place;
            place += count;
        }
    }
    __syncthreads();

    // 3. Each warp gives out its places in the order of its pairs.
    for_each_pair(out, experts, pairs, [&](u32 pair, u32 expert) {
        u32 same = __match_any_sync(FULL_WARP, expert);
        u32 rank = __popc(same & ((1u << lane) - 1)), to = NO_EXPERT;
        if (expert != NO_EXPERT) to = own[expert] + rank;
        __syncwarp();
        if (expert != NO_EXPERT && rank == 0) own[expert] += __popc(same);
        __syncwarp();
        if (pair >= pairs) return;
        out.places[pair] = (i32)to;
        if (to == NO_EXPERT) return;
        if (staged) staged[to] = (u16)pair;
        else out.rows[to] = (i32)pair;
    });
    __syncthreads();
    for (u32 i = threadIdx.x; i < pairs; i += blockDim.x) {
        if (i >= in_use) out.rows[i] = -1;
        else if (staged) out.rows[i] = staged[i];
    }
}
