// What the kernels of prefill attention share: copies of rows to tiles, scores to weights, the output.
//
// A tile in shared memory is a sequence of groups of 8 rows, a group D / 64 blocks of 64 columns, a row of a block 128
// bytes, whose eight 16-byte chunks are swizzled: chunk c of row r stands at c ^ (r % 8).
#pragma once
#include "mma.cuh"

BCG_DEVICE void copy_16(u32 dst, const void* src) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
BCG_DEVICE void zero_16(u32 dst, const void* readable) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, 0;" ::"r"(dst), "l"(readable) : "memory");
}

// Places are in units of 16 bytes from the start of a tensor.
constexpr u32 NOWHERE = ~0u;

constexpr u32 BLOCK_BYTES = 8 * 128;
template <u32 D> constexpr u32 GROUP_BYTES = D / 64 * BLOCK_BYTES;
template <u32 D> constexpr u32 ROW_BYTES = D * 2;

// The address of a 16-byte chunk of a row.
template <u32 D> BCG_DEVICE u32 chunk_at(u32 tile, u32 row, u32 chunk) {
    return tile + row / 8 * GROUP_BYTES<D> + chunk / 8 * BLOCK_BYTES + row % 8 * 128 + (((chunk ^ row) % 8) << 4);
}

// Copies 2-byte rows of D elements to a tile; lane l < ROWS says where row l is, or that it is to be zeros.
template <u32 D, u32 ROWS> BCG_DEVICE void copy_rows(u32 tile, const void* from, u32 place) {
    constexpr u32 CHUNKS = D / 8, AT_ONCE = 32 / CHUNKS;
    u32 lane = threadIdx.x % 32, chunk = lane % CHUNKS, row = lane / CHUNKS;
    u32 dst = tile + chunk / 8 * BLOCK_BYTES + row * 128, swizzled = (chunk ^ row) % 8;
    const uint4* src = (const uint4*)from + chunk;
    if (__all_sync(FULL_WARP, lane >= ROWS || place != NOWHERE)) {
#pragma unroll
        for (u32 j = 0; j < ROWS; j += AT_ONCE) {
            u32 at = __shfl_sync(FULL_WARP, place, j + row);
            copy_16(dst + j / 8 * GROUP_BYTES<D> + j % 8 * 128 + ((swizzled ^ j % 8) << 4), src + at);
        }
    } else {
#pragma unroll 1
        for (u32 j = 0; j < ROWS; j += AT_ONCE) {
            u32 at = __shfl_sync(FULL_WARP, place, j + row);
            u32 to = dst + j / 8 * GROUP_BYTES<D> + j % 8 * 128 + ((swizzled ^ j % 8) << 4);
            if (at != NOWHERE) copy_16(to, src + at);
            else zero_16(to, from);
        }
    }
}

// What a thread knows of its two query rows, r and r + 8 of the warp's 16: the score that weights are relative to, this
// lane's part of their sum, and by how much the last tile scaled what was there.
//
// Scores and outputs are laid out as the tensor cores leave them: element i is of row i / 2 % 2, at column
// i / 4 * 8 + lane % 4 * 2 + i % 2.
struct TwoRows {
    float max[2];
    float sum[2];
    float kept[2];

    BCG_DEVICE void clear() {
        max[0] = max[1] = minus_infinity();
        sum[0] = sum[1] = 0.0f;
    }

    // Turns scores into weights relative to `max`; scale is times log2(e). `max` follows the largest score only when that
    // is 2⁸ times as heavy: until then the weights are at most 2⁸, which costs no precision, and nothing is rescaled.
    template <u32 N> BCG_DEVICE void weigh(float (&s)[N], float scale) {
        float shift[2];
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            float m[2] = {max[r], s[2 * r]};
#pragma unroll
            for (u32 i = 1; i < N / 2; i++) m[i % 2] = fmaxf(m[i % 2], s[i / 2 * 4 + r * 2 + i % 2]);
            float most = fmaxf(m[0], m[1]);
            most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 1));
            most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 2));
            bool grows = (most - max[r]) * scale > 8.0f;
            kept[r] = grows ? exp2_fast((max[r] - most) * scale) : 1.0f;
            max[r] = grows ? most : max[r];
            shift[r] = max[r] == minus_infinity() ? 0.0f : max[r] * scale;
        }
        float total[4] = {};
#pragma unroll
        for (u32 i = 0; i < N; i++) {
            s[i] = exp2_fast(s[i] * scale - shift[i / 2 % 2]);
            total[i % 4] += s[i];
        }
#pragma unroll
        for (u32 r = 0; r < 2; r++) sum[r] = sum[r] * kept[r] + (total[2 * r] + total[2 * r + 1]);
    }

    template <u32 N> BCG_DEVICE void rescale(float (&o)[N]) const {
        if (!__any_sync(FULL_WARP, kept[0] != 1.0f || kept[1] != 1.0f)) return;
#pragma unroll
        for (u32 i = 0; i < N; i++) o[i] *= kept[i / 2 % 2];
    }

    // Writes the weighted means of rows `row` and `row + 8`, as far as they are ahead of `row_end`; zeros where no key was
    // seen. A head's row 0 is at `head`, the others `stride` elements apart.
    template <typename T, u32 N>
    BCG_DEVICE void store(T* head, i64 stride, i32 row, i32 row_end, const float (&o)[N]) const {
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            float total = sum[r];
            total += __shfl_xor_sync(FULL_WARP, total, 1);
            total += __shfl_xor_sync(FULL_WARP, total, 2);
            float inverse = total > 0.0f ? 1.0f / total : 0.0f;
            i32 t = row + 8 * (i32)r;
            T* out = head + t * stride + threadIdx.x % 4 * 8;
#pragma unroll
            for (u32 j = 0; j < N / 16; j++) {
                u32 x[4];
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    u32 at = (j * 4 + i) * 4 + 2 * r;
                    x[i] = round_pair<T>(o[at] * inverse, o[at + 1] * inverse);
                }
                transpose(x);
                if (t < row_end) *(uint4*)(out + j * 32) = make_uint4(x[0], x[1], x[2], x[3]);
            }
        }
    }
};

// Hides keys behind each row's own, and those whose bit in `in_cache` is not set.
template <u32 N> BCG_DEVICE void hide(float (&s)[N], const u32 (&in_cache)[N / 16], i32 first_key, i32 position, i32 num_keys) {
    i32 column = (i32)(threadIdx.x % 4 * 2);
    i32 limit[2];
#pragma unroll
    for (u32 r = 0; r < 2; r++) limit[r] = min(position + 8 * (i32)r, num_keys - 1) - first_key - column;
#pragma unroll
    for (u32 i = 0; i < N; i++) {
        i32 key = (i32)(i / 4 * 8 + i % 2);
        bool seen = key <= limit[i / 2 % 2] && (in_cache[i / 16] >> (key % 32 + column) & 1);
        s[i] = seen ? s[i] : minus_infinity();
    }
}
