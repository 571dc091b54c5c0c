// One block orders all pairs. Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "moe_permute.cuh"

extern "C" __global__ __launch_bounds__(THREADS) void moe_permute(MoePermuteArgs a) {
    extern __shared__ u32 counts[];  // [THREADS / 32, experts of the plan], then the staged rows
    wait_for_inputs();
    release_dependents();
    u16* staged = a.is_staged ? (u16*)(counts + THREADS / 32 * a.plan.num_experts) : nullptr;
    permute(a.plan, a.experts, a.pairs, counts, staged);
}
