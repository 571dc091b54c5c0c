// Shapes and geometry: mod.rs; host reference: kernels/src/collective/reduce.rs. Two blocks fit into a multiprocessor, since
// two ranks may share a GPU.
#include "collective_reduce.cuh"

extern "C" __global__ void __launch_bounds__(512, 2) all_reduce_bf16(ReduceArgs a) { reduce<bf16>(a); }
extern "C" __global__ void __launch_bounds__(512, 2) all_reduce_f16(ReduceArgs a) { reduce<f16>(a); }
extern "C" __global__ void __launch_bounds__(512, 2) all_reduce_f32(ReduceArgs a) { reduce<float>(a); }
extern "C" __global__ void __launch_bounds__(512, 2) all_reduce_two_shot_bf16(ReduceArgs a) { reduce_two_shot<bf16>(a); }
extern "C" __global__ void __launch_bounds__(512, 2) all_reduce_two_shot_f16(ReduceArgs a) { reduce_two_shot<f16>(a); }
extern "C" __global__ void __launch_bounds__(512, 2) all_reduce_two_shot_f32(ReduceArgs a) { reduce_two_shot<float>(a); }
