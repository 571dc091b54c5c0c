// The arguments of all products of rows with the matrices of their experts. Rust twin: args.rs.
#pragma once
#include "silu.cuh"

struct GroupedArgs {
    const void* x;
    const void* weight;
    void* out;
    const i32* offsets;  // [experts + 1]
    const i32* rows;     // [places]
    i64 x_stride;
    u32 experts;
    u32 outputs;  // columns of out
    u32 depth;
    u32 chosen;
    u32 places;
    u32 weight_is_input;
};
