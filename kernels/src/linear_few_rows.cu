// Few rows times a large weight: bound by reading the weight once, so a block keeps as much of it on the way as shared
// memory holds. A block takes groups of R rows of the weight; its 16 warps share the columns, 32 at a time in turn.
// Each thread copies the very 16 bytes that it multiplies itself, so the loop over the columns needs no barrier. The
// first copies start ahead of wait_for_inputs(), while the kernel before still runs. The order of a sum depends on the
// number of columns only. Host reference, shapes and geometry: bcg-models/src/ops/linear_few_rows.rs.
#include "bcg.cuh"

struct LinearFewRowsArgs {
    const bf16* x;
    const bf16* weight;
    void* out;
    i64 x_stride;
    i64 weight_stride;
    u32 rows;
    u32 outputs;
    u32 depth;  // a multiple of 8
    u32 out_is_f32;
    u32 weight_is_input;  // a kernel before may have written the weight
    u32 padding;
};

constexpr u32 WARPS = 16;
constexpr u32 THREADS = 32 * WARPS;
constexpr u32 STEP = 32;  // columns of a warp's step
constexpr u32 STEP_BYTES = 2 * STEP;
constexpr u32 TURN = STEP * WARPS;

BCG_DEVICE u32 shared_address(const void* p) {
    u32 address;
    asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(address) : "l"(p));
    return address;
}

// Starts a copy of 16 bytes into shared memory; writes zeros if there is nothing to copy.
BCG_DEVICE void copy_async(u32 to, const void* from, bool is_there) {
    u32 bytes = is_there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

BCG_DEVICE void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the thread's last N groups of copies are there.
template <u32 N> BCG_DEVICE void wait_for_all_but() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

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

// A place in the walk of a warp: over the columns of a group, then over the groups of its block.
struct Place {
    u32 group;
    u32 step;
    BCG_DEVICE void advance(u32 steps) {
        if (++step < steps) return;
        step = 0;
        group += gridDim.x;
    }
};

// R rows of the weight at a time, x of at most ROWS rows, STAGES steps of each warp on the way.
template <u32 R, u32 ROWS, u32 STAGES> struct Block {
    static constexpr u32 TILES = R / 8;
    static constexpr u32 HALVES = ROWS > 8 ? 2 : 1;  // of the 16 rows of x that an instruction takes
    static constexpr u32 PITCH = R + 8;              // of the partial sums: no bank holds two of a warp's

    const LinearFewRowsArgs& a;
    u32 lane, warp;
    u32 slots;  // the thread's first slot in shared memory
    float* partial;

    BCG_DEVICE Block(const LinearFewRowsArgs& args, u8* shared) : a(args) {
        lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        slots = shared_address(shared) + warp * slot_bytes() + lane * 16;
        partial = (float*)(shared + STAGES * WARPS * slot_bytes());
    }

    // A warp's rows of the weight and of x in one step.
    BCG_DEVICE u32 slot_bytes() const { return (R + a.rows) * STEP_BYTES; }
    BCG_DEVICE u32 slot(u32 stage) const { return slots + stage * WARPS * slot_bytes(); }
    BCG_DEVICE u32 row() const { return lane / 4; }
    BCG_DEVICE u32 column(u32 step) const { return step * TURN + warp * STEP + lane % 4 * 8; }

    BCG_DEVICE void copy_weight(u32 stage, Place p) const {
        u32 k = column(p.step), n = p.group * R + row();
        const bf16* from = a.weight + (i64)n * a.weight_stride + k;
#pragma unroll
        for (u32 j = 0; j < TILES; j++) {
            copy_async(slot(stage) + j * 512, from, n + 8 * j < a.outputs && k < a.depth);
            from += 8 * a.weight_stride;
        }
    }

    BCG_DEVICE void copy_x(u32 stage, Place p) const {
        u32 k = column(p.step), to = slot(stage) + R * STEP_BYTES;
#pragma unroll
        for (u32 t = row(), half = 0; half < HALVES; t += 8, half++)
            if (t < a.rows) copy_async(to + half * 512, a.x + (i64)t * a.x_stride + k, k < a.depth);
    }

    BCG_DEVICE void step(u32 stage, float (*sums)[4]) const {
        u32 from = slot(stage);
        uint4 x[2] = {};
#pragma unroll
        for (u32 half = 0; half < HALVES; half++)
            if (row() + 8 * half < a.rows) x[half] = load_shared(from + R * STEP_BYTES + half * 512);
#pragma unroll
        for (u32 j = 0; j < TILES; j++) multiply(sums[j], x[0], x[1], load_shared(from + j * 512));
    }

    // Adds the sums of all warps in order and writes the group's outputs.
    BCG_DEVICE void write(u32 group, float (*sums)[4]) const {
        __syncthreads();  // the partial sums of the group before may still be read
#pragma unroll
        for (u32 t = row(), half = 0; half < HALVES; t += 8, half++) {
            if (t >= a.rows) continue;
            float* to = &partial[(warp * a.rows + t) * PITCH + lane % 4 * 2];
#pragma unroll
            for (u32 j = 0; j < TILES; j++) *(float2*)(to + 8 * j) = make_float2(sums[j][2 * half], sums[j][2 * half + 1]);
        }
        __syncthreads();
        for (u32 i = threadIdx.x; i < a.rows * R; i += THREADS) {
            u32 t = i / R, n = group * R + i % R;
            float sum = 0.0f;
#pragma unroll
            for (u32 w = 0; w < WARPS; w++) sum += partial[(w * a.rows + t) * PITCH + i % R];
            if (n >= a.outputs) continue;
            if (a.out_is_f32) ((float*)a.out)[(i64)t * a.outputs + n] = sum;
            else ((bf16*)a.out)[(i64)t * a.outputs + n] = from_f32<bf16>(sum);
        }
    }

    BCG_DEVICE void run() const {
        u32 groups = (a.outputs + R - 1) / R, steps = (a.depth + TURN - 1) / TURN;
        Place first = {blockIdx.x, 0}, next = first;  // next: of the copies
        if (a.weight_is_input) wait_for_inputs();
        for (u32 stage = 0; stage < STAGES; stage++, next.advance(steps))
            if (next.group < groups) copy_weight(stage, next);
        wait_for_inputs();
        next = first;
        for (u32 stage = 0; stage < STAGES; stage++, next.advance(steps)) {
            if (next.group < groups) copy_x(stage, next);
            end_copy_group();
        }
        float sums[TILES][4] = {};
        u32 stage = 0;
        for (Place now = first; now.group < groups; now.advance(steps), next.advance(steps)) {
            wait_for_all_but<STAGES - 1>();
            step(stage, sums);
            if (next.group < groups) {
                copy_weight(stage, next);
                copy_x(stage, next);
            }
            end_copy_group();
            if (++stage == STAGES) stage = 0;
            if (now.step + 1 < steps) continue;
            write(now.group, sums);
#pragma unroll
            for (u32 j = 0; j < TILES; j++) sums[j][0] = sums[j][1] = sums[j][2] = sums[j][3] = 0.0f;
        }
    }
};

#define LINEAR_FEW_ROWS(R, ROWS, STAGES)                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS) linear_few_rows_##R##_##ROWS(LinearFewRowsArgs a) { \
        extern __shared__ __align__(16) u8 shared[];                                                          \
        release_dependents();                                                                                 \
        Block<R, ROWS, STAGES>(a, shared).run();                                                              \
    }

// As many stages as fit into 224 KiB of shared memory.
LINEAR_FEW_ROWS(16, 8, 8)
LINEAR_FEW_ROWS(16, 16, 6)
LINEAR_FEW_ROWS(32, 2, 6)
LINEAR_FEW_ROWS(32, 8, 5)
LINEAR_FEW_ROWS(32, 16, 3)
LINEAR_FEW_ROWS(48, 2, 4)
LINEAR_FEW_ROWS(48, 8, 3)
LINEAR_FEW_ROWS(48, 16, 2)
