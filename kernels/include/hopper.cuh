// What kernels for compute capability 9.0 share: barriers in shared memory, tensor maps, wgmma. MAP_BYTES stands in
// kernels/src/arch.rs.
#pragma once
#include "mma.cuh"

constexpr u32 WARPGROUP = 128;
static_assert(MAP_BYTES == 128, "the instructions below clear and copy tensor maps of 128 bytes");

// The slot of the ring whose turn it is, and the parity of its barriers.
template <u32 SLOTS> struct Ring {
    u32 slot, parity;

    BCG_DEVICE void advance() {
        slot++;
        if (slot == SLOTS) slot = 0, parity ^= 1;
    }
};

BCG_DEVICE void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
BCG_DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives once all earlier asynchronous copies of this thread are done.
BCG_DEVICE void barrier_arrive_after_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
BCG_DEVICE void barrier_wait(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}
// Orders copies that other threads made through the barrier waited for before the tensor cores' reads.
BCG_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Arrives, and expects bytes of copies by the copy engine.
BCG_DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Copies a box of a tensor map to shared memory; counts its bytes at the barrier.
BCG_DEVICE void copy_box(u32 dst, const void* map, u32 column, u32 row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        :
        : "r"(dst), "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}
// The same of a map of five dimensions, from the begin of the first one on.
BCG_DEVICE void copy_box(u32 dst, const void* map, i32 block, i32 group, i32 which, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %2, %3, %4, %5}], [%6];"
        :
        : "r"(dst), "l"(map), "r"(0), "r"(block), "r"(group), "r"(which), "r"(barrier)
        : "memory");
}

// The low half of the descriptor of a matrix in shared memory: the address, and BLOCK_BYTES between blocks of 64 columns,
// in 16 bytes.
template <u32 BLOCK_BYTES> BCG_DEVICE u32 matrix(u32 address) { return address >> 4 | (BLOCK_BYTES >> 4) << 16; }
// The whole: groups of 8 rows are GROUP_BYTES apart, and swizzled by 128 bytes.
template <u32 GROUP_BYTES> BCG_DEVICE u64 descriptor(u32 low) { return (u64)(GROUP_BYTES >> 4 | 1u << 30) << 32 | low; }

BCG_DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
BCG_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <u32 PENDING> BCG_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving what touches these registers across this place.
template <u32 N> BCG_DEVICE void pin(float (&r)[N]) {
#pragma unroll
    for (u32 i = 0; i < N; i++) asm volatile("" : "+f"(r[i])::"memory");
}

#define BCG_F8(x, i) \
    "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), "+f"(x[i + 7])
#define BCG_F32(x, i) BCG_F8(x, i), BCG_F8(x, i + 8), BCG_F8(x, i + 16), BCG_F8(x, i + 24)
#define BCG_R32                                                                         \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "            \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define BCG_R64                                                                         \
    BCG_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "   \
            "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define BCG_MAP_FIELD(field, type, constraint, value)                                  \
    asm volatile("tensormap.replace.tile." field ".shared::cta.b1024." type " [%0], %1;" \
                 :                                                                     \
                 : "r"(shared), constraint(value)                                      \
                 : "memory")
#define BCG_MAP_ELEMENT(field, type, constraint, i, value)                                       \
    asm volatile("tensormap.replace.tile." field ".shared::cta.b1024." type " [%0], " #i ", %1;" \
                 :                                                                               \
                 : "r"(shared), constraint(value)                                                \
                 : "memory")
#define BCG_MAP_DIM(i, size, box)                            \
    BCG_MAP_ELEMENT("global_dim", "b32", "r", i, (u32)(size)); \
    BCG_MAP_ELEMENT("box_dim", "b32", "r", i, (u32)(box));     \
    BCG_MAP_ELEMENT("element_stride", "b32", "r", i, 1u)

// Clears a tensor map in shared memory, by one warp.
BCG_DEVICE void clear_map(u32 shared) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared + threadIdx.x % 32 * 4), "r"(0) : "memory");
    __syncwarp();
}

// Sets what all tensor maps here have: bf16, swizzled by 128 bytes, zeros outside the tensor.
BCG_DEVICE void finish_map(u32 shared) {
    BCG_MAP_FIELD("elemtype", "b32", "n", 10);  // bf16
    BCG_MAP_FIELD("interleave_layout", "b32", "n", 0);
    BCG_MAP_FIELD("swizzle_mode", "b32", "n", 3);  // 128 bytes
    BCG_MAP_FIELD("fill_mode", "b32", "n", 0);
}

// Copies the tensor map to where the copy engine reads it, by the warp that made it.
BCG_DEVICE void publish_map(u32 shared, u8* map) {
    asm volatile("tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%0], [%1], 128;"
                 :
                 : "l"(map), "r"(shared)
                 : "memory");
}
// Lets the calling threads copy by a map that a warp of their block published before.
BCG_DEVICE void acquire_map(const u8* map) {
    asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
}
