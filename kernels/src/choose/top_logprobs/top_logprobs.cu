// A cluster of blocks per requested row. Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "logits.cuh"

// The key of the thread's best logit below the key `last`; 0 for none.
BCG_DEVICE u64 best_below(const LogitsRow& row, u64 last) {
    u64 best = 0;
    row.for_each<4>([&](u32 first, const Quad& logits, u32) {
#pragma unroll
        for (u32 e = 0; e < 4; e++) {
            u64 key = logit_key(logits.v[e], first + e);
            if (key < last && key > best) best = key;
        }
    });
    return best;
}

// The thread's part of the sum of all weights.
BCG_DEVICE float sum_weights(const LogitsRow& row, float top) {
    float sum = 0.0f;
    row.for_each<4>([&](u32, const Quad& logits, u32) {
#pragma unroll
        for (u32 e = 0; e < 4; e++)
            if (logits.v[e] == logits.v[e]) sum += weight(logits.v[e], top);
    });
    return sum;
}

BCG_DEVICE float logprob(float v, float top, float log_sum) {
    if (v != v) return minus_infinity();
    return (v == top ? 0.0f : v - top) - log_sum;
}

extern "C" __global__ ROW_CLUSTER __launch_bounds__(LOGITS_THREADS, 2) void top_logprobs(TopLogprobsArgs a) {
    __shared__ u64 slots[2][CLUSTER];  // in turn: a block may still read the one when another writes
    __shared__ float sums[CLUSTER];
    cluster_arrive();
    wait_for_inputs();
    release_dependents();
    u32 r = blockIdx.x / CLUSTER, b = (u32)a.rows[r];  // a negative one is large
    bool is_row = b < a.num_rows;                      // if not, it has no columns
    LogitsRow row(a.logits, a.stride, is_row ? a.columns : 0, is_row ? b : 0);
    if (row.rank >= CLUSTER_BLOCKS) return;
    u64 mine = best_below(row, ~0ull);
    cluster_wait();
    u64 best = cluster_reduce(mine, 0ull, Max(), slots[0]);
    float top = best == 0 ? not_a_number() : unorder((u32)(best >> 32));
    float log_sum = logf(cluster_reduce(sum_weights(row, top), 0.0f, Sum(), sums));
    bool writes = row.rank == 0 && threadIdx.x == 0;
    i64 out = (i64)r * (1 + a.num_top);
    if (writes) {
        i32 id = is_row ? a.chosen[b] : -1;
        a.ids[out] = id;
        a.logprobs[out] = logprob((u32)id < row.columns ? row.logits[id] : not_a_number(), top, log_sum);
    }
    for (u32 c = 1; c <= a.num_top; c++) {
        if (writes) {
            a.ids[out + c] = best == 0 ? -1 : best_index(best);
            a.logprobs[out + c] = logprob(best == 0 ? not_a_number() : unorder((u32)(best >> 32)), top, log_sum);
        }
        if (c == a.num_top) break;
        if (mine == best && best != 0) mine = best_below(row, best);  // the thread whose logit was listed
        best = cluster_reduce(mine, 0ull, Max(), slots[c % 2]);
    }
}
