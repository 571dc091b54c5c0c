// Products of rows with the matrix of the expert that each belongs to, for any float dtype and any size. A persistent
// grid: each block walks the experts and takes every gridDim.x-th tile of ROWS places by COLUMNS outputs. The order of a
// sum depends on the depth only. Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "silu.cuh"

constexpr u32 ROWS = 16;
constexpr u32 COLUMNS = 64;
constexpr u32 STEP = 32;  // a warp loads a step of a row
constexpr u32 COLUMNS_APART = THREADS / ROWS;
constexpr u32 PER_THREAD = COLUMNS / COLUMNS_APART;

// Writes the columns from `column` on of the places first..last, at most ROWS, of one expert. With GATED the matrix has
// a gate row and, `outputs` rows further, an up row for each output, and x is picked by row.
template <typename T, bool GATED>
BCG_DEVICE void tile(const GroupedArgs& a, const T* weight, i32 first, i32 last, u32 column) {
    constexpr u32 HALVES = GATED ? 2 : 1;
    __shared__ float xs[ROWS][STEP];
    __shared__ float ws[HALVES][COLUMNS][STEP + 1];  // threads read rows: without the extra word, of one bank
    u32 lane = threadIdx.x % STEP, warp = threadIdx.x / STEP;
    u32 row = threadIdx.x / COLUMNS_APART, left = threadIdx.x % COLUMNS_APART;
    float sums[HALVES][PER_THREAD] = {};
    for (u32 k = 0; k < a.depth; k += STEP) {
        bool in_depth = k + lane < a.depth;
        __syncthreads();  // the step before is still read
        for (u32 r = warp; r < ROWS; r += THREADS / STEP) {
            i32 place = first + (i32)r;
            float v = 0.0f;
            if (in_depth && place < last) {
                i64 source = GATED ? (i64)((u32)a.rows[place] / a.chosen) : (i64)place;
                v = to_f32(((const T*)a.x)[source * a.x_stride + k + lane]);
            }
            xs[r][lane] = v;
        }
        for (u32 h = 0; h < HALVES; h++) {
            for (u32 c = warp; c < COLUMNS; c += THREADS / STEP) {
                u32 n = column + c;
                bool is_there = in_depth && n < a.outputs;
                ws[h][c][lane] = is_there ? to_f32(weight[((i64)h * a.outputs + n) * a.depth + k + lane]) : 0.0f;
            }
        }
        __syncthreads();
        for (u32 s = 0; s < STEP; s++) {
            float v = xs[row][s];
#pragma unroll
            for (u32 h = 0; h < HALVES; h++)
#pragma unroll
                for (u32 c = 0; c < PER_THREAD; c++) sums[h][c] = fmaf(v, ws[h][left + c * COLUMNS_APART][s], sums[h][c]);
        }
    }
    i32 place = first + (i32)row;
    if (place >= last) return;
#pragma unroll
    for (u32 c = 0; c < PER_THREAD; c++) {
        u32 n = column + left + c * COLUMNS_APART;
        if (n >= a.outputs) continue;
        float v = sums[0][c];
        if constexpr (GATED) v = silu_mul<T>(round_to<T>(v), round_to<T>(sums[1][c]));
        ((T*)a.out)[(i64)place * a.outputs + n] = from_f32<T>(v);
    }
}

template <typename T, bool GATED> BCG_DEVICE void grouped(const GroupedArgs& a) {
    wait_for_inputs();
    release_dependents();
    u32 column_tiles = (a.outputs + COLUMNS - 1) / COLUMNS;
    i64 matrix_len = (i64)(GATED ? 2 : 1) * a.outputs * a.depth;
    u32 ahead = 0;  // tiles of the experts before, modulo the grid
    for (u32 e = 0; e < a.experts; e++) {
        i32 first = a.offsets[e], last = a.offsets[e + 1];
        u32 tiles = ((u32)(last - first) + ROWS - 1) / ROWS * column_tiles;
        const T* weight = (const T*)a.weight + e * matrix_len;
        for (u32 i = (blockIdx.x + gridDim.x - ahead) % gridDim.x; i < tiles; i += gridDim.x)
            tile<T, GATED>(a, weight, first + (i32)(i / column_tiles * ROWS), last, i % column_tiles * COLUMNS);
        ahead = (ahead + tiles) % gridDim.x;
    }
}

extern "C" __global__ __launch_bounds__(THREADS) void grouped_gate_up_bf16(GroupedArgs a) { grouped<bf16, true>(a); }
extern "C" __global__ __launch_bounds__(THREADS) void grouped_gate_up_f16(GroupedArgs a) { grouped<f16, true>(a); }
extern "C" __global__ __launch_bounds__(THREADS) void grouped_gate_up_f32(GroupedArgs a) { grouped<float, true>(a); }
extern "C" __global__ __launch_bounds__(THREADS) void grouped_linear_bf16(GroupedArgs a) { grouped<bf16, false>(a); }
extern "C" __global__ __launch_bounds__(THREADS) void grouped_linear_f16(GroupedArgs a) { grouped<f16, false>(a); }
extern "C" __global__ __launch_bounds__(THREADS) void grouped_linear_f32(GroupedArgs a) { grouped<float, false>(a); }
