// Shapes: mod.rs; host reference: kernels/src/collective/reduce.rs.
#include "collective_reduce.cuh"

extern "C" __global__ void __launch_bounds__(512, 2) reduce_scatter_rows_bf16(ReduceArgs a) { reduce<bf16>(a); }
extern "C" __global__ void __launch_bounds__(512, 2) reduce_scatter_rows_f16(ReduceArgs a) { reduce<f16>(a); }
extern "C" __global__ void __launch_bounds__(512, 2) reduce_scatter_rows_f32(ReduceArgs a) { reduce<float>(a); }
