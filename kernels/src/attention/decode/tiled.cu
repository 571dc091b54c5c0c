// Attention of one query per sequence, split over a persistent grid by a plan that the host makes.
//
// The work is a list of tiles of TILE keys: for each sequence, for each item (up to 8 * NT query heads that share a
// key-value head), the item's tiles. Block i takes plan[i].tiles of them from a given place on. Each of its warps takes
// 16 keys of each tile through its own ring in shared memory, so warps meet at the end of an item only. Keys are the
// rows of the matrix instructions and query heads the columns: S^T = K Q^T, O^T = V^T P^T.
// An item that lies on several blocks leaves a piece per block in `partials`; the block that ends last merges them, in
// the order of the blocks, whichever it is.
// Host reference: host.rs; shapes, geometry and plan: mod.rs.
#include "attention_decode.cuh"
#include "mma.cuh"

constexpr u32 WARPS = 4, CHUNK = 16, TILE = WARPS * CHUNK, STAGES = 3, BATCH = 8, THREADS = 32 * WARPS;

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

// A place in the list of tiles, and how many of the block's tiles are left from there on.
struct Walk {
    i32 sequence, item, tile, tiles, len;
};

template <typename T, u32 D, u32 NT> struct Decode {
    static constexpr u32 HEADS = 8 * NT, ROW_BYTES = D * sizeof(T), CHUNK_BYTES = CHUNK * ROW_BYTES, PITCH = D + 4;

    struct Shared {
        u8 ring[WARPS][STAGES][2][CHUNK_BYTES];  // keys, values
        u32 valid[WARPS][STAGES];                // a bit for each key of a chunk
        float acc[WARPS][8][PITCH];
        float max[WARPS][8], sum[WARPS][8];
        u32 is_last;
    };

    const AttentionDecodeArgs& a;
    Shared& shared;
    u32 warp, lane, group, items_per_kv_head, items;
    u32 q[NT][D / 16][2];
    float acc[NT][D / 16][4];
    float max[NT][2], sum[NT][2];

    BCG_DEVICE Decode(const AttentionDecodeArgs& args, Shared& memory) : a(args), shared(memory) {
        warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        group = a.q_heads / a.kv.kv_heads;
        items_per_kv_head = (group + HEADS - 1) / HEADS;
        items = a.kv.kv_heads * items_per_kv_head;
    }

    BCG_DEVICE u32 first_head(const Walk& w) const {
        return w.item / items_per_kv_head * group + w.item % items_per_kv_head * HEADS;
    }
    BCG_DEVICE u32 num_heads(const Walk& w) const {
        u32 rest = group - w.item % items_per_kv_head * HEADS;
        return rest < HEADS ? rest : HEADS;
    }

    BCG_DEVICE bool ends_item(const Walk& w) const { return (w.tile + 1) * (i32)TILE >= w.len; }

    BCG_DEVICE void advance(Walk& w) const {
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

    // The page and the offset in it of the key that this lane (and lane + 16) looks up; -1 where there is none.
    BCG_DEVICE void look_up(const Walk& w, i32& page, u32& offset) const {
        page = -1, offset = 0;
        if (w.tiles == 0) return;
        u32 key = (u32)w.tile * TILE + warp * CHUNK + lane % CHUNK, index = key / a.kv.page_size;
        offset = key - index * a.kv.page_size;
        if (key < (u32)w.len && index < a.kv.max_pages) page = a.kv.page_table[(i64)w.sequence * a.kv.max_pages + index];
    }

    // Starts the copy of the keys and values of this warp's chunk.
    BCG_DEVICE void load(const Walk& w, u32 stage, i32 page, u32 offset) {
        bool is_key = page >= 0 && page < a.kv.num_pages;
        u32 valid = __ballot_sync(FULL_WARP, is_key) & 0xffff;
        if (lane == 0) shared.valid[warp][stage] = valid;
        if (valid) {
            u32 kv_head = (u32)w.item / items_per_kv_head;
            i64 element = page * a.kv.page_stride + (i64)(offset * a.kv.kv_heads + kv_head) * D;
            i64 place = is_key ? element * (i64)sizeof(T) : 0;
            constexpr u32 PER_ROW = ROW_BYTES / 16, ROWS = 32 / PER_ROW;
            u32 column = lane % PER_ROW;
            u32 keys = shared_address(shared.ring[warp][stage][0]), values = shared_address(shared.ring[warp][stage][1]);
#pragma unroll
            for (u32 i = 0; i < CHUNK / ROWS; i++) {
                u32 row = i * ROWS + lane / PER_ROW;
                i64 from = __shfl_sync(FULL_WARP, place, row) + column * 16;
                u32 to = row * ROW_BYTES + (column ^ row % 8) * 16;
                bool is_valid = valid >> row & 1;
                copy_async_16(keys + to, (const u8*)a.kv.k + from, is_valid);
                copy_async_16(values + to, (const u8*)a.kv.v + from, is_valid);
            }
        }
        copy_async_commit();
    }

    BCG_DEVICE void load_queries(const Walk& w) {
        u32 heads = num_heads(w);
        const T* row = (const T*)a.q + w.sequence * a.q_stride + (i64)first_head(w) * D;
#pragma unroll
        for (u32 n = 0; n < NT; n++) {
            u32 head = n * 8 + lane / 4;
            const T* of_head = row + head * D + lane % 4 * 2;
#pragma unroll
            for (u32 i = 0; i < D / 8; i++) {
                q[n][i / 2][i % 2] = head < heads ? pair(of_head[i * 8], of_head[i * 8 + 1]) : 0;
            }
        }
    }

    BCG_DEVICE void clear() {
#pragma unroll
        for (u32 n = 0; n < NT; n++) {
#pragma unroll
            for (u32 i = 0; i < D / 16; i++)
                for (u32 j = 0; j < 4; j++) acc[n][i][j] = 0.0f;
            max[n][0] = max[n][1] = minus_infinity();
            sum[n][0] = sum[n][1] = 0.0f;
        }
    }

    // Attends to the chunk of 16 keys in a stage.
    BCG_DEVICE void attend(u32 stage, float scale) {
        u32 valid = shared.valid[warp][stage];
        if (valid == 0) return;
        u32 keys = shared_address(shared.ring[warp][stage][0]), values = shared_address(shared.ring[warp][stage][1]);
        float s[NT][4] = {};
#pragma unroll
        for (u32 i = 0; i < D / 16; i++) {
            u32 k[4], row = lane % 16, column = 2 * i + lane / 16;
            load_matrices(k, keys + row * ROW_BYTES + (column ^ row % 8) * 16);
#pragma unroll
            for (u32 n = 0; n < NT; n++) mma<T>(s[n], k, q[n][i]);
        }
        u32 p[NT][2], rest[NT][2];  // weights in T, and what that rounding leaves
        bool low = valid >> lane / 4 & 1, high = valid >> (lane / 4 + 8) & 1;
#pragma unroll
        for (u32 n = 0; n < NT; n++) {
            float kept[2];
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                s[n][j] = low ? s[n][j] * scale : minus_infinity();
                s[n][j + 2] = high ? s[n][j + 2] * scale : minus_infinity();
                float m = fmaxf(s[n][j], s[n][j + 2]);
                for (u32 offset = 4; offset < 32; offset *= 2) m = fmaxf(m, __shfl_xor_sync(FULL_WARP, m, offset));
                m = fmaxf(m, max[n][j]);
                kept[j] = exp2_fast(max[n][j] - m);
                max[n][j] = m;
                s[n][j] = exp2_fast(s[n][j] - m);
                s[n][j + 2] = exp2_fast(s[n][j + 2] - m);
                sum[n][j] = sum[n][j] * kept[j] + s[n][j] + s[n][j + 2];
            }
            if (__any_sync(FULL_WARP, kept[0] != 1.0f || kept[1] != 1.0f)) {
#pragma unroll
                for (u32 i = 0; i < D / 16; i++)
                    for (u32 j = 0; j < 4; j++) acc[n][i][j] *= kept[j % 2];
            }
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                T x = from_f32<T>(s[n][2 * j]), y = from_f32<T>(s[n][2 * j + 1]);
                p[n][j] = transpose_matrix(pair(x, y));
                T x_rest = from_f32<T>(s[n][2 * j] - to_f32(x)), y_rest = from_f32<T>(s[n][2 * j + 1] - to_f32(y));
                rest[n][j] = transpose_matrix(pair(x_rest, y_rest));
            }
        }
#pragma unroll
        for (u32 i = 0; i < D / 16; i++) {
            u32 v[4], row = lane % 8 + lane / 16 * 8, column = 2 * i + lane / 8 % 2;
            load_matrices_transposed(v, values + row * ROW_BYTES + (column ^ row % 8) * 16);
#pragma unroll
            for (u32 n = 0; n < NT; n++) {
                mma<T>(acc[n][i], v, p[n]);
                mma<T>(acc[n][i], v, rest[n]);
            }
        }
    }

    BCG_DEVICE void store(const Walk& w, u32 head, u32 d, float4 v, float sum) const {
        float inverse = sum != 0.0f ? 1.0f / sum : 0.0f;
        T* out = (T*)a.out + ((i64)w.sequence * a.q_heads + first_head(w) + head) * D + d;
        uint2 words = {pair(from_f32<T>(v.x * inverse), from_f32<T>(v.y * inverse)),
                       pair(from_f32<T>(v.z * inverse), from_f32<T>(v.w * inverse))};
        *(uint2*)out = words;
    }

    BCG_DEVICE u32 stride() const { return group < HEADS ? group : HEADS; }
    BCG_DEVICE float* piece(u32 slot, u32 head) const { return a.partials + ((i64)slot * stride() + head) * D; }
    BCG_DEVICE float2* piece_sum(u32 slot, u32 head) const {
        return (float2*)(a.partials + (i64)2 * gridDim.x * stride() * D) + slot * stride() + head;
    }

    BCG_DEVICE static void add(float4& to, float to_scale, float4 v, float scale) {
        to.x = to.x * to_scale + v.x * scale;
        to.y = to.y * to_scale + v.y * scale;
        to.z = to.z * to_scale + v.z * scale;
        to.w = to.w * to_scale + v.w * scale;
    }

    // Adds up the warps' parts; writes the output, or a piece.
    BCG_DEVICE void finish(const Walk& w, bool is_whole, u32 slot) {
        u32 heads = num_heads(w);
#pragma unroll
        for (u32 n = 0; n < NT; n++) {
            __syncthreads();  // the round before may still be read
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                u32 head = lane % 4 * 2 + j;
                for (u32 offset = 4; offset < 32; offset *= 2) sum[n][j] += __shfl_xor_sync(FULL_WARP, sum[n][j], offset);
                if (n * 8 + head >= heads) continue;
                if (lane < 4) shared.max[warp][head] = max[n][j], shared.sum[warp][head] = sum[n][j];
#pragma unroll
                for (u32 i = 0; i < D / 16; i++) {
                    shared.acc[warp][head][i * 16 + lane / 4] = acc[n][i][j];
                    shared.acc[warp][head][i * 16 + lane / 4 + 8] = acc[n][i][j + 2];
                }
            }
            __syncthreads();
            u32 rest = heads > n * 8 ? heads - n * 8 : 0, here = rest < 8 ? rest : 8;
            for (u32 e = threadIdx.x; e < here * (D / 4); e += THREADS) {
                u32 head = e / (D / 4), d = e % (D / 4) * 4;
                float m = minus_infinity(), total = 0.0f;
                for (u32 i = 0; i < WARPS; i++) m = fmaxf(m, shared.max[i][head]);
                float4 v = {};
                for (u32 i = 0; i < WARPS; i++) {
                    float part = shared.sum[i][head], weight = part == 0.0f ? 0.0f : exp2_fast(shared.max[i][head] - m);
                    total += part * weight;
                    add(v, 1.0f, *(const float4*)&shared.acc[i][head][d], weight);
                }
                if (is_whole) {
                    store(w, n * 8 + head, d, v, total);
                } else {
                    *(float4*)(piece(slot, n * 8 + head) + d) = v;
                    if (d == 0) *piece_sum(slot, n * 8 + head) = {m, total};
                }
            }
        }
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
            shared.is_last = before == last - first;
        }
        __syncthreads();
        return shared.is_last;
    }

    // Adds up the pieces of an item; writes the output.
    BCG_DEVICE void merge(const Walk& w, u32 first, u32 last) const {
        for (u32 e = threadIdx.x; e < num_heads(w) * (D / 4); e += THREADS) {
            u32 head = e / (D / 4), d = e % (D / 4) * 4;
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
            store(w, head, d, v, total);
        }
    }

    BCG_DEVICE void zero_rows() const {
        u32 words = a.q_heads * D * sizeof(T) / sizeof(uint4);
        for (u32 b = blockIdx.x; b < a.sequences; b += gridDim.x) {
            if (a.kv_lens[b] > 0) continue;
            uint4* row = (uint4*)a.out + (i64)b * words;
            for (u32 i = threadIdx.x; i < words; i += THREADS) row[i] = uint4{};
        }
    }

    BCG_DEVICE void run() {
        BlockPlan plan = a.plan[blockIdx.x];
        Walk ahead = {plan.sequence, plan.item, plan.tile, plan.tiles, plan.len};
        Walk w = ahead;
        i32 page;
        u32 offset;
        look_up(ahead, page, offset);
#pragma unroll
        for (u32 stage = 0; stage < STAGES - 1; stage++) {
            load(ahead, stage, page, offset);
            if (ahead.tiles) advance(ahead);
            look_up(ahead, page, offset);
        }
        zero_rows();
        float scale = a.scale * 1.4426950408889634f;
        u32 stage = 0, into = STAGES - 1, first = plan.first;
        while (w.tiles > 0) {
            load_queries(w);
            clear();
            bool begins = w.tile == 0, ends;
            while (true) {
                copy_async_wait<STAGES - 2>();
                __syncwarp();
                load(ahead, into, page, offset);
                if (ahead.tiles) advance(ahead);
                look_up(ahead, page, offset);
                attend(stage, scale);
                stage = stage + 1 == STAGES ? 0 : stage + 1;
                into = into + 1 == STAGES ? 0 : into + 1;
                ends = ends_item(w);
                if (ends || w.tiles == 1) break;
                advance(w);
            }
            if (begins) first = blockIdx.x;
            finish(w, begins && ends, 2 * blockIdx.x + begins);
            u32 last = ends ? blockIdx.x : (u32)plan.last;
            if (first < last && arrives_last(first, last)) merge(w, first, last);
            advance(w);
        }
    }
};

template <typename T, u32 D, u32 NT> BCG_DEVICE void attention_decode(const AttentionDecodeArgs& a) {
    extern __shared__ uint4 memory[];
    wait_for_inputs();
    release_dependents();
    Decode<T, D, NT>(a, *(typename Decode<T, D, NT>::Shared*)memory).run();
}

#define ENTRY(name, T, D, NT)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_decode_##name(AttentionDecodeArgs a) { \
        attention_decode<T, D, NT>(a);                                                                    \
    }
ENTRY(bf16_d64_h8, bf16, 64, 1)
ENTRY(bf16_d64_h16, bf16, 64, 2)
ENTRY(bf16_d128_h8, bf16, 128, 1)
ENTRY(bf16_d128_h16, bf16, 128, 2)
ENTRY(f16_d64_h8, f16, 64, 1)
ENTRY(f16_d64_h16, f16, 64, 2)
ENTRY(f16_d128_h8, f16, 128, 1)
ENTRY(f16_d128_h16, f16, 128, 2)
