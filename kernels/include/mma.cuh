// Warp-wide matrix instructions and asynchronous copies, sm_80 and newer: what attention on tensor cores is made of.
#pragma once
#include "bcg.cuh"

BCG_DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Copies 16 bytes from global to shared memory, or writes 16 zeros where !valid; then nothing is read.
BCG_DEVICE void copy_async_16(u32 dst, const void* src, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid ? 16 : 0) : "memory");
}
BCG_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING of this thread's committed groups are under way.
template <u32 PENDING> BCG_DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// Four 8x8 matrices of 16-bit elements; lane l holds the address of row l % 8 of matrix l / 8.
BCG_DEVICE void load_matrices(u32 (&m)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
}
// The same, each matrix transposed.
BCG_DEVICE void load_matrices_transposed(u32 (&m)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
}
// Transposes an 8x8 matrix of 16-bit elements that the warp holds.
BCG_DEVICE u32 transpose_matrix(u32 m) {
    u32 r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(m));
    return r;
}

// c += a b, with a 16x16, b 16x8 and c 16x8 in f32.
template <typename T> BCG_DEVICE void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]);
template <> BCG_DEVICE void mma<bf16>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <> BCG_DEVICE void mma<f16>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two elements in one register, low first.
template <typename T> BCG_DEVICE u32 pair(T low, T high) { return (u32)low.bits | (u32)high.bits << 16; }

// The pair rounded to T, `low` in the low half.
template <typename T> BCG_DEVICE u32 round_pair(float low, float high);
template <> BCG_DEVICE u32 round_pair<bf16>(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
template <> BCG_DEVICE u32 round_pair<f16>(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// Four lanes share a row, each with 2 of the 8 columns of four blocks; after this each has all 8 columns of one block.
BCG_DEVICE void transpose(u32 (&x)[4]) {
    u32 odd = threadIdx.x % 2, high = threadIdx.x / 2 % 2;
    u32 a = __shfl_xor_sync(FULL_WARP, odd ? x[0] : x[1], 1), b = __shfl_xor_sync(FULL_WARP, odd ? x[2] : x[3], 1);
    x[0] = odd ? a : x[0], x[1] = odd ? x[1] : a, x[2] = odd ? b : x[2], x[3] = odd ? x[3] : b;
    a = __shfl_xor_sync(FULL_WARP, high ? x[0] : x[2], 2), b = __shfl_xor_sync(FULL_WARP, high ? x[1] : x[3], 2);
    x[0] = high ? a : x[0], x[1] = high ? b : x[1], x[2] = high ? x[2] : a, x[3] = high ? x[3] : b;
}

// e^v is 2^(v LOG2_E).
constexpr float LOG2_E = 1.4426950408889634f;

// 2^v; one instruction, relative error below 2^-22.
BCG_DEVICE float exp2_fast(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
