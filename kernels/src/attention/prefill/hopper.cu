// Warp-specialised attention for compute capability 9.0: one warpgroup copies keys and values from their pages into a ring
// of shared tiles, two warpgroups of 64 query rows each multiply them with wgmma and keep scores and outputs in registers.
// Host reference: host.rs; shapes and geometry: mod.rs.
#include "hopper.cuh"
#include "work.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr u32 TILE_KEYS = 128;
static_assert(THREADS == 3 * WARPGROUP, "one warpgroup copies, two multiply");

// Shared memory: two tiles of queries, a ring of tiles of keys and values in the order of their use, then small things.
template <u32 D> struct Shared {
    static constexpr u32 SLOTS = RING_SLOTS;
    static constexpr u32 TILE_BYTES = TILE_KEYS * D * 2;
    static constexpr u32 Q = 0, RING = 2 * TILE_BYTES, MAP = RING + SLOTS * TILE_BYTES;
    static constexpr u32 WORK = MAP + MAP_BYTES;    // [2] the items of the queries
    static constexpr u32 IN_CACHE = WORK + 2 * 32;        // [SLOTS][4] a bit for each key
    static constexpr u32 SKIPS = IN_CACHE + SLOTS * 16;   // [SLOTS][4] bytes: whether a warp's bits have a 0
    static constexpr u32 BARRIERS = (SKIPS + SLOTS * 4 + 7) / 8 * 8;
    static constexpr u32 Q_FULL = BARRIERS, Q_EMPTY = Q_FULL + 16, FULL = Q_EMPTY + 16, EMPTY = FULL + 8 * SLOTS;
};

// s (+)= a · bᵀ: 64 rows of a and 128 rows of b, 16 columns of each, all in shared memory.
BCG_DEVICE void wgmma_scores(float (&s)[64], u64 a, u64 b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" BCG_R64 "}, %64, %65, p, 1, 1, 0, 0;\n}"
                 : BCG_F32(s, 0), BCG_F32(s, 32)
                 : "l"(a), "l"(b), "r"(accumulate));
}
// o += a · b: 64 rows of a in registers, 16 rows of b in shared memory.
BCG_DEVICE void wgmma_output(float (&o)[64], const u32* a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{" BCG_R64 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : BCG_F32(o, 0), BCG_F32(o, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
BCG_DEVICE void wgmma_output(float (&o)[32], const u32* a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{" BCG_R32 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : BCG_F32(o, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// From the keys to the values, whichever come first, in bytes.
BCG_DEVICE u64 distance(const PagedKvArgs& kv) {
    u64 k = (u64)kv.k, v = (u64)kv.v;
    return max(k, v) - min(k, v);
}

// Rows of a box of the tensor map: whole groups that no page boundary cuts. 0 where threads have to copy: if the pages do
// not allow that, if keys and values lie further apart than a stride of a map can say, and for a head dim of 64, where
// boxes take longer (measured on an H200 with pages of 16).
template <u32 D> BCG_DEVICE u32 box_rows(const PagedKvArgs& kv) {
    u32 size = kv.page_size;
    bool fits = D == 128 && size % 8 == 0 && (size % 32 == 0 || 32 % size == 0) &&
                kv.page_stride % ((i64)kv.kv_heads * D * 8) == 0 && distance(kv) < 1ull << 40;
    return fits ? min(size, 32u) : 0;
}

// Makes the tensor map of keys and values in shared memory, by one warp: [2, groups of 8 tokens, blocks of 64 columns, 8,
// 64].
template <u32 D> BCG_DEVICE void make_map(const PagedKvArgs& kv, u32 rows, u32 shared) {
    clear_map(shared);
    if (threadIdx.x % 32 == 0) {
        u64 k = (u64)kv.k, v = (u64)kv.v, token = (u64)kv.kv_heads * D * 2;
        BCG_MAP_FIELD("global_address", "b64", "l", min(k, v));
        BCG_MAP_FIELD("rank", "b32", "n", 4);  // less one
        BCG_MAP_DIM(0, 64, 64);
        BCG_MAP_DIM(1, 8, 8);
        BCG_MAP_DIM(2, kv.kv_heads * (D / 64), D / 64);
        BCG_MAP_DIM(3, (u64)(kv.num_pages * kv.page_stride) * 2 / (8 * token), rows / 8);
        BCG_MAP_DIM(4, 2, 1);
        BCG_MAP_ELEMENT("global_stride", "b64", "l", 0, token);
        BCG_MAP_ELEMENT("global_stride", "b64", "l", 1, (u64)128);
        BCG_MAP_ELEMENT("global_stride", "b64", "l", 2, 8 * token);
        BCG_MAP_ELEMENT("global_stride", "b64", "l", 3, distance(kv));
        finish_map(shared);
    }
    __syncwarp();
}

// Tiles of keys of an item; one, all hidden, if it has no keys.
BCG_DEVICE u32 num_tiles(const Work& w) { return ((u32)max(w.keys, 1) + TILE_KEYS - 1) / TILE_KEYS; }

// One of the four warps that copy: it brings 32 rows of each tile.
template <u32 D> struct Producer {
    using S = Shared<D>;
    const AttentionPrefillArgs& a;
    const u8* map;
    u32 rows_of_box;  // 0: copy row by row
    u32 warp, lane, base;
    Ring<S::SLOTS> ring;

    BCG_DEVICE void copy_boxes(u32 tile, bool is_value, u32 place, u32 full) const {
        if (lane == 0) barrier_expect(full, 32 * D * 2);
        __syncwarp();
        u32 width = a.kv.kv_heads * (D / 8), token = place / width;
        bool second = (a.kv.k > a.kv.v) != is_value;
        if (lane % rows_of_box > 0) return;
        copy_box(tile + lane / 8 * GROUP_BYTES<D>, map, (i32)(place % width / 8), (i32)(token / 8), second, full);
    }

    // Copies keys or values into the next slot of the ring; lane l says where row l is.
    BCG_DEVICE void copy_tile(bool is_value, u32 place, bool skipped) {
        u32 tile = base + S::RING + ring.slot * S::TILE_BYTES + warp * 4 * GROUP_BYTES<D>, full = base + S::FULL + 8 * ring.slot;
        barrier_wait(base + S::EMPTY + 8 * ring.slot, ring.parity ^ 1);
        u32 in_cache = __ballot_sync(FULL_WARP, !skipped);
        if (lane == 0) {
            u32 at = base + 4 * ring.slot, skips = in_cache != FULL_WARP;
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(at + S::IN_CACHE + 12 * ring.slot + 4 * warp), "r"(in_cache) : "memory");
            asm volatile("st.shared.u8 [%0], %1;" ::"r"(at + S::SKIPS + warp), "r"(skips) : "memory");
        }
        if (rows_of_box && __all_sync(FULL_WARP, place != NOWHERE)) {
            copy_boxes(tile, is_value, place, full);
        } else {
            copy_rows<D, 32>(tile, is_value ? a.kv.v : a.kv.k, place);
            if (lane == 0) barrier_arrive(full);
        }
        barrier_arrive_after_copies(full);
        ring.advance();
    }

    BCG_DEVICE void copy_queries(const Work& w, u32 turn) const {
        u32 buffer = turn % 2, full = base + S::Q_FULL + 8 * buffer, at = base + S::WORK + 32 * buffer;
        barrier_wait(base + S::Q_EMPTY + 8 * buffer, turn / 2 % 2 ^ 1);
        u32 place = find_query(a, w, w.row + (i32)(warp * 32 + lane));
        copy_rows<D, 32>(base + S::Q + buffer * S::TILE_BYTES + warp * 4 * GROUP_BYTES<D>, a.q, place);
        if (warp == 0 && lane == 0) {
            asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                         :
                         : "r"(at), "r"(w.row), "r"(w.row_end), "r"(w.shift), "r"(w.keys)
                         : "memory");
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(at + 16), "r"(w.head) : "memory");
            barrier_arrive(full);
        }
        barrier_arrive_after_copies(full);
    }

    // In the order of use: the keys of a tile before the values of the tile ahead of it.
    BCG_DEVICE void run() {
        u64 total = total_work(a), index;
        u32 values = NOWHERE;  // the place of the values that come next
        u32 turn = 0;
        for (; next_work(turn, total, index); turn++) {
            u32 sequence;
            Work w = load_work(a, index, sequence);
            u32 kv_head = w.head / (a.q_heads / a.kv.kv_heads), tiles = num_tiles(w);
            const i32* pages = a.kv.page_table + (i64)sequence * a.kv.max_pages;
            bool skipped;
            u32 place = find_key(a.kv, pages, kv_head, (i32)(warp * 32 + lane), w.keys, skipped);
            copy_queries(w, turn);
            for (u32 n = 0; n < tiles; n++) {
                copy_tile(false, place, skipped);
                u32 here = place;
                place = find_key(a.kv, pages, kv_head, (i32)((n + 1) * TILE_KEYS + warp * 32 + lane), w.keys, skipped);
                if (turn + n > 0) copy_tile(true, values, false);
                values = here;
            }
        }
        if (turn > 0) copy_tile(true, values, false);
    }
};

// A thread of the two warpgroups that multiply.
template <u32 D> struct Consumer {
    using S = Shared<D>;
    const AttentionPrefillArgs& a;
    u32 group, lane, base;  // group: which 64 rows
    float scale;            // times log2(e)
    Ring<S::SLOTS> ring;
    u32 clear_tiles;  // tiles of the item whose keys all rows of the group see
    float o[D / 2], s[TILE_KEYS / 2];
    u32 p[TILE_KEYS / 4];
    TwoRows rows;

    BCG_DEVICE void release(u32 barrier) const {
        __syncwarp();
        if (lane == 0) barrier_arrive(barrier);
    }

    // Waits for the next tile of the ring, and returns its slot.
    BCG_DEVICE u32 wait_tile() {
        u32 slot = ring.slot;
        barrier_wait(base + S::FULL + 8 * slot, ring.parity);
        ring.advance();
        return slot;
    }

    BCG_DEVICE Work wait_queries(u32 turn) {
        u32 buffer = turn % 2, at = base + S::WORK + 32 * buffer;
        barrier_wait(base + S::Q_FULL + 8 * buffer, turn / 2 % 2);
        Work w;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(w.row), "=r"(w.row_end), "=r"(w.shift), "=r"(w.keys)
                     : "r"(at)
                     : "memory");
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(w.head) : "r"(at + 16) : "memory");
        clear_tiles = (u32)max(min(w.row + (i32)(group * 64) + w.shift + 1, w.keys), 0) / TILE_KEYS;
        return w;
    }

    BCG_DEVICE void multiply_scores(u32 buffer, u32 slot) {
        u32 q = matrix<BLOCK_BYTES>(base + S::Q + buffer * S::TILE_BYTES + group * 8 * GROUP_BYTES<D>);
        u32 k = matrix<BLOCK_BYTES>(base + S::RING + slot * S::TILE_BYTES);
#pragma unroll
        for (u32 i = 0; i < D / 16; i++) {
            u32 step = (i / 4 * BLOCK_BYTES + i % 4 * 32) >> 4;
            wgmma_scores(s, descriptor<GROUP_BYTES<D>>(q + step), descriptor<GROUP_BYTES<D>>(k + step), i > 0);
        }
        wgmma_commit();
    }

    BCG_DEVICE void multiply_output(u32 slot) {
        u32 v = matrix<BLOCK_BYTES>(base + S::RING + slot * S::TILE_BYTES);
#pragma unroll
        for (u32 i = 0; i < TILE_KEYS / 16; i++) wgmma_output(o, p + 4 * i, descriptor<GROUP_BYTES<D>>(v + (i * 2 * GROUP_BYTES<D> >> 4)));
        wgmma_commit();
    }

    BCG_DEVICE void wait_output(u32 slot) {
        wgmma_wait<0>();
        pin(o);
        release(base + S::EMPTY + 8 * slot);
    }

    // Turns the scores of tile n, from a slot of the ring, into weights.
    BCG_DEVICE void weigh(const Work& w, u32 n, u32 skips, u32 slot) {
        if (n >= clear_tiles || skips) {
            u32 in_cache[4];
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(in_cache[0]), "=r"(in_cache[1]), "=r"(in_cache[2]), "=r"(in_cache[3])
                         : "r"(base + S::IN_CACHE + 16 * slot)
                         : "memory");
            hide(s, in_cache, (i32)(n * TILE_KEYS), first_row(w) + w.shift, w.keys);
        }
        release(base + S::EMPTY + 8 * slot);
        rows.weigh(s, scale);
        pin(s);
    }

    BCG_DEVICE u32 load_skips(u32 slot) const {
        u32 skips;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(skips) : "r"(base + S::SKIPS + 4 * slot) : "memory");
        return skips;
    }

    BCG_DEVICE void pack_weights() {
#pragma unroll
        for (u32 i = 0; i < TILE_KEYS / 4; i++) p[i] = round_pair<bf16>(s[2 * i], s[2 * i + 1]);
    }

    BCG_DEVICE void clear_output() {
#pragma unroll
        for (u32 i = 0; i < D / 2; i++) o[i] = 0.0f;
    }

    BCG_DEVICE i32 first_row(const Work& w) const { return w.row + (i32)(group * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4); }

    BCG_DEVICE void start() {
        u32 slot = wait_tile();
        fence_async();
        wgmma_begin();
        pin(s);
        multiply_scores(0, slot);
        u32 skips = load_skips(slot);
        wgmma_wait<0>();
        pin(s);
        rows.clear();
        clear_output();
        weigh(w, 0, skips, slot);
        pack_weights();
    }

    // The scores of a tile are multiplied together with the output of the tile before, be it of another item; while the
    // tensor cores are at the output, the scores become weights.
    BCG_DEVICE void run() {
        u64 total = total_work(a), index;
        if (!next_work(0, total, index)) return;
        w = wait_queries(0);
        u32 turn = 0, n = 0, tiles = num_tiles(w);
        start();
        if (tiles == 1) release(base + S::Q_EMPTY);
        while (true) {
            n++;
            bool ends = n == tiles;
            Work next = w;
            if (ends) {
                turn++, n = 0;
                if (!next_work(turn, total, index)) break;
                next = wait_queries(turn);
                tiles = num_tiles(next);
            }
            u32 key_slot = wait_tile(), value_slot = wait_tile();
            fence_async();
            wgmma_begin();
            pin(s);
            pin(o);
            multiply_scores(turn % 2, key_slot);
            wgmma_begin();
            multiply_output(value_slot);
            u32 skips = load_skips(key_slot);
            wgmma_wait<1>();
            pin(s);
            if (n + 1 == tiles) release(base + S::Q_EMPTY + 8 * (turn % 2));
            TwoRows done = rows;
            if (ends) rows.clear();
            weigh(next, n, skips, key_slot);
            // Waiting in both branches keeps the compiler from waiting ahead of the weights.
            if (ends) {
                wait_output(value_slot);
                store_rows<bf16>(done, a, w, first_row(w), o);
                clear_output();
            } else {
                wait_output(value_slot);
                rows.rescale(o);
            }
            pack_weights();
            w = next;
        }
        u32 slot = wait_tile();
        fence_async();
        wgmma_begin();
        pin(o);
        multiply_output(slot);
        wgmma_wait<0>();
        pin(o);
        store_rows<bf16>(rows, a, w, first_row(w), o);
    }

    Work w;
};

template <u32 D> BCG_DEVICE void attention_prefill(const AttentionPrefillArgs& a) {
    using S = Shared<D>;
    extern __shared__ __align__(1024) u8 shared[];
    u32 base = shared_address(shared), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < 2; i++) {
            barrier_init(base + S::Q_FULL + 8 * i, WARPGROUP + 1);
            barrier_init(base + S::Q_EMPTY + 8 * i, 8);
        }
        for (u32 i = 0; i < S::SLOTS; i++) {
            barrier_init(base + S::FULL + 8 * i, WARPGROUP + 4);
            barrier_init(base + S::EMPTY + 8 * i, 8);
        }
    }
    u32 rows = box_rows<D>(a.kv);
    if (warp == 0 && rows > 0) make_map<D>(a.kv, rows, base + S::MAP);
    fence_async();
    __syncthreads();
    // Everything in device memory comes after this: also the maps, whose place an earlier kernel may still use.
    wait_for_inputs();
    release_dependents();
    if (threadIdx.x < WARPGROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        u8* map = a.maps + blockIdx.x * MAP_BYTES;
        if (rows > 0) {
            if (warp == 0) publish_map(base + S::MAP, map);
            asm volatile("bar.sync 3, 128;" ::: "memory");
            acquire_map(map);
        }
        Producer<D>{a, map, rows, warp, lane, base}.run();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        Consumer<D>{a, __shfl_sync(FULL_WARP, warp / 4 - 1, 0), lane, base, a.scale * LOG2_E}.run();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_prefill_hopper_d64(AttentionPrefillArgs a) {
    attention_prefill<64>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_prefill_hopper_d128(AttentionPrefillArgs a) {
    attention_prefill<128>(a);
}

#else

extern "C" __global__ void attention_prefill_hopper_d64(AttentionPrefillArgs) { asm volatile("trap;"); }
extern "C" __global__ void attention_prefill_hopper_d128(AttentionPrefillArgs) { asm volatile("trap;"); }

#endif
