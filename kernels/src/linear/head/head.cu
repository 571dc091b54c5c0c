// One matrix product per head. On tensor cores (bf16) a block takes 32 tokens and 32 outputs of a head: it copies all it
// needs at once, its four warps share the depth, and their sums are added in order. Otherwise a thread takes an output of
// one token. Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "mma.cuh"

constexpr u32 THREADS = 32 * WARPS;
constexpr u32 SUM_PITCH = TILE_OUTPUTS + 2;

// Copies rows of `columns` elements, a multiple of 8, to rows of shared memory that are 16 bytes longer; zeros where
// there is no row.
BCG_DEVICE void copy_tile(u32 to, const bf16* from, i64 stride, u32 rows, u32 rows_there, u32 columns) {
    u32 chunks = columns / 8;
    for (u32 i = threadIdx.x; i < rows * chunks; i += THREADS) {
        u32 row = i / chunks, chunk = i % chunks;
        bool is_there = row < rows_there;
        copy_async_16(to + row * (columns + 8) * 2 + chunk * 16, from + (is_there ? row * stride + chunk * 8 : 0), is_there);
    }
}

// Outputs n … n + 16 of 16 columns of the depth, as the two right-hand sides of an instruction.
template <bool TRANSPOSED> BCG_DEVICE void load_weight(u32 (&b)[4], u32 weight, u32 n, u32 k, u32 depth) {
    u32 lane = threadIdx.x % 32;
    if constexpr (TRANSPOSED) {
        load_matrices_transposed(b, weight + ((k + lane % 16) * (TILE_OUTPUTS + 8) + n + lane / 16 * 8) * 2);
    } else {
        load_matrices(b, weight + ((n + lane % 8 + lane / 16 * 8) * (depth + 8) + k + lane / 8 % 2 * 8) * 2);
    }
}

template <bool TRANSPOSED> BCG_DEVICE void head_linear_tiled(const HeadLinearArgs& a) {
    extern __shared__ __align__(16) u8 shared[];
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 first_token = blockIdx.x * TILE_TOKENS, first_output = blockIdx.y * TILE_OUTPUTS, head = blockIdx.z;
    u32 tokens = min(a.tokens - first_token, TILE_TOKENS);
    u32 x = shared_address(shared), weight = x + TILE_TOKENS * (a.depth + 8) * 2;
    wait_for_inputs();
    release_dependents();
    const bf16* of_head = (const bf16*)a.weight + head * a.weight_stride;
    if (TRANSPOSED) copy_tile(weight, of_head + first_output, a.outputs, a.depth, a.depth, TILE_OUTPUTS);
    else copy_tile(weight, of_head + (i64)first_output * a.depth, a.depth, TILE_OUTPUTS, TILE_OUTPUTS, a.depth);
    i64 first_row = (i64)first_token * a.heads + head;
    copy_tile(x, (const bf16*)a.x + first_row * a.x_stride, a.x_stride * a.heads, TILE_TOKENS, tokens, a.depth);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    float sums[2][4][4] = {};  // 16 tokens, 8 outputs
    for (u32 k = warp * 16; k < a.depth; k += WARPS * 16) {
        u32 tile[2][4];
#pragma unroll
        for (u32 m = 0; m < 2; m++)
            load_matrices(tile[m], x + ((m * 16 + lane % 16) * (a.depth + 8) + k + lane / 16 * 8) * 2);
#pragma unroll
        for (u32 n = 0; n < 2; n++) {
            u32 b[4];
            load_weight<TRANSPOSED>(b, weight, n * 16, k, a.depth);
            u32 low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
            for (u32 m = 0; m < 2; m++) {
                mma<bf16>(sums[m][2 * n], tile[m], low);
                mma<bf16>(sums[m][2 * n + 1], tile[m], high);
            }
        }
    }
    __syncthreads();  // the sums take the place of the tiles
    float* parts = (float*)shared;
#pragma unroll
    for (u32 m = 0; m < 2; m++)
#pragma unroll
        for (u32 n = 0; n < 4; n++)
#pragma unroll
            for (u32 r = 0; r < 2; r++) {
                u32 token = m * 16 + lane / 4 + 8 * r;
                float* to = parts + (warp * TILE_TOKENS + token) * SUM_PITCH + n * 8 + lane % 4 * 2;
                *(float2*)to = make_float2(sums[m][n][2 * r], sums[m][n][2 * r + 1]);
            }
    __syncthreads();
    for (u32 i = threadIdx.x; i < tokens * TILE_OUTPUTS; i += THREADS) {
        u32 token = i / TILE_OUTPUTS, n = i % TILE_OUTPUTS;
        float sum = 0.0f;
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) sum += parts[(w * TILE_TOKENS + token) * SUM_PITCH + n];
        i64 row = (i64)(first_token + token) * a.heads + head;
        ((bf16*)a.out)[row * a.outputs + first_output + n] = from_f32<bf16>(sum);
    }
}

template <typename T> BCG_DEVICE void head_linear(const HeadLinearArgs& a) {
    wait_for_inputs();
    release_dependents();
    u32 n = blockIdx.y * blockDim.x + threadIdx.x, head = blockIdx.z;
    if (n >= a.outputs) return;
    i64 row = (i64)blockIdx.x * a.heads + head;
    const T* x = (const T*)a.x + row * a.x_stride;
    const T* weight = (const T*)a.weight + head * a.weight_stride + (i64)n * (a.is_transposed ? 1 : a.depth);
    i64 step = a.is_transposed ? a.outputs : 1;
    float sum = 0.0f;
    for (u32 k = 0; k < a.depth; k++) sum += to_f32(x[k]) * to_f32(weight[k * step]);
    ((T*)a.out)[row * a.outputs + n] = from_f32<T>(sum);
}

extern "C" __global__ void __launch_bounds__(THREADS) head_linear_tiled(HeadLinearArgs a) { head_linear_tiled<false>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) head_linear_tiled_transposed(HeadLinearArgs a) { head_linear_tiled<true>(a); }
extern "C" __global__ void head_linear_bf16(HeadLinearArgs a) { head_linear<bf16>(a); }
extern "C" __global__ void head_linear_f16(HeadLinearArgs a) { head_linear<f16>(a); }
extern "C" __global__ void head_linear_f32(HeadLinearArgs a) { head_linear<float>(a); }
