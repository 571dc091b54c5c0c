// Attention of one query per sequence, on a persistent grid.
//
// An item is up to 8 * NT query heads that share a key-value head. Each warp takes 16 keys of each tile through its own
// ring in shared memory, so warps meet at the end of an item only. Keys are the rows of the matrix instructions and query
// heads the columns: S^T = K Q^T, O^T = V^T P^T.
// Host reference: host.rs; shapes, geometry and plan: mod.rs.
#include "args.cuh"
#include "persistent_decode.cuh"

constexpr u32 WARPS = TILED_WARPS, CHUNK = 16, TILE = TILE_KEYS, STAGES = RING_STAGES, BATCH = 8, THREADS = 32 * WARPS;
static_assert(TILE == WARPS * CHUNK, "each warp takes a chunk of each tile");

template <typename T, u32 D, u32 NT>
struct Decode
    : PersistentDecode<Decode<T, D, NT>, AttentionDecodeArgs, T, D, WARPS, TILE, 1, STAGES, BATCH> {
    using Base = PersistentDecode<Decode<T, D, NT>, AttentionDecodeArgs, T, D, WARPS, TILE, 1, STAGES, BATCH>;
    using Base::a, Base::warp, Base::lane, Base::items;

    static constexpr u32 HEADS = 8 * NT, ROW_BYTES = D * sizeof(T), CHUNK_BYTES = CHUNK * ROW_BYTES, PITCH = D + 4;

    struct Shared {
        u8 ring[WARPS][STAGES][2][CHUNK_BYTES];  // keys, values
        u32 valid[WARPS][STAGES];                // a bit for each key of a chunk
        float acc[WARPS][8][PITCH];
        float max[WARPS][8], sum[WARPS][8];
        u32 is_last;
    };

    Shared& shared;
    u32 group, items_per_kv_head;
    u32 q[NT][D / 16][2];
    float acc[NT][D / 16][4];
    float max[NT][2], sum[NT][2];

    BCG_DEVICE Decode(const AttentionDecodeArgs& args, Shared& memory) : Base(args, memory.is_last), shared(memory) {
        group = a.q_heads / a.kv.kv_heads;
        items_per_kv_head = (group + HEADS - 1) / HEADS;
        items = a.kv.kv_heads * items_per_kv_head;
    }

    BCG_DEVICE u32 row_words() const { return a.q_heads * D * sizeof(T) / sizeof(uint4); }
    BCG_DEVICE u32 first_head(const Walk& w) const {
        return w.item / items_per_kv_head * group + w.item % items_per_kv_head * HEADS;
    }
    BCG_DEVICE u32 num_heads(const Walk& w) const {
        u32 rest = group - w.item % items_per_kv_head * HEADS;
        return rest < HEADS ? rest : HEADS;
    }

    // The page and the offset in it of the key that this lane (and lane + 16) looks up; -1 where there is none.
    BCG_DEVICE void look_up(const Walk& w, i32& page, u32& offset) const {
        page = -1, offset = 0;
        if (w.tiles == 0) return;
        this->find(w, (u32)w.tile * TILE + warp * CHUNK + lane % CHUNK, page, offset);
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

    BCG_DEVICE void await_stage() const { __syncwarp(); }  // a warp reads what it copied itself

    BCG_DEVICE u32 stride() const { return group < HEADS ? group : HEADS; }
    BCG_DEVICE T* output(const Walk& w, u32 head) const {
        return (T*)a.out + ((i64)w.sequence * a.q_heads + first_head(w) + head) * D;
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
                    store_mean(output(w, n * 8 + head) + d, v, total);
                } else {
                    *(float4*)(this->piece(slot, n * 8 + head) + d) = v;
                    if (d == 0) *this->piece_sum(slot, n * 8 + head) = {m, total};
                }
            }
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
