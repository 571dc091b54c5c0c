// What decode attention on a persistent grid reads of its plan.
#pragma once
#include "bcg.cuh"

// A block's share of the work; Rust twin and rules: kernels/src/attention/decode_plan.rs.
struct BlockPlan {
    i32 sequence, item, tile, tiles;  // where the block begins, and how much it takes
    i32 first, last;                  // the blocks that the block's first and last item begin and end on
    i32 len;                          // keys of the sequence that it begins with
    u32 arrivals;  // pieces that are written of the item that begins but does not end on this block; 0 between runs
};
