// Shapes: mod.rs; host reference: kernels/src/collective/gather.rs.
#include "collective_gather.cuh"

extern "C" __global__ void __launch_bounds__(512, 2) all_to_all_bf16(GatherArgs a) { gather<bf16>(a); }
extern "C" __global__ void __launch_bounds__(512, 2) all_to_all_f16(GatherArgs a) { gather<f16>(a); }
extern "C" __global__ void __launch_bounds__(512, 2) all_to_all_f32(GatherArgs a) { gather<float>(a); }
