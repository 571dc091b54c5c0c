// Chooses the experts of each token: a warp for each row of logits. moe_route_and_permute also orders the choices by expert,
// for few tokens, in one block. Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "moe_permute.cuh"

constexpr u32 NONE = 0xffffffffu;

BCG_DEVICE u32 warp_max(u32 v) {
    u32 r;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(v));
    return r;
}
BCG_DEVICE u32 warp_min(u32 v) {
    u32 r;
    asm volatile("redux.sync.min.u32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(v));
    return r;
}

// A number that orders as v does; both zeros are equal, and NaN comes ahead of all.
BCG_DEVICE u32 to_key(float v) {
    u32 bits = __float_as_uint(v + 0.0f);
    if (v != v) return 0;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
BCG_DEVICE float from_key(u32 key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

BCG_DEVICE float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

// The scores that experts are chosen by, as keys: slot j of a lane is of expert 32 j + lane. Candidates are a bit for
// each slot of the lane.
template <u32 SLOTS> struct Choice {
    u32 keys[SLOTS];
    u32 candidates;

    // The slots with experts from `first` to ahead of `last`.
    BCG_DEVICE static u32 slots(u32 first, u32 last) {
        u32 bits = 0;
#pragma unroll
        for (u32 j = 0; j < SLOTS; j++) {
            u32 expert = 32 * j + threadIdx.x % 32;
            if (expert >= first && expert < last) bits |= 1u << j;
        }
        return bits;
    }

    // Takes the best expert out of `among`, the first of equals, and tells its key. There must be one.
    BCG_DEVICE u32 take(u32& among, u32& key) const {
        u32 lane = threadIdx.x % 32, best = 0, expert = NONE;
#pragma unroll
        for (u32 j = 0; j < SLOTS; j++) {
            if ((among >> j & 1) && (expert == NONE || keys[j] > best)) {
                best = keys[j];
                expert = 32 * j + lane;
            }
        }
        key = warp_max(best);
        u32 winner = warp_min(best == key ? expert : NONE);
        if (winner % 32 == lane) among &= ~(1u << winner / 32);
        return winner;
    }

    // Keeps the candidates of the best groups. A group's score is its best one, or the sum of its two best.
    BCG_DEVICE void keep_groups(u32 groups, u32 kept, u32 group_size, bool sums_two) {
        u32 lane = threadIdx.x % 32, own = 0;
        for (u32 g = 0; g < groups; g++) {
            u32 among = slots(g * group_size, (g + 1) * group_size), key, second;
            take(among, key);
            if (sums_two) {
                take(among, second);
                key = to_key(from_key(key) + from_key(second));
            }
            if (lane == g) own = key;
        }
        bool is_open = lane < groups;
        candidates = 0;
        for (u32 i = 0; i < kept; i++) {
            u32 best = warp_max(is_open ? own : 0);
            u32 g = warp_min(is_open && own == best ? lane : NONE);
            if (lane == g) is_open = false;
            candidates |= slots(g * group_size, (g + 1) * group_size);
        }
    }
};

// Chooses for row t. Lane k gets choice k and its weight.
template <u32 SLOTS> BCG_DEVICE void route_row(const MoeRouteArgs& a, u32 t, u32& expert, float& weight) {
    const float* logits = a.logits + (i64)t * a.logits_stride;
    u32 lane = threadIdx.x % 32;
    bool is_sigmoid = a.bias != nullptr;
    float values[SLOTS], max = minus_infinity(), sum = 0.0f;
#pragma unroll
    for (u32 j = 0; j < SLOTS; j++) {
        u32 e = 32 * j + lane;
        values[j] = e < a.num_experts ? logits[e] : minus_infinity();
        max = fmaxf(max, values[j]);
    }
    Choice<SLOTS> choice;
    choice.candidates = Choice<SLOTS>::slots(0, a.num_experts);
    if (is_sigmoid) {
#pragma unroll
        for (u32 j = 0; j < SLOTS; j++) {
            u32 e = 32 * j + lane;
            choice.keys[j] = to_key(e < a.num_experts ? sigmoid(values[j]) + a.bias[e] : minus_infinity());
        }
    } else {
        max = warp_reduce(max, Max());
#pragma unroll
        for (u32 j = 0; j < SLOTS; j++) {
            choice.keys[j] = to_key(values[j]);
            if (32 * j + lane < a.num_experts) sum += expf(values[j] - max);
        }
        sum = warp_reduce(sum, Sum());
    }
    if (a.kept_groups < a.groups) choice.keep_groups(a.groups, a.kept_groups, a.num_experts / a.groups, is_sigmoid);
    expert = NONE;
    for (u32 k = 0; k < a.chosen; k++) {
        u32 key, best = choice.take(choice.candidates, key);
        if (lane == k) expert = best;
    }
    weight = 0.0f;
    if (lane < a.chosen) weight = is_sigmoid ? sigmoid(logits[expert]) : expf(logits[expert] - max) / sum;
    if (a.is_renormalised) {
        float of_chosen = warp_reduce(weight, Sum());
        weight /= is_sigmoid ? of_chosen + 1e-20f : of_chosen;
    }
    weight *= a.scale;
}

// Chooses for row t by one warp, and writes the choices to `experts`, which may be in shared memory, too.
template <u32 SLOTS> BCG_DEVICE void write_row(const MoeRouteArgs& a, u32 t, i32* experts) {
    u32 lane = threadIdx.x % 32, expert = NONE;
    float weight = 0.0f;
    if ((i32)(a.first_row + t) < *a.num_valid) route_row<SLOTS>(a, t, expert, weight);
    if (lane >= a.chosen) return;
    u32 pair = t * a.chosen + lane;
    a.experts[pair] = (i32)expert;
    a.weights[pair] = weight;
    if (experts) experts[pair] = (i32)expert;
}

// Chooses for every `step`-th row from `first` on.
BCG_DEVICE void write_rows(const MoeRouteArgs& a, u32 first, u32 step, i32* experts) {
    for (u32 t = first; t < a.tokens; t += step) {
        if (a.num_experts <= 128) write_row<4>(a, t, experts);
        else if (a.num_experts <= 256) write_row<8>(a, t, experts);
        else write_row<16>(a, t, experts);
    }
}

extern "C" __global__ __launch_bounds__(32 * WARPS) void moe_route(MoeRouteArgs a) {
    u32 warps = blockDim.x / 32;
    wait_for_inputs();
    release_dependents();
    write_rows(a, blockIdx.x * warps + threadIdx.x / 32, gridDim.x * warps, nullptr);
}

extern "C" __global__ __launch_bounds__(32 * WARPS_MAX) void moe_route_and_permute(MoeRouteArgs a) {
    extern __shared__ u32 counts[];  // [warps, experts of the plan], then the choices
    u32 warps = blockDim.x / 32;
    i32* experts = (i32*)(counts + warps * a.plan.num_experts);
    wait_for_inputs();
    release_dependents();
    write_rows(a, threadIdx.x / 32, warps, experts);
    __syncthreads();
    permute(a.plan, experts, a.tokens * a.chosen, counts, nullptr);
}
