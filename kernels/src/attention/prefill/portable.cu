// Attention of new tokens on any GPU: bf16 and f16 of head dim 64 and 128 on the tensor cores (mma.sync), one block for 128
// query rows of a head and 64 keys at a time; everything else with a warp per query row.
// Host reference: host.rs; shapes and geometry: mod.rs.
#include "paged_attention.cuh"
#include "work.cuh"

// A warp has 16 query rows, and copies 8 keys of a tile.
static_assert(PLAN_ROWS == 16 * WARPS && TILE_KEYS == 8 * WARPS, "the warps share the rows of a tile evenly");

template <u32 D> struct Tiles {
    static constexpr u32 KV_BYTES = TILE_KEYS * D * 2;
    static constexpr u32 Q = 0, KV = PLAN_ROWS * D * 2;  // then keys and values of one tile, keys and values of the next
    static constexpr u32 IN_CACHE = KV + 4 * KV_BYTES;  // 64 bits for each of the two tiles
};

// c += a · b: 16 rows of a, 8 columns of b.
template <typename T> BCG_DEVICE void multiply(float* c, const u32 (&a)[4], u32 b0, u32 b1) {
    u32 b[2] = {b0, b1};
    mma<T>(*(float (*)[4])c, a, b);
}

// Starts the copies of a tile of keys and values; `in_cache` gets a bit for each key.
template <u32 D>
BCG_DEVICE void copy_tile(const PagedKvArgs& kv, const i32* pages, u32 kv_head, u32 n, i32 keys, u32 tile, u32 in_cache) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    bool skipped = false;
    u32 place = lane < 8 ? find_key(kv, pages, kv_head, (i32)(n * TILE_KEYS + warp * 8 + lane), keys, skipped) : NOWHERE;
    copy_rows<D, 8>(tile + warp * GROUP_BYTES<D>, kv.k, place);
    copy_rows<D, 8>(tile + Tiles<D>::KV_BYTES + warp * GROUP_BYTES<D>, kv.v, place);
    u32 bits = __ballot_sync(FULL_WARP, !skipped);
    if (lane == 0) asm volatile("st.shared.u8 [%0], %1;" ::"r"(in_cache + warp), "r"(bits) : "memory");
    copy_async_commit();
}

// s = q · kᵀ for the warp's 16 rows.
template <typename T, u32 D> BCG_DEVICE void score(float (&s)[TILE_KEYS / 2], u32 q, u32 k) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (u32 i = 0; i < TILE_KEYS / 2; i++) s[i] = 0.0f;
#pragma unroll
    for (u32 c = 0; c < D / 8; c += 2) {
        u32 a[4];
        load_matrices(a, chunk_at<D>(q, warp * 16 + lane % 16, c + lane / 16));
#pragma unroll
        for (u32 n = 0; n < TILE_KEYS; n += 16) {
            u32 b[4];
            load_matrices(b, chunk_at<D>(k, n + lane % 8 + lane / 16 * 8, c + lane / 8 % 2));
            multiply<T>(s + n / 2, a, b[0], b[1]);
            multiply<T>(s + n / 2 + 4, a, b[2], b[3]);
        }
    }
}

// o += p · v, with the weights rounded to T.
template <typename T, u32 D> BCG_DEVICE void mix(float (&o)[D / 2], const float (&p)[TILE_KEYS / 2], u32 v) {
    u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 n = 0; n < TILE_KEYS; n += 16) {
        u32 a[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) a[i] = round_pair<T>(p[n / 2 + 2 * i], p[n / 2 + 2 * i + 1]);
#pragma unroll
        for (u32 c = 0; c < D / 8; c += 2) {
            u32 b[4];
            load_matrices_transposed(b, chunk_at<D>(v, n + lane % 16, c + lane / 16));
            multiply<T>(o + c * 4, a, b[0], b[1]);
            multiply<T>(o + c * 4 + 4, a, b[2], b[3]);
        }
    }
}

template <typename T, u32 D>
BCG_DEVICE void attend_tiles(const AttentionPrefillArgs& a, const Work& w, const i32* pages, u32 base) {
    using S = Tiles<D>;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, kv_head = w.head / (a.q_heads / a.kv.kv_heads);
    i32 row = w.row + (i32)(warp * 16 + lane / 4);
    u32 num_tiles = ((u32)w.keys + TILE_KEYS - 1) / TILE_KEYS;
    copy_rows<D, 16>(base + S::Q + warp * 2 * GROUP_BYTES<D>, a.q, find_query(a, w, w.row + (i32)(warp * 16 + lane % 16)));
    copy_tile<D>(a.kv, pages, kv_head, 0, w.keys, base + S::KV, base + S::IN_CACHE);
    TwoRows rows;
    rows.clear();
    float o[D / 2] = {};
    for (u32 n = 0; n < num_tiles; n++) {
        u32 k = base + S::KV + n % 2 * 2 * S::KV_BYTES, v = k + S::KV_BYTES;
        if (n + 1 < num_tiles) {
            u32 other = (n + 1) % 2;
            u32 tile = base + S::KV + other * 2 * S::KV_BYTES;
            copy_tile<D>(a.kv, pages, kv_head, n + 1, w.keys, tile, base + S::IN_CACHE + other * 8);
            copy_async_wait<1>();
        } else {
            copy_async_wait<0>();
        }
        __syncthreads();
        float s[TILE_KEYS / 2];
        score<T, D>(s, base + S::Q, k);
        i32 first_key = (i32)(n * TILE_KEYS), last_key = first_key + (i32)TILE_KEYS - 1;
        u32 bits[2];
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                     : "=r"(bits[0]), "=r"(bits[1])
                     : "r"(base + S::IN_CACHE + n % 2 * 8)
                     : "memory");
        if (w.row + (i32)(warp * 16) + w.shift < last_key || w.keys <= last_key || (bits[0] & bits[1]) != FULL_WARP)
            hide(s, bits, first_key, row + w.shift, w.keys);
        rows.weigh(s, a.scale * LOG2_E);
        rows.rescale(o);
        mix<T, D>(o, s, v);
        __syncthreads();  // before the copies of the tile after the next one
    }
    copy_async_wait<0>();
    store_rows<T>(rows, a, w, row, o);
}

template <typename T, u32 D> BCG_DEVICE void attention_prefill_tiles(const AttentionPrefillArgs& a) {
    extern __shared__ __align__(128) u8 shared[];
    u32 base = shared_address(shared);
    wait_for_inputs();
    release_dependents();
    u64 total = total_work(a), index;
    for (u32 turn = 0; next_work(turn, total, index); turn++) {
        u32 sequence;
        Work w = load_work(a, index, sequence);
        attend_tiles<T, D>(a, w, a.kv.page_table + (i64)sequence * a.kv.max_pages, base);
        __syncthreads();  // before the next item's copies
    }
}

template <typename T> BCG_DEVICE void attention_prefill_rows(const AttentionPrefillArgs& a) {
    wait_for_inputs();
    release_dependents();
    u64 total = total_work(a), index;
    for (u32 turn = 0; next_work(turn, total, index); turn++) {
        u32 sequence;
        Work w = load_work(a, index, sequence);
        for (i64 row = w.row + (i32)(threadIdx.x / 32); row < w.row_end; row += blockDim.x / 32) {
            Softmax s;
            softmax_init(s);
            const T* q = (const T*)a.q + row * a.q_stride + (i64)w.head * a.kv.head_dim;
            i64 end = min(row + w.shift + 1, (i64)w.keys);
            attend(s, a.kv, q, a.scale, sequence, w.head / (a.q_heads / a.kv.kv_heads), 0, end, 1);
            softmax_store(s, a.kv.head_dim, (T*)a.out + (row * a.q_heads + w.head) * a.kv.head_dim);
        }
    }
}

#define BCG_TILES(name, T, D) \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) name(AttentionPrefillArgs a) { attention_prefill_tiles<T, D>(a); }
#define BCG_ROWS(name, T) \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) name(AttentionPrefillArgs a) { attention_prefill_rows<T>(a); }

BCG_TILES(attention_prefill_bf16_d64, bf16, 64)
BCG_TILES(attention_prefill_bf16_d128, bf16, 128)
BCG_TILES(attention_prefill_f16_d64, f16, 64)
BCG_TILES(attention_prefill_f16_d128, f16, 128)
BCG_ROWS(attention_prefill_bf16, bf16)
BCG_ROWS(attention_prefill_f16, f16)
BCG_ROWS(attention_prefill_f32, float)
