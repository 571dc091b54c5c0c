// Attention of one query per sequence, split over a persistent grid by a plan that the host makes: the walk over a block's
// tiles, the ring of stages that are copied ahead, and what becomes of an item that lies on several blocks.
//
// The work is a list of tiles of TILE keys: for each sequence, for each item (query heads that share keys), the item's
// tiles. Block i takes plan[i].tiles of them from a given place on, PARTS stages for each. An item that lies on several
// blocks leaves a piece per block in `partials`; the block that ends last merges them, in the order of the blocks,
// whichever it is.
#pragma once
#include "args.cuh"
#include "mma.cuh"

// Loads of what another block wrote. In the order of the program, so several are under way together.
BCG_DEVICE float2 load_fresh(const float2* p) {
    float2 v;
    asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p) : "memory");
    return v;
}
BCG_DEVICE float4 load_fresh(const float4* p) {
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

BCG_DEVICE void add(float4& to, float to_scale, float4 v, float scale) {
    to.x = to.x * to_scale + v.x * scale;
    to.y = to.y * to_scale + v.y * scale;
    to.z = to.z * to_scale + v.z * scale;
    to.w = to.w * to_scale + v.w * scale;
}

// Writes four elements of a weighted mean.
template <typename T> BCG_DEVICE void store_mean(T* out, float4 v, float sum) {
    float inverse = sum != 0.0f ? 1.0f / sum : 0.0f;
    uint2 words = {pair(from_f32<T>(v.x * inverse), from_f32<T>(v.y * inverse)),
                   pair(from_f32<T>(v.z * inverse), from_f32<T>(v.w * inverse))};
    *(uint2*)out = words;
}

// A place in the list of tiles, which part of the tile, and how many of the block's tiles are left from there on.
struct Walk {
    i32 sequence, item, tile, part, tiles, len;
};

// The kernel of one block. `Op` is the kernel that derives from it; it has
//   num_heads(walk), stride()                 query heads of an item, and of any item at most
//   row_words()                               words of 16 bytes of a sequence's output
//   look_up(walk, page, offset)               where the key of this lane is; a page of -1 if there is none
//   load(walk, stage, page, offset)           starts the copy of a stage, and commits
//   await_stage()                             waits for the other threads that a stage's copies need
//   load_queries(walk), clear(), attend(stage, scale), finish(walk, is_whole, slot)
//   output(walk, head)                        a head's row of the output, WIDTH elements of T
template <typename Op, typename Args, typename T, u32 WIDTH, u32 WARPS, u32 TILE, u32 PARTS, u32 STAGES, u32 BATCH>
struct PersistentDecode {
    static constexpr u32 THREADS = 32 * WARPS;

    const Args& a;
    u32& is_last;  // in shared memory
    u32 warp, lane, items;

    BCG_DEVICE PersistentDecode(const Args& args, u32& is_last) : a(args), is_last(is_last) {
        warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    }

    BCG_DEVICE Op& op() { return *static_cast<Op*>(this); }
    BCG_DEVICE const Op& op() const { return *static_cast<const Op*>(this); }

    BCG_DEVICE bool ends_item(const Walk& w) const { return (w.tile + 1) * (i32)TILE >= w.len; }

    BCG_DEVICE void advance(Walk& w) const {
        if (PARTS > 1) {
            if (w.part < (i32)PARTS - 1) {
                w.part++;
                return;
            }
            w.part = 0;
        }
        if (--w.tiles == 0) return;
        if (!ends_item(w)) {
            w.tile++;
            return;
        }
        w.tile = 0;
        if (++w.item < (i32)items) return;
        w.item = 0;
        do {
            if (++w.sequence >= (i32)a.sequences) {  // only if the plan is of other lengths
                w.tiles = 0;
                return;
            }
            w.len = a.kv_lens[w.sequence];
        } while (w.len <= 0);
    }

    // The page of a key of the walk's sequence and the offset in it; a page of -1 if there is no such key.
    BCG_DEVICE void find(const Walk& w, u32 key, i32& page, u32& offset) const {
        u32 index = key / a.kv.page_size;
        offset = key - index * a.kv.page_size;
        if (key < (u32)w.len && index < a.kv.max_pages) page = a.kv.page_table[(i64)w.sequence * a.kv.max_pages + index];
    }

    BCG_DEVICE float* piece(u32 slot, u32 head) const {
        return a.partials + ((i64)slot * op().stride() + head) * WIDTH;
    }
    BCG_DEVICE float2* piece_sum(u32 slot, u32 head) const {
        return (float2*)(a.partials + (i64)2 * gridDim.x * op().stride() * WIDTH) + slot * op().stride() + head;
    }

    // Counts a piece of an item on the blocks first..=last, and tells whether it is the last one to be written.
    BCG_DEVICE bool arrives_last(u32 first, u32 last) {
        __syncthreads();
        if (threadIdx.x == 0) {
            u32 before;
            asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                         : "=r"(before)
                         : "l"(&a.plan[first].arrivals), "r"(last - first)
                         : "memory");
            is_last = before == last - first;
        }
        __syncthreads();
        return is_last;
    }

    // Adds up the pieces of an item; writes the output.
    BCG_DEVICE void merge(const Walk& w, u32 first, u32 last) const {
        for (u32 e = threadIdx.x; e < op().num_heads(w) * (WIDTH / 4); e += THREADS) {
            u32 head = e / (WIDTH / 4), d = e % (WIDTH / 4) * 4;
            float m = minus_infinity(), total = 0.0f;
            float4 v = {};
            for (u32 i = first; i <= last; i += BATCH) {  // the loads of a batch are under way together
                float2 s[BATCH];
                float4 part[BATCH];
#pragma unroll
                for (u32 j = 0; j < BATCH; j++) {
                    u32 block = i + j < last ? i + j : last, slot = 2 * block + (block == first);
                    s[j] = load_fresh(piece_sum(slot, head));
                    part[j] = load_fresh((const float4*)(piece(slot, head) + d));
                }
#pragma unroll
                for (u32 j = 0; j < BATCH; j++) {
                    bool is_empty = i + j > last || s[j].y == 0.0f;
                    float larger = is_empty ? m : fmaxf(m, s[j].x);
                    float kept = m == larger ? 1.0f : exp2_fast(m - larger);
                    float weight = is_empty ? 0.0f : exp2_fast(s[j].x - larger);
                    m = larger;
                    total = total * kept + s[j].y * weight;
                    add(v, kept, part[j], weight);
                }
            }
            store_mean(op().output(w, head) + d, v, total);
        }
    }

    // Writes zeros for the sequences without keys, which have no tile.
    BCG_DEVICE void zero_rows() const {
        u32 words = op().row_words();
        for (u32 b = blockIdx.x; b < a.sequences; b += gridDim.x) {
            if (a.kv_lens[b] > 0) continue;
            uint4* row = (uint4*)a.out + (i64)b * words;
            for (u32 i = threadIdx.x; i < words; i += THREADS) row[i] = uint4{};
        }
    }

    BCG_DEVICE void run() {
        BlockPlan plan = a.plan[blockIdx.x];
        Walk ahead = {plan.sequence, plan.item, plan.tile, 0, plan.tiles, plan.len};
        Walk w = ahead;
        i32 page;
        u32 offset;
        op().look_up(ahead, page, offset);
#pragma unroll
        for (u32 stage = 0; stage < STAGES - 1; stage++) {
            op().load(ahead, stage, page, offset);
            if (ahead.tiles) advance(ahead);
            op().look_up(ahead, page, offset);
        }
        zero_rows();
        float scale = a.scale * LOG2_E;
        u32 stage = 0, into = STAGES - 1, first = plan.first;
        while (w.tiles > 0) {
            op().load_queries(w);
            op().clear();
            bool begins = w.tile == 0, ends;
            while (true) {
                copy_async_wait<STAGES - 2>();
                op().await_stage();
                op().load(ahead, into, page, offset);
                if (ahead.tiles) advance(ahead);
                op().look_up(ahead, page, offset);
                op().attend(stage, scale);
                stage = stage + 1 == STAGES ? 0 : stage + 1;
                into = into + 1 == STAGES ? 0 : into + 1;
                ends = ends_item(w);
                if (w.part == (i32)PARTS - 1 && (ends || w.tiles == 1)) break;
                advance(w);
            }
            if (begins) first = blockIdx.x;
            op().finish(w, begins && ends, 2 * blockIdx.x + begins);
            u32 last = ends ? blockIdx.x : (u32)plan.last;
            if (first < last && arrives_last(first, last)) merge(w, first, last);
            advance(w);
        }
    }
};
