// What every kernel shares: element types that compute in f32, sums over warps and blocks, copies of rows.
// Needs no CUDA header. Rust twins of the conversions: kernels/src/float.rs.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

#define BCG_DEVICE __device__ __forceinline__

struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};

BCG_DEVICE float to_f32(float v) { return v; }
BCG_DEVICE float to_f32(bf16 v) { return __uint_as_float((u32)v.bits << 16); }
BCG_DEVICE float to_f32(f16 v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
    return f;
}

// Rounds to the nearest even value of T.
template <typename T> BCG_DEVICE T from_f32(float v);
template <> BCG_DEVICE float from_f32<float>(float v) { return v; }
template <> BCG_DEVICE bf16 from_f32<bf16>(float v) {
    u32 pair;  // converting a pair is the quick instruction
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(v));
    return {(u16)pair};
}
template <> BCG_DEVICE f16 from_f32<f16>(float v) {
    f16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
    return r;
}

// The f32 value nearest to v that T can hold.
template <typename T> BCG_DEVICE float round_to(float v) { return to_f32(from_f32<T>(v)); }
template <> BCG_DEVICE float round_to<bf16>(float v) {
    u32 pair;  // v in the upper half, where the bits of an f32 are
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(v), "f"(0.0f));
    return __uint_as_float(pair);
}

BCG_DEVICE float minus_infinity() { return __int_as_float(0xff800000); }

// Waits until the kernels before have ended and their writes are visible. A kernel that the runtime may start early
// (`Kernel::programmatic`) calls it in every thread, ahead of its first access to memory that those kernels use.
BCG_DEVICE void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start its part ahead of wait_for_inputs() once every block has called this or ended.
BCG_DEVICE void release_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

constexpr u32 FULL_WARP = 0xffffffffu;

struct Sum {
    template <typename V> BCG_DEVICE V operator()(V a, V b) const { return a + b; }
};
struct Max {
    template <typename V> BCG_DEVICE V operator()(V a, V b) const { return a > b ? a : b; }
};

// Every lane gets the result; the order is fixed.
template <typename V, typename Op> BCG_DEVICE V warp_reduce(V v, Op op) {
    for (int offset = 16; offset > 0; offset /= 2) v = op(v, __shfl_xor_sync(FULL_WARP, v, offset));
    return v;
}

// Every thread gets the result; the order is fixed. For blocks of whole warps, called by all threads of the block.
template <typename V, typename Op> BCG_DEVICE V block_reduce(V v, V identity, Op op) {
    __shared__ V partial[32];
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    v = warp_reduce(v, op);
    __syncthreads();  // the call before may still be read
    if (lane == 0) partial[warp] = v;
    __syncthreads();
    return warp_reduce(lane < warps ? partial[lane] : identity, op);
}

// Neighbouring elements that fill 16 bytes, the widest access of a thread.
template <typename T> struct Pack {
    static constexpr u32 LEN = 16 / sizeof(T);
    u32 words[4];
};

BCG_DEVICE u32 to_bits(float v) { return __float_as_uint(v); }
BCG_DEVICE u32 to_bits(bf16 v) { return v.bits; }
BCG_DEVICE u32 to_bits(f16 v) { return v.bits; }

// Element e of a pack.
BCG_DEVICE float get(const Pack<float>& p, u32 e) { return __uint_as_float(p.words[e]); }
BCG_DEVICE float get(const Pack<bf16>& p, u32 e) {
    u32 word = p.words[e / 2];
    return __uint_as_float(e % 2 ? word & 0xffff0000u : word << 16);
}
BCG_DEVICE float get(const Pack<f16>& p, u32 e) { return to_f32(f16{(u16)(p.words[e / 2] >> 16 * (e % 2))}); }

// The pack of f32 values, each rounded as from_f32 does.
template <typename T> BCG_DEVICE Pack<T> pack(const float (&v)[Pack<T>::LEN]);
template <> BCG_DEVICE Pack<float> pack<float>(const float (&v)[4]) {
    return {{__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])}};
}
template <> BCG_DEVICE Pack<bf16> pack<bf16>(const float (&v)[8]) {
    Pack<bf16> p;
#pragma unroll
    for (u32 w = 0; w < 4; w++) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(p.words[w]) : "f"(v[2 * w + 1]), "f"(v[2 * w]));
    return p;
}
template <> BCG_DEVICE Pack<f16> pack<f16>(const float (&v)[8]) {
    Pack<f16> p;
#pragma unroll
    for (u32 w = 0; w < 4; w++) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(p.words[w]) : "f"(v[2 * w + 1]), "f"(v[2 * w]));
    return p;
}

// Elements first … of a row of `columns`: one access where WIDE says that address and width are multiples of 16 bytes,
// else one for each element; zeros beyond the row.
template <bool WIDE, typename T> BCG_DEVICE Pack<T> load_pack(const T* row, u32 first, u32 columns) {
    Pack<T> p = {};
    if constexpr (WIDE) {
        if (first < columns) {
            uint4 v = *(const uint4*)(row + first);
            p = {{v.x, v.y, v.z, v.w}};
        }
    } else {
        constexpr u32 PER_WORD = 4 / sizeof(T);
#pragma unroll
        for (u32 e = 0; e < Pack<T>::LEN; e++)
            if (first + e < columns) p.words[e / PER_WORD] |= to_bits(row[first + e]) << 16 * (e % PER_WORD);
    }
    return p;
}

// Writes what load_pack reads.
template <bool WIDE, typename T> BCG_DEVICE void store_pack(T* row, u32 first, u32 columns, const Pack<T>& p) {
    if constexpr (WIDE) {
        if (first < columns) *(uint4*)(row + first) = make_uint4(p.words[0], p.words[1], p.words[2], p.words[3]);
    } else {
#pragma unroll
        for (u32 e = 0; e < Pack<T>::LEN; e++)
            if (first + e < columns) row[first + e] = from_f32<T>(get(p, e));
    }
}

// Copies a row of words by all threads of all blocks in y.
template <typename W> BCG_DEVICE void copy_words(u8* dst, const u8* src, i64 bytes) {
    constexpr u32 UNROLL = 4;
    W* d = (W*)dst;
    const W* s = (const W*)src;
    i64 len = bytes / (i64)sizeof(W), step = (i64)blockDim.x * gridDim.y;
    for (i64 i = (i64)blockIdx.y * blockDim.x + threadIdx.x; i < len; i += UNROLL * step) {
        W words[UNROLL];
#pragma unroll
        for (u32 u = 0; u < UNROLL; u++)
            if (i + u * step < len) words[u] = s[i + u * step];
#pragma unroll
        for (u32 u = 0; u < UNROLL; u++)
            if (i + u * step < len) d[i + u * step] = words[u];
    }
}

// Copies a row by all threads of all blocks in y, in the widest words that both addresses allow.
BCG_DEVICE void copy_row(u8* dst, const u8* src, i64 bytes) {
    u64 low = (u64)dst | (u64)src | (u64)bytes;
    if (low % 16 == 0) copy_words<uint4>(dst, src, bytes);
    else if (low % 4 == 0) copy_words<u32>(dst, src, bytes);
    else if (low % 2 == 0) copy_words<u16>(dst, src, bytes);
    else copy_words<u8>(dst, src, bytes);
}

template <typename W> BCG_DEVICE void fill_words(u8* dst, i64 bytes, W word) {
    i64 step = (i64)blockDim.x * gridDim.y;
    for (i64 i = (i64)blockIdx.y * blockDim.x + threadIdx.x; i < bytes / (i64)sizeof(W); i += step) ((W*)dst)[i] = word;
}

// Fills a row with a pattern by all threads of all blocks in y. The pattern repeats every 1, 2, 4 or 8 bytes, and the
// address and the width are multiples of that.
BCG_DEVICE void fill_row(u8* dst, i64 bytes, u64 pattern) {
    u64 low = (u64)dst | (u64)bytes;
    u32 half = (u32)pattern, other = (u32)(pattern >> 32);
    if (low % 16 == 0) fill_words(dst, bytes, make_uint4(half, other, half, other));
    else if (low % 8 == 0) fill_words(dst, bytes, pattern);
    else if (low % 4 == 0) fill_words(dst, bytes, half);
    else if (low % 2 == 0) fill_words(dst, bytes, (u16)pattern);
    else fill_words(dst, bytes, (u8)pattern);
}
