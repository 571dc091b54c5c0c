// Latent attention of one query per sequence, on a persistent grid.
//
// An item is up to ITEM_HEADS query heads. Its keys come half a tile at a time through a ring in shared memory: a latent is
// read once for all heads of an item, and serves as key and as value.
// Keys are the rows of the matrix instructions and query heads the columns. S^T = K Q^T: a warp takes 16 of the 32 keys
// of a stage and 8 of the 16 heads. O^T = V^T P^T: a warp takes a quarter of the latents' columns and all keys and heads,
// with the weights that the four warps leave in shared memory.
// Host reference: host.rs; shapes, geometry and plan: mod.rs.
#include "args.cuh"
#include "persistent_decode.cuh"

constexpr u32 WARPS = TILED_WARPS, THREADS = 32 * WARPS, TILE = TILE_KEYS, STAGES = RING_STAGES, BATCH = 4;
constexpr u32 ROWS_PER_WARP = STAGE_KEYS / WARPS;
static_assert(TILE == 2 * STAGE_KEYS, "a stage is half a tile");

// Where a 16-byte chunk of a row of CHUNKS chunks lies, so that eight rows of one chunk lie in different banks.
template <u32 CHUNKS> BCG_DEVICE u32 chunk_at(u32 row, u32 chunk) {
    static_assert(CHUNKS == 4 || CHUNKS % 8 == 0, "");
    return (row * CHUNKS + (CHUNKS == 4 ? chunk ^ row / 2 % 4 : chunk ^ row % 8)) * 16;
}

template <u32 L, u32 R>
struct Decode : PersistentDecode<Decode<L, R>, MlaDecodeArgs, bf16, L, WARPS, TILE, 2, STAGES, BATCH> {
    using Base = PersistentDecode<Decode<L, R>, MlaDecodeArgs, bf16, L, WARPS, TILE, 2, STAGES, BATCH>;
    using Base::a, Base::warp, Base::lane, Base::items;

    static constexpr u32 L_CHUNKS = L / 8, R_CHUNKS = R / 8, STEPS = (L + R) / 16;
    static constexpr u32 COLUMNS = L / WARPS;  // of a warp's outputs

    struct Shared {
        u8 latents[STAGES][STAGE_KEYS * L * 2];
        u8 rope_keys[STAGES][STAGE_KEYS * R * 2];
        u32 valid[STAGES][WARPS];          // a bit for each of the keys that a warp copied
        u32 weights[2][2][2][2][32];       // rounded, what rounding leaves; 16 keys; 8 heads; 8 keys; lane
        float max[2][ITEM_HEADS];          // of 16 keys
        u32 is_last;
    };

    Shared& shared;
    u32 q[STEPS][2];             // 8 heads of the warp's S^T
    float acc[COLUMNS / 16][2][4];  // 16 columns, 8 heads
    float max[2][2];             // of heads 8 n + lane % 4 * 2 + j
    float sum[2];                // this thread's part, of heads of the warp's S^T

    BCG_DEVICE Decode(const MlaDecodeArgs& args, Shared& memory) : Base(args, memory.is_last), shared(memory) {
        items = (a.heads + ITEM_HEADS - 1) / ITEM_HEADS;
    }

    BCG_DEVICE u32 key_half() const { return warp / 2; }
    BCG_DEVICE u32 head_half() const { return warp % 2; }
    BCG_DEVICE u32 row_words() const { return a.heads * L_CHUNKS; }
    BCG_DEVICE u32 first_head(const Walk& w) const { return w.item * ITEM_HEADS; }
    BCG_DEVICE u32 num_heads(const Walk& w) const { return min(a.heads - first_head(w), ITEM_HEADS); }

    // The page and the offset in it of the key that this lane (and lane + 8, …) looks up; -1 where there is none.
    BCG_DEVICE void look_up(const Walk& w, i32& page, u32& offset) const {
        page = -1, offset = 0;
        if (w.tiles == 0) return;
        u32 row = warp * ROWS_PER_WARP + lane % ROWS_PER_WARP;
        this->find(w, (u32)w.tile * TILE + w.part * STAGE_KEYS + row, page, offset);
    }

    template <u32 CHUNKS> BCG_DEVICE void copy(u8* stage, const void* pages, i64 place, u32 valid) const {
        u32 to = shared_address(stage);
#pragma unroll
        for (u32 i = 0; i < ROWS_PER_WARP * CHUNKS / 32; i++) {
            u32 index = i * 32 + lane, row = index / CHUNKS, chunk = index % CHUNKS;
            i64 from = __shfl_sync(FULL_WARP, place, row);
            u32 at = chunk_at<CHUNKS>(warp * ROWS_PER_WARP + row, chunk);
            copy_async_16(to + at, (const bf16*)pages + from + chunk * 8, valid >> row & 1);
        }
    }

    // Starts the copy of this warp's keys of a stage; zeros where there is no key.
    BCG_DEVICE void load(const Walk& w, u32 stage, i32 page, u32 offset) {
        if (w.tiles) {
            bool is_key = page >= 0 && page < a.kv.num_pages;
            u32 valid = __ballot_sync(FULL_WARP, is_key) & ((1u << ROWS_PER_WARP) - 1);
            if (lane == 0) shared.valid[stage][warp] = valid;
            i64 latent = is_key ? page * a.kv.latent_page_stride + (i64)offset * L : 0;
            i64 rope_key = is_key ? page * a.kv.rope_page_stride + (i64)offset * R : 0;
            copy<L_CHUNKS>(shared.latents[stage], a.kv.latents, latent, valid);
            copy<R_CHUNKS>(shared.rope_keys[stage], a.kv.rope_keys, rope_key, valid);
        }
        copy_async_commit();
    }

    BCG_DEVICE void load_queries(const Walk& w) {
        u32 head = head_half() * 8 + lane / 4;
        bool is_head = head < num_heads(w);
        i64 row = (i64)w.sequence * a.heads + first_head(w) + (is_head ? head : 0);
        const u32* latent = (const u32*)((const bf16*)a.q_latent + row * L) + lane % 4;
        const u32* rope = (const u32*)((const bf16*)a.q_pe + row * R) + lane % 4;
#pragma unroll
        for (u32 i = 0; i < 2 * STEPS; i++) {
            u32 words = i * 8 < L ? latent[i * 4] : rope[i * 4 - L / 2];
            q[i / 2][i % 2] = is_head ? words : 0;
        }
    }

    BCG_DEVICE void clear() {
#pragma unroll
        for (u32 i = 0; i < COLUMNS / 16; i++)
            for (u32 n = 0; n < 2; n++)
                for (u32 j = 0; j < 4; j++) acc[i][n][j] = 0.0f;
        max[0][0] = max[0][1] = max[1][0] = max[1][1] = minus_infinity();
        sum[0] = sum[1] = 0.0f;
    }

    // Scores of the warp's 16 keys and 8 heads, times log2(e); minus infinity for keys that are not there.
    BCG_DEVICE void score(float (&s)[4], u32 stage, float scale) {
        u32 latents = shared_address(shared.latents[stage]), rope_keys = shared_address(shared.rope_keys[stage]);
        u32 row = key_half() * 16 + lane % 16;
        float odd[4] = {};  // two chains of instructions are quicker than one
#pragma unroll
        for (u32 i = 0; i < STEPS; i++) {
            u32 k[4], chunk = 2 * i + lane / 16;
            if (i * 16 < L) load_matrices(k, latents + chunk_at<L_CHUNKS>(row, chunk));
            else load_matrices(k, rope_keys + chunk_at<R_CHUNKS>(row, chunk - L_CHUNKS));
            mma<bf16>(i % 2 ? odd : s, k, q[i]);
        }
        u32 valid = shared.valid[stage][key_half() * 2] | shared.valid[stage][key_half() * 2 + 1] << ROWS_PER_WARP;
        bool low = valid >> lane / 4 & 1, high = valid >> (lane / 4 + 8) & 1;
#pragma unroll
        for (u32 j = 0; j < 4; j++) s[j] = (j < 2 ? low : high) ? (s[j] + odd[j]) * scale : minus_infinity();
    }

    // Turns scores into weights for all warps; `kept` is by how much the stage scales what was there.
    BCG_DEVICE void weigh(float (&s)[4], float (&kept)[2][2]) {
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
            float m = fmaxf(s[j], s[j + 2]);
            for (u32 offset = 4; offset < 32; offset *= 2) m = fmaxf(m, __shfl_xor_sync(FULL_WARP, m, offset));
            if (lane < 4) shared.max[key_half()][head_half() * 8 + lane * 2 + j] = m;
        }
        __syncthreads();
        float shift[2][2];
#pragma unroll
        for (u32 n = 0; n < 2; n++)
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                u32 head = n * 8 + lane % 4 * 2 + j;
                float m = fmaxf(max[n][j], fmaxf(shared.max[0][head], shared.max[1][head]));
                shift[n][j] = m == minus_infinity() ? 0.0f : m;  // no key yet
                kept[n][j] = exp2_fast(max[n][j] - shift[n][j]);
                max[n][j] = m;
            }
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
            float relative = head_half() ? shift[1][j] : shift[0][j];
            s[j] = exp2_fast(s[j] - relative);
            s[j + 2] = exp2_fast(s[j + 2] - relative);
            sum[j] = sum[j] * (head_half() ? kept[1][j] : kept[0][j]) + s[j] + s[j + 2];
        }
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
            bf16 x = from_f32<bf16>(s[2 * j]), y = from_f32<bf16>(s[2 * j + 1]);
            bf16 x_rest = from_f32<bf16>(s[2 * j] - to_f32(x)), y_rest = from_f32<bf16>(s[2 * j + 1] - to_f32(y));
            shared.weights[0][key_half()][head_half()][j][lane] = transpose_matrix(pair(x, y));
            shared.weights[1][key_half()][head_half()][j][lane] = transpose_matrix(pair(x_rest, y_rest));
        }
        __syncthreads();
    }

    // Adds the weighted latents of a stage to the warp's columns.
    BCG_DEVICE void mix(u32 stage, const float (&kept)[2][2]) {
        u32 latents = shared_address(shared.latents[stage]);
        if (__any_sync(FULL_WARP, kept[0][0] != 1.0f || kept[0][1] != 1.0f || kept[1][0] != 1.0f || kept[1][1] != 1.0f)) {
#pragma unroll
            for (u32 i = 0; i < COLUMNS / 16; i++)
                for (u32 n = 0; n < 2; n++)
                    for (u32 j = 0; j < 4; j++) acc[i][n][j] *= kept[n][j % 2];
        }
#pragma unroll
        for (u32 k = 0; k < 2; k++) {
            u32 p[2][2][2];  // rounded, rest; heads; keys
#pragma unroll
            for (u32 e = 0; e < 8; e++) p[e / 4][e / 2 % 2][e % 2] = shared.weights[e / 4][k][e / 2 % 2][e % 2][lane];
#pragma unroll
            for (u32 i = 0; i < COLUMNS / 16; i++) {
                u32 v[4], row = k * 16 + lane % 8 + lane / 16 * 8, chunk = warp * (COLUMNS / 8) + 2 * i + lane / 8 % 2;
                load_matrices_transposed(v, latents + chunk_at<L_CHUNKS>(row, chunk));
#pragma unroll
                for (u32 n = 0; n < 2; n++) {
                    mma<bf16>(acc[i][n], v, p[0][n]);
                    mma<bf16>(acc[i][n], v, p[1][n]);
                }
            }
        }
    }

    BCG_DEVICE void attend(u32 stage, float scale) {
        float s[4] = {}, kept[2][2];
        score(s, stage, scale);
        weigh(s, kept);
        mix(stage, kept);
    }

    BCG_DEVICE void await_stage() const { __syncthreads(); }  // and the stage that is copied into next was read

    BCG_DEVICE u32 stride() const { return ITEM_HEADS; }
    BCG_DEVICE bf16* output(const Walk& w, u32 head) const {
        return (bf16*)a.out + ((i64)w.sequence * a.heads + first_head(w) + head) * L;
    }

    // Adds up the sums of the two warps of each head; writes the output, or a piece.
    BCG_DEVICE void finish(const Walk& w, bool is_whole, u32 slot) {
        u32 heads = num_heads(w);
        float total[2][2];
        __syncthreads();  // the largest scores were read; sums take their place
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
            float part = sum[j];
            for (u32 offset = 4; offset < 32; offset *= 2) part += __shfl_xor_sync(FULL_WARP, part, offset);
            if (lane < 4) shared.max[key_half()][head_half() * 8 + lane * 2 + j] = part;
        }
        __syncthreads();
#pragma unroll
        for (u32 n = 0; n < 2; n++)
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                u32 head = n * 8 + lane % 4 * 2 + j;
                total[n][j] = shared.max[0][head] + shared.max[1][head];
                if (head >= heads) continue;
                float inverse = total[n][j] != 0.0f ? 1.0f / total[n][j] : 0.0f;
                u32 column = warp * COLUMNS + lane / 4;
#pragma unroll
                for (u32 i = 0; i < COLUMNS / 16; i++)
#pragma unroll
                    for (u32 r = 0; r < 2; r++) {
                        float v = acc[i][n][j + 2 * r];
                        u32 l = column + i * 16 + 8 * r;
                        if (is_whole) output(w, head)[l] = from_f32<bf16>(v * inverse);
                        else this->piece(slot, head)[l] = v;
                    }
                if (!is_whole && warp == 0 && lane < 4) *this->piece_sum(slot, head) = {max[n][j], total[n][j]};
            }
    }
};

template <u32 L, u32 R> BCG_DEVICE void mla_decode(const MlaDecodeArgs& a) {
    extern __shared__ uint4 memory[];
    wait_for_inputs();
    release_dependents();
    Decode<L, R>(a, *(typename Decode<L, R>::Shared*)memory).run();
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) mla_decode_l512_r64(MlaDecodeArgs a) { mla_decode<512, 64>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) mla_decode_l64_r32(MlaDecodeArgs a) { mla_decode<64, 32>(a); }
