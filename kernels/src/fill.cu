// One block per row. Host reference, shapes and geometry: bcg-models/src/ops/fill.rs.
#include "bcg.cuh"

struct FillArgs {
    u8* x;
    u64 bits;
    i64 stride;
    u32 columns;
    u32 padding;
};

template <typename W> BCG_DEVICE void fill(const FillArgs& a) {
    W* row = (W*)a.x + (i64)blockIdx.x * a.stride;
    for (u32 c = threadIdx.x; c < a.columns; c += blockDim.x) row[c] = (W)a.bits;
}

extern "C" __global__ void fill_1(FillArgs a) { fill<u8>(a); }
extern "C" __global__ void fill_2(FillArgs a) { fill<u16>(a); }
extern "C" __global__ void fill_4(FillArgs a) { fill<u32>(a); }
extern "C" __global__ void fill_8(FillArgs a) { fill<u64>(a); }
