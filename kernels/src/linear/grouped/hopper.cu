// The rows of many tokens times the weights of their experts, for compute capability 9.0. The weight is the tall side of
// the tensor cores' product, so that an expert with few rows wastes little. An item is the product of 2 BOX rows of one
// expert's weight (gate rows and up rows alike) and up to BOX of its rows; a persistent block walks over items. One
// warpgroup brings the weight by the copy engine, and the rows of x, which lie anywhere, by its threads; two warpgroups
// multiply: with BOX 128 each half of the weight's rows, with BOX 64 each half of the rows of x. A sum is made in the same
// order in either. Host reference: host.rs; shapes and geometry: hopper.rs.
#include "args.cuh"
#include "hopper.cuh"
#include "silu.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

static_assert(THREADS == 3 * WARPGROUP, "one warpgroup copies, two multiply");
constexpr u32 ROW_BYTES = 128;  // of 64 columns
constexpr u32 GROUP_BYTES = 8 * ROW_BYTES;
constexpr u32 SLOTS = RING_SLOTS;

// Shared memory: a ring of slots, each with columns of 2 BOX rows of the weight and of BOX rows of x, then small things.
// All is in blocks of 64 columns, whose rows' 16-byte chunks are swizzled: chunk c of row r stands at c ^ (r % 8).
template <u32 BOX> struct Shared {
    static constexpr u32 BLOCKS = 128 / BOX;
    static constexpr u32 COLUMNS = 64 * BLOCKS;  // of a slot
    static constexpr u32 BOX_BYTES = BOX * ROW_BYTES;
    static constexpr u32 WEIGHT_BYTES = BLOCKS * 2 * BOX_BYTES;
    static constexpr u32 SLOT_BYTES = WEIGHT_BYTES + BLOCKS * BOX_BYTES;
    static constexpr u32 MAP = SLOTS * SLOT_BYTES;
    static constexpr u32 FULL = MAP + MAP_BYTES, EMPTY = FULL + 8 * SLOTS;
    static constexpr u32 SCHEDULE = EMPTY + 8 * SLOTS;
    static_assert(MAP == RING_BYTES && SCHEDULE == RING_BYTES + SMALL_BYTES, "the op reckons with another layout");

    BCG_DEVICE static u32 weight_at(u32 slot, u32 block, u32 part) {
        return slot * SLOT_BYTES + (2 * block + part) * BOX_BYTES;
    }
    BCG_DEVICE static u32 x_at(u32 slot, u32 block) { return slot * SLOT_BYTES + WEIGHT_BYTES + block * BOX_BYTES; }
};

// 2 BOX rows of an expert's weight, and some of its places.
struct Item {
    u32 weight_row;  // the first one, among those of all experts
    u32 output;      // the first one
    u32 place;
    u32 places;
};

// The experts in the order of their work: those with the largest items first, so that blocks that each take every
// gridDim.x-th item get equal shares, and the last items are small.
template <bool GATED, u32 BOX> struct Schedule {
    static constexpr u32 OUTPUTS = GATED ? BOX : 2 * BOX;  // of an item

    struct Entry {
        u32 tiles_before;  // items of the experts before, for each of an expert's groups of outputs
        u32 expert;
        u32 first;  // place
        u32 places;
    };
    using Key = uint2;  // of an expert: what it is ordered by, and its tiles
    static_assert(sizeof(Entry) + sizeof(Key) == EXPERT_BYTES, "the op reckons with another size of an expert");

    const GroupedArgs& a;
    Entry* entries;
    u32 groups;
    u32 total;  // items

    // The places of an expert are shared by items evenly.
    BCG_DEVICE static u32 tiles(u32 places) { return (places + BOX - 1) / BOX; }
    BCG_DEVICE static u32 tile_size(u32 places) {
        u32 n = tiles(places);
        return n == 0 ? 0 : ((places + n - 1) / n + 7) / 8 * 8;
    }

    // By all threads of the block.
    BCG_DEVICE Schedule(const GroupedArgs& args, u8* shared) : a(args) {
        entries = (Entry*)shared;
        Key* keys = (Key*)(entries + a.experts);
        for (u32 e = threadIdx.x; e < a.experts; e += THREADS) {
            u32 places = (u32)(a.offsets[e + 1] - a.offsets[e]);
            keys[e] = make_uint2(tile_size(places) << 16 | (0xffff - e), tiles(places));
        }
        __syncthreads();
        for (u32 e = threadIdx.x; e < a.experts; e += THREADS) {
            u32 key = keys[e].x, rank = 0, tiles_before = 0, first = (u32)a.offsets[e];
#pragma unroll 8
            for (u32 other = 0; other < a.experts; other++) {
                Key k = keys[other];
                rank += k.x > key;
                tiles_before += k.x > key ? k.y : 0;
            }
            entries[rank] = {tiles_before, e, first, (u32)a.offsets[e + 1] - first};
        }
        __syncthreads();
        Entry last = entries[a.experts - 1];
        groups = (a.outputs + OUTPUTS - 1) / OUTPUTS;
        total = (last.tiles_before + tiles(last.places)) * groups;
    }

    // The item of this block's turn, if there is one: back and forth over the blocks. Items that stand together share rows
    // of the weight.
    BCG_DEVICE bool find(u32 turn, Item& item) const {
        u32 index = turn * gridDim.x + (turn % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        if (index >= total) return false;
        u32 low = 0, high = a.experts;
        while (high - low > 1) {
            u32 middle = (low + high) / 2;
            if (entries[middle].tiles_before * groups <= index) low = middle;
            else high = middle;
        }
        Entry e = entries[low];
        u32 n = tiles(e.places), size = tile_size(e.places), local = index - e.tiles_before * groups;
        u32 behind = local % n * size;
        item.output = local / n * OUTPUTS;
        item.weight_row = e.expert * a.outputs * (GATED ? 2 : 1) + item.output;
        item.place = e.first + behind;
        item.places = min(size, e.places - behind);
        return true;
    }
};

// Makes the tensor map of the weights of all experts in shared memory, by one warp: [rows, depth].
BCG_DEVICE void make_map(const GroupedArgs& a, u32 rows, u32 box, u32 shared) {
    clear_map(shared);
    if (threadIdx.x % 32 == 0) {
        BCG_MAP_FIELD("global_address", "b64", "l", (u64)a.weight);
        BCG_MAP_FIELD("rank", "b32", "n", 1);  // less one
        BCG_MAP_DIM(0, a.depth, 64);
        BCG_MAP_DIM(1, rows, box);
        BCG_MAP_ELEMENT("global_stride", "b64", "l", 0, (u64)a.depth * 2);
        finish_map(shared);
    }
    __syncwarp();
}

// A thread of the warpgroup that copies: 16 bytes of every 16th row of x.
template <bool GATED, u32 BOX> struct Producer {
    using S = Shared<BOX>;
    static constexpr u32 ROWS = BOX / 16;

    const Schedule<GATED, BOX>& schedule;
    const u8* map;
    u32 base;
    Ring<SLOTS> ring;

    BCG_DEVICE void copy_weight(const Item& item, u32 k, u32 full) const {
        barrier_expect(full, S::WEIGHT_BYTES);
#pragma unroll
        for (u32 block = 0; block < S::BLOCKS; block++)
#pragma unroll
            for (u32 part = 0; part < 2; part++) {
                u32 row = item.weight_row + part * (GATED ? schedule.a.outputs : BOX);
                copy_box(base + S::weight_at(ring.slot, block, part), map, k + 64 * block, row, full);
            }
    }

    BCG_DEVICE void run() {
        const GroupedArgs& a = schedule.a;
        u32 row = threadIdx.x / 8, chunk = threadIdx.x % 8;
        u32 to = base + row * ROW_BYTES + ((chunk ^ row % 8) << 4);
        Item item;
        for (u32 turn = 0; schedule.find(turn, item); turn++) {
            u32 from[ROWS];  // in 16 bytes
#pragma unroll
            for (u32 j = 0; j < ROWS; j++) {
                u32 place = item.place + min(row + 16 * j, item.places - 1);
                u32 source = GATED ? (u32)a.rows[place] / a.chosen : place;
                from[j] = (u32)(source * a.x_stride / 8) + chunk;
            }
            for (u32 k = 0; k < a.depth; k += S::COLUMNS) {
                u32 full = base + S::FULL + 8 * ring.slot;
                barrier_wait(base + S::EMPTY + 8 * ring.slot, ring.parity ^ 1);
                if (threadIdx.x == 0) copy_weight(item, k, full);
                __syncwarp();
#pragma unroll
                for (u32 block = 0; block < S::BLOCKS; block++) {
                    u32 column = k + 64 * block;
                    bool is_there = column + chunk * 8 < a.depth;
#pragma unroll
                    for (u32 j = 0; j < ROWS; j++) {
                        u32 dst = to + S::x_at(ring.slot, block) + 16 * j * ROW_BYTES;
                        const uint4* src = (const uint4*)a.x + (from[j] + column / 8);
                        if (row + 16 * j < item.places) copy_async_16(dst, src, is_there);
                    }
                }
                barrier_arrive_after_copies(full);
                ring.advance();
            }
        }
    }
};

// c += a · bᵀ: 64 rows of a and N rows of b, 16 columns of each, all in shared memory.
template <u32 N> BCG_DEVICE void wgmma(float (&c)[N / 2], u64 a, u64 b);

#define WGMMA(N, A, B, REGISTERS, ...)                                                                              \
    template <> BCG_DEVICE void wgmma<N>(float (&c)[N / 2], u64 a, u64 b) {                                        \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS "}, %" #A ", %" #B        \
                     ", 1, 1, 1, 0, 0;"                                                                             \
                     : __VA_ARGS__                                                                                  \
                     : "l"(a), "l"(b));                                                                             \
    }

#define R4 "%0, %1, %2, %3"
#define R8 R4 ", %4, %5, %6, %7"
#define R16 R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define R24 R16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define R40 BCG_R32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define R48 R40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define R56 R48 ", %48, %49, %50, %51, %52, %53, %54, %55"

WGMMA(8, 4, 5, R4, "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]))
WGMMA(16, 8, 9, R8, BCG_F8(c, 0))
WGMMA(32, 16, 17, R16, BCG_F8(c, 0), BCG_F8(c, 8))
WGMMA(48, 24, 25, R24, BCG_F8(c, 0), BCG_F8(c, 8), BCG_F8(c, 16))
WGMMA(64, 32, 33, BCG_R32, BCG_F32(c, 0))
WGMMA(80, 40, 41, R40, BCG_F32(c, 0), BCG_F8(c, 32))
WGMMA(96, 48, 49, R48, BCG_F32(c, 0), BCG_F8(c, 32), BCG_F8(c, 40))
WGMMA(112, 56, 57, R56, BCG_F32(c, 0), BCG_F8(c, 32), BCG_F8(c, 40), BCG_F8(c, 48))
WGMMA(128, 64, 65, BCG_R64, BCG_F32(c, 0), BCG_F32(c, 32))

// A thread of the two warpgroups that multiply.
template <bool GATED, u32 BOX> struct Consumer {
    using S = Shared<BOX>;
    static constexpr bool SPLITS_WEIGHT = BOX == 128;  // else the rows of x

    const Schedule<GATED, BOX>& schedule;
    u32 group, base;
    Ring<SLOTS> ring;

    BCG_DEVICE void release(u32 slot) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(base + S::EMPTY + 8 * slot);
    }

    // Adds the columns of a slot: 64 rows of either part of the weight times N rows of x.
    template <u32 N> BCG_DEVICE void multiply_slot(u32 slot, float (&sums)[2][N / 2]) const {
        u32 from = base + (SPLITS_WEIGHT ? group * 64 * ROW_BYTES : 0), x_from = base + (SPLITS_WEIGHT ? 0 : group * N * ROW_BYTES);
#pragma unroll
        for (u32 i = 0; i < S::COLUMNS / 16; i++) {
            u32 block = i / 4, column = i % 4 * 32;
            u64 x = descriptor<GROUP_BYTES>(matrix<16>(x_from + S::x_at(slot, block) + column));
#pragma unroll
            for (u32 part = 0; part < 2; part++)
                wgmma<N>(sums[part], descriptor<GROUP_BYTES>(matrix<16>(from + S::weight_at(slot, block, part) + column)), x);
        }
        wgmma_commit();
    }

    // Writes 16 outputs, from `output` on, of N places, from `place` on; words are pairs of places as the tensor cores
    // leave them: word 2j is of the places 8j.. and output lane / 4, word 2j + 1 of the output 8 further on.
    template <u32 N> BCG_DEVICE void store(u32 output, u32 place, u32 places, const u32 (&words)[N / 4]) const {
        const GroupedArgs& a = schedule.a;
        u32 lane = threadIdx.x % 32, column = output + lane % 2 * 8, behind = lane % 4 / 2 * 8 + lane / 4;
        bf16* out = (bf16*)a.out + (i64)(place + behind) * a.outputs + column;
#pragma unroll
        for (u32 n = 0; n < N; n += 16) {
            u32 x[4] = {};
#pragma unroll
            for (u32 i = 0; i < 4; i++)
                if (n / 4 + i < N / 4) x[i] = transpose_matrix(words[n / 4 + i]);
            transpose(x);
            if (n + behind < places && column < a.outputs)
                *(uint4*)(out + (i64)n * a.outputs) = make_uint4(x[0], x[1], x[2], x[3]);
        }
    }

    template <u32 N> BCG_DEVICE void write(const Item& item, const float (&sums)[2][N / 2]) const {
        u32 output = item.output + threadIdx.x / 32 % 4 * 16 + (SPLITS_WEIGHT ? group * 64 : 0);
        u32 behind = SPLITS_WEIGHT ? 0 : group * N;
        u32 places = item.places > behind ? min(item.places - behind, N) : 0;
        u32 words[N / 4];
        if constexpr (GATED) {
#pragma unroll
            for (u32 i = 0; i < N / 4; i++) {
                float v[2];
#pragma unroll
                for (u32 e = 0; e < 2; e++)
                    v[e] = silu_mul<bf16>(round_to<bf16>(sums[0][2 * i + e]), round_to<bf16>(sums[1][2 * i + e]));
                words[i] = round_pair<bf16>(v[0], v[1]);
            }
            store<N>(output, item.place + behind, places, words);
        } else {
#pragma unroll
            for (u32 part = 0; part < 2; part++) {
#pragma unroll
                for (u32 i = 0; i < N / 4; i++) words[i] = round_pair<bf16>(sums[part][2 * i], sums[part][2 * i + 1]);
                store<N>(output + part * BOX, item.place + behind, places, words);
            }
        }
    }

    template <u32 N> BCG_DEVICE void multiply(const Item& item) {
        float sums[2][N / 2] = {};
        u32 before = 0;
        pin(sums[0]);
        pin(sums[1]);
        for (u32 k = 0; k < schedule.a.depth; k += S::COLUMNS) {
            u32 slot = ring.slot;
            barrier_wait(base + S::FULL + 8 * slot, ring.parity);
            ring.advance();
            fence_async();
            wgmma_begin();
            multiply_slot<N>(slot, sums);
            if constexpr (SPLITS_WEIGHT) {
                // The tensor cores stay busy while the slot before is given back.
                if (k > 0) {
                    wgmma_wait<1>();
                    release(before);
                }
                before = slot;
            } else {
                // The copies wait for slots, not the tensor cores for work.
                wgmma_wait<0>();
                release(slot);
            }
        }
        wgmma_wait<0>();
        pin(sums[0]);
        pin(sums[1]);
        if constexpr (SPLITS_WEIGHT) release(before);
        write<N>(item, sums);
    }

    BCG_DEVICE void run() {
        Item item;
        for (u32 turn = 0; schedule.find(turn, item); turn++) {
            if constexpr (SPLITS_WEIGHT) {
                switch ((item.places + 15) / 16) {
                    case 1: multiply<16>(item); break;
                    case 2: multiply<32>(item); break;
                    case 3: multiply<48>(item); break;
                    case 4: multiply<64>(item); break;
                    case 5: multiply<80>(item); break;
                    case 6: multiply<96>(item); break;
                    case 7: multiply<112>(item); break;
                    default: multiply<128>(item);
                }
            } else {
                if (item.places <= 16) multiply<8>(item);
                else if (item.places <= 32) multiply<16>(item);
                else multiply<32>(item);
            }
        }
    }
};

template <bool GATED, u32 BOX> BCG_DEVICE void grouped(const GroupedHopperArgs& args) {
    using S = Shared<BOX>;
    extern __shared__ __align__(1024) u8 shared[];
    const GroupedArgs& a = args.grouped;
    u32 base = shared_address(shared), warp = threadIdx.x / 32;
    if (threadIdx.x == 0)
        for (u32 i = 0; i < SLOTS; i++) {
            barrier_init(base + S::FULL + 8 * i, WARPGROUP + 1);
            barrier_init(base + S::EMPTY + 8 * i, 8);
        }
    if (warp == 0) make_map(a, a.experts * a.outputs * (GATED ? 2 : 1), BOX, base + S::MAP);
    fence_async();
    // Everything in device memory comes after this: also the maps, whose place an earlier kernel may still use.
    wait_for_inputs();
    release_dependents();
    u8* map = args.maps + blockIdx.x * MAP_BYTES;
    if (warp == 0) {
        publish_map(base + S::MAP, map);
        acquire_map(map);
    }
    Schedule<GATED, BOX> schedule(a, shared + S::SCHEDULE);
    if (threadIdx.x < WARPGROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        Producer<GATED, BOX>{schedule, map, base}.run();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        Consumer<GATED, BOX>{schedule, __shfl_sync(FULL_WARP, warp / 4 - 1, 0), base}.run();
    }
}

#define GROUPED_HOPPER(NAME, GATED, BOX)                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME##_hopper_##BOX(GroupedHopperArgs a) { \
        grouped<GATED, BOX>(a);                                                                                 \
    }

#else

#define GROUPED_HOPPER(NAME, GATED, BOX) \
    extern "C" __global__ void NAME##_hopper_##BOX(GroupedHopperArgs) { asm volatile("trap;"); }

#endif

GROUPED_HOPPER(grouped_gate_up, true, 64)
GROUPED_HOPPER(grouped_gate_up, true, 128)
GROUPED_HOPPER(grouped_linear, false, 64)
GROUPED_HOPPER(grouped_linear, false, 128)
