// A cluster of blocks per row. Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "logits.cuh"

extern "C" __global__ ROW_CLUSTER __launch_bounds__(LOGITS_THREADS, 2) void argmax(ArgmaxArgs a) {
    __shared__ u64 slots[CLUSTER];
    LogitsRow row(a.logits, a.stride, a.columns);
    cluster_arrive();
    wait_for_inputs();
    release_dependents();
    if (row.rank >= CLUSTER_BLOCKS) return;
    Best best;
    row.for_each<4>([&](u32 first, const Quad& logits, u32) {
#pragma unroll
        for (u32 e = 0; e < 4; e++) best.offer(logits.v[e], first + e);
    });
    cluster_wait();
    u64 key = cluster_reduce(best.key(), 0ull, Max(), slots);
    if (row.rank == 0 && threadIdx.x == 0) a.out[blockIdx.x / CLUSTER] = best_index(key);
}
