// Few rows times a large weight: bound by reading the weight once, so a block keeps as much of it on the way as shared
// memory holds. A block takes groups of R rows of the weight; its 16 warps share the columns, 32 at a time in turn.
// Each thread copies the very 16 bytes that it multiplies itself, so the loop over the columns needs no barrier. The
// first copies start ahead of wait_for_inputs(), while the kernel before still runs. The order of a sum depends on the
// number of columns only. Host reference: host.rs; shapes and geometry: few_rows.rs.
#include "args.cuh"
#include "few_rows.cuh"

constexpr u32 TURN = STEP * WARPS;

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
template <u32 R, u32 ROWS, u32 STAGES> struct Block : FewRows<R, ROWS, STAGES> {
    using Base = FewRows<R, ROWS, STAGES>;
    using Base::HALVES, Base::TILES, Base::row, Base::slot, Base::warp;

    const LinearFewRowsArgs& a;
    float* partial;

    BCG_DEVICE Block(const LinearFewRowsArgs& args, u8* shared) : Base(args.rows, shared), a(args) {
        partial = (float*)(shared + this->ring_bytes());
    }

    BCG_DEVICE u32 column(u32 step) const { return step * TURN + warp * STEP + Base::column(); }

    BCG_DEVICE void copy_weight(u32 stage, Place p) const {
        u32 k = column(p.step), n = p.group * R + row();
        const bf16* from = a.weight + (i64)n * a.weight_stride + k;
#pragma unroll
        for (u32 j = 0; j < TILES; j++) {
            copy_async_16(slot(stage) + j * TILE_BYTES, from, n + 8 * j < a.outputs && k < a.depth);
            from += 8 * a.weight_stride;
        }
    }

    BCG_DEVICE void copy_x(u32 stage, Place p) const {
        u32 k = column(p.step), to = slot(stage) + R * STEP_BYTES;
#pragma unroll
        for (u32 t = row(), half = 0; half < HALVES; t += 8, half++)
            if (t < a.rows) copy_async_16(to + half * TILE_BYTES, a.x + (i64)t * a.x_stride + k, k < a.depth);
    }

    // Adds the sums of all warps in order and writes the group's outputs.
    BCG_DEVICE void write(u32 group, float (*sums)[4]) const {
        __syncthreads();  // the partial sums of the group before may still be read
        this->keep(partial, warp, a.rows, sums);
        __syncthreads();
        for (u32 i = threadIdx.x; i < a.rows * R; i += THREADS) {
            u32 t = i / R, n = group * R + i % R;
            float sum = this->total(partial, t, i % R);
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
            copy_async_commit();
        }
        float sums[TILES][4] = {};
        u32 stage = 0;
        for (Place now = first; now.group < groups; now.advance(steps), next.advance(steps)) {
            copy_async_wait<STAGES - 1>();
            this->step(stage, a.rows, sums);
            if (next.group < groups) {
                copy_weight(stage, next);
                copy_x(stage, next);
            }
            copy_async_commit();
            if (++stage == STAGES) stage = 0;
            if (now.step + 1 < steps) continue;
            write(now.group, sums);
        }
    }
};

// Beside each kernel stands the shared memory that it needs for its most rows, for the test of the host's formula.
#define LINEAR_FEW_ROWS(R, ROWS, STAGES)                                                                      \
    extern "C" __constant__ const u32 linear_few_rows_##R##_##ROWS##_bytes =                                  \
        FewRows<R, ROWS, STAGES>::BLOCK_BYTES;                                                                \
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
