// A 64 x 64 tile of the output per block, 4 x 4 per thread; each output is summed in the order of K, whatever T is.
// Host reference, shapes and geometry: bcg-models/src/ops/linear.rs.
#include "bcg.cuh"

struct LinearArgs {
    const void* x;
    const void* weight;
    void* out;
    i64 x_stride;
    i64 weight_stride;
    u32 rows;
    u32 outputs;
    u32 depth;
    u32 padding;
};

constexpr u32 TILE = 64;
constexpr u32 STEP = 16;
constexpr u32 EACH = 4;
constexpr u32 THREADS = (TILE / EACH) * (TILE / EACH);

// Loads a tile of TILE rows by STEP columns as f32, zero outside the matrix.
template <typename T>
BCG_DEVICE void load_tile(float (*tile)[TILE + 1], const T* m, i64 stride, i64 first, i64 rows, u32 k0, u32 depth) {
    for (u32 i = threadIdx.x; i < TILE * STEP; i += THREADS) {
        u32 r = i / STEP, k = i % STEP;
        bool inside = first + r < rows && k0 + k < depth;
        tile[k][r] = inside ? to_f32(m[(first + r) * stride + k0 + k]) : 0.0f;
    }
}

template <typename T, typename O> BCG_DEVICE void linear(const LinearArgs& a) {
    __shared__ float x_tile[STEP][TILE + 1];
    __shared__ float w_tile[STEP][TILE + 1];
    i64 first_output = (i64)blockIdx.x * TILE, first_row = (i64)blockIdx.y * TILE;
    u32 tx = threadIdx.x % (TILE / EACH), ty = threadIdx.x / (TILE / EACH);
    float acc[EACH][EACH] = {};
    for (u32 k0 = 0; k0 < a.depth; k0 += STEP) {
        load_tile(x_tile, (const T*)a.x, a.x_stride, first_row, a.rows, k0, a.depth);
        load_tile(w_tile, (const T*)a.weight, a.weight_stride, first_output, a.outputs, k0, a.depth);
        __syncthreads();
        for (u32 k = 0; k < STEP; k++) {
            float xs[EACH], ws[EACH];
            for (u32 i = 0; i < EACH; i++) xs[i] = x_tile[k][ty + i * (TILE / EACH)];
            for (u32 j = 0; j < EACH; j++) ws[j] = w_tile[k][tx + j * (TILE / EACH)];
            for (u32 i = 0; i < EACH; i++)
                for (u32 j = 0; j < EACH; j++) acc[i][j] += xs[i] * ws[j];
        }
        __syncthreads();
    }
    for (u32 i = 0; i < EACH; i++) {
        i64 row = first_row + ty + i * (TILE / EACH);
        for (u32 j = 0; j < EACH; j++) {
            i64 output = first_output + tx + j * (TILE / EACH);
            if (row < a.rows && output < a.outputs) ((O*)a.out)[row * a.outputs + output] = from_f32<O>(acc[i][j]);
        }
    }
}

extern "C" __global__ void linear_bf16(LinearArgs a) { linear<bf16, bf16>(a); }
extern "C" __global__ void linear_f16(LinearArgs a) { linear<f16, f16>(a); }
extern "C" __global__ void linear_f32(LinearArgs a) { linear<float, float>(a); }
extern "C" __global__ void linear_bf16_f32(LinearArgs a) { linear<bf16, float>(a); }
extern "C" __global__ void linear_f16_f32(LinearArgs a) { linear<f16, float>(a); }
