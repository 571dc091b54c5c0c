// What matrix products of few rows share: the 16 warps of a block take 32 columns each in turn, through a ring of slots in
// shared memory. Each thread copies the very 16 bytes that it multiplies itself, so the loop over the columns needs no
// barrier. WARPS and STEP_BYTES stand in the few_rows.rs of each op.
#pragma once
#include "mma.cuh"

constexpr u32 THREADS = 32 * WARPS;
constexpr u32 STEP = STEP_BYTES / 2;        // columns of a warp's step
constexpr u32 TILE_BYTES = 8 * STEP_BYTES;  // 8 rows of a step

BCG_DEVICE uint4 load_shared(u32 from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}

// sums[t, n] += sum_k x[t, k] * w[n, k] over 32 columns. Lane 4g + c holds columns 8c..8c + 8 of rows g (low) and g + 8
// (high) of x and of row g of w; which column is which to the instruction does not matter as long as both agree.
BCG_DEVICE void multiply(float* sums, uint4 low, uint4 high, uint4 w) {
    asm("{ .reg .f32 s0, s1, s2, s3;\n"
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {s0, s1, s2, s3}, {%4, %6, %5, %7}, {%12, %13},"
        " {%0, %1, %2, %3};\n"
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%8, %10, %9, %11}, {%14, %15},"
        " {s0, s1, s2, s3}; }"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(low.x), "r"(low.y), "r"(high.x), "r"(high.y), "r"(low.z), "r"(low.w), "r"(high.z), "r"(high.w),
          "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w));
}

// A thread's part of a ring of STAGES slots for each warp. A slot holds a step of R rows of a weight, then of `capacity`
// rows of x, at most ROWS.
template <u32 R, u32 ROWS, u32 STAGES> struct FewRows {
    static constexpr u32 TILES = R / 8;
    static constexpr u32 HALVES = ROWS > 8 ? 2 : 1;  // of the 16 rows of x that an instruction takes
    static constexpr u32 PITCH = R + 8;              // of the partial sums: no bank holds two of a warp's
    // Shared memory of a block that takes ROWS rows of x: the ring, then the partial sums of all warps.
    static constexpr u32 BLOCK_BYTES = STAGES * WARPS * (R + ROWS) * STEP_BYTES + WARPS * ROWS * PITCH * 4;

    u32 capacity;
    u32 lane, warp;
    u32 slots;  // the thread's first slot in shared memory

    BCG_DEVICE FewRows(u32 capacity, u8* shared) : capacity(capacity) {
        lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        slots = shared_address(shared) + warp * slot_bytes() + lane * 16;
    }

    BCG_DEVICE u32 slot_bytes() const { return (R + capacity) * STEP_BYTES; }
    BCG_DEVICE u32 ring_bytes() const { return STAGES * WARPS * slot_bytes(); }
    BCG_DEVICE u32 slot(u32 stage) const { return slots + stage * WARPS * slot_bytes(); }
    // The row of each tile, and the column of each step, that the thread copies and multiplies.
    BCG_DEVICE u32 row() const { return lane / 4; }
    BCG_DEVICE u32 column() const { return lane % 4 * 8; }

    // Adds a step of all R rows of the weight times `rows` rows of x to the sums.
    BCG_DEVICE void step(u32 stage, u32 rows, float (*sums)[4]) const {
        u32 from = slot(stage);
        uint4 x[2] = {};
#pragma unroll
        for (u32 half = 0; half < HALVES; half++)
            if (row() + 8 * half < rows) x[half] = load_shared(from + R * STEP_BYTES + half * TILE_BYTES);
#pragma unroll
        for (u32 j = 0; j < TILES; j++) multiply(sums[j], x[0], x[1], load_shared(from + j * TILE_BYTES));
    }

    // Writes the warp's sums of `rows` rows of x where `total` finds them, as those of `part`, and clears them.
    BCG_DEVICE void keep(float* partial, u32 part, u32 rows, float (*sums)[4]) const {
#pragma unroll
        for (u32 t = row(), half = 0; half < HALVES; t += 8, half++) {
            if (t >= rows) continue;
            float* to = &partial[(part * capacity + t) * PITCH + lane % 4 * 2];
#pragma unroll
            for (u32 j = 0; j < TILES; j++) *(float2*)(to + 8 * j) = make_float2(sums[j][2 * half], sums[j][2 * half + 1]);
        }
#pragma unroll
        for (u32 j = 0; j < TILES; j++) sums[j][0] = sums[j][1] = sums[j][2] = sums[j][3] = 0.0f;
    }

    // The sum of row t of x and row n of the weight: the parts of all warps, in order.
    BCG_DEVICE float total(const float* partial, u32 t, u32 n) const {
        float sum = 0.0f;
#pragma unroll
        for (u32 part = 0; part < WARPS; part++) sum += partial[(part * capacity + t) * PITCH + n];
        return sum;
    }
};
