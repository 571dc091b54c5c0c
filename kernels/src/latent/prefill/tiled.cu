// Latent attention of new tokens on the tensor cores (mma.sync), over keys and values that are decompressed first.
//
// A workspace takes the keys and values of some sequences and heads: all blocks fill it, all blocks attend to it, and so
// on until every sequence and head had its round. Between the steps the blocks wait for each other, so all of them must
// be on the device at once: one for each multiprocessor. Every block finds the same rounds from the lengths.
//
// - decompress: keys and values of 128 latents and one head, as a matrix product in steps of 64 columns.
// - attend: 128 query rows of a head, 64 keys at a time; rope keys come from their pages.
// A row in shared memory is 16 bytes longer than its elements, so that eight rows lie in different banks.
// Host reference: host.rs; shapes and geometry: mod.rs.
#include "mla_prefill.cuh"
#include "prefill.cuh"

constexpr u32 THREADS = 32 * WARPS;
constexpr u32 KEYS_PER_WARP = TILE_KEYS / WARPS;
constexpr u32 STAGE_CHUNKS = STAGE_COLUMNS / 8;

// Bytes from one row to the next in shared memory.
BCG_DEVICE constexpr u32 pitch(u32 elements) { return (elements + 8) * 2; }

// The sequences and heads whose keys and values are in the workspace.
struct Round {
    u32 sequence, sequence_end, head, heads;
    u32 rows;  // of each head
};

template <u32 L, u32 DN, u32 R, u32 DV> struct Prefill {
    static constexpr u32 KEY = DN + R, WIDTH = DN + DV;
    static constexpr u32 OUTPUTS = WIDTH < 128 ? WIDTH : 128, PARTS = WIDTH / OUTPUTS;  // of a block's product
    static constexpr u32 Q_BYTES = PLAN_ROWS * pitch(KEY), K_BYTES = TILE_KEYS * pitch(KEY), V_BYTES = TILE_KEYS * pitch(DV);
    static constexpr u32 STAGE_BYTES = 2 * 128 * pitch(STAGE_COLUMNS);  // latents, then the projection's rows
    static constexpr u32 ATTENTION = Q_BYTES + 2 * (K_BYTES + V_BYTES), DECOMPRESSION = STAGES * STAGE_BYTES;
    static constexpr u32 STEP_BYTES = ATTENTION > DECOMPRESSION ? ATTENTION : DECOMPRESSION;

    const MlaPrefillArgs& a;
    u32 base, warp, lane;
    u32* starts;   // where each sequence's rows begin, as if all fitted into the workspace
    u32 in_cache;  // a bit for each key of two tiles
    u32 syncs = 0;

    BCG_DEVICE Prefill(const MlaPrefillArgs& args, u8* shared) : a(args) {
        base = shared_address(shared), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        in_cache = base + STEP_BYTES;
        starts = (u32*)(shared + STEP_BYTES + 16);
    }

    // Waits until all blocks are here; they see what each other wrote before.
    BCG_DEVICE void sync_blocks() {
        __syncthreads();
        syncs++;
        if (threadIdx.x == 0) {
            asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(a.arrivals) : "memory");
            u32 arrived;
            do {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(a.arrivals) : "memory");
            } while (arrived < syncs * gridDim.x);
        }
        __syncthreads();
    }

    // Sequences without new rows need no keys; the others begin at multiples of a tile.
    BCG_DEVICE void find_starts() {
        for (u32 b = threadIdx.x; b < a.sequences; b += THREADS) {
            u32 keys = a.cu_seqlens_q[b] < a.cu_seqlens_q[b + 1] ? (u32)num_keys(a, b) : 0;
            starts[b + 1] = (keys + WORKSPACE_TILE - 1) / WORKSPACE_TILE * WORKSPACE_TILE;
        }
        if (threadIdx.x == 0) starts[0] = 0;
        __syncthreads();
        u32 before = 0;
        for (u32 first = 0; warp == 0 && first < a.sequences; first += 32) {
            u32 b = first + lane, rows = b < a.sequences ? starts[b + 1] : 0;
            for (u32 offset = 1; offset < 32; offset *= 2) {
                u32 other = __shfl_up_sync(FULL_WARP, rows, offset);
                if (lane >= offset) rows += other;
            }
            if (b < a.sequences) starts[b + 1] = before + rows;
            before += __shfl_sync(FULL_WARP, rows, 31);
        }
        __syncthreads();
    }

    // The last of the sequences from `first` on that begins at or ahead of a row.
    BCG_DEVICE u32 find_sequence(u32 first, u32 end, u32 row) const {
        while (end - first > 1) {
            u32 middle = first + (end - first) / 2;
            if (starts[middle] <= row) first = middle;
            else end = middle;
        }
        return first;
    }

    BCG_DEVICE void run() {
        find_starts();
        for (u32 b = 0, end; b < a.sequences; b = end) {
            end = find_sequence(b, a.sequences + 1, starts[b] + a.workspace_rows);
            if (end == b) return;  // only if the workspace is too small for a sequence
            Round round = {b, end, 0, 0, starts[end] - starts[b]};
            if (round.rows == 0) continue;
            u32 most = min(a.workspace_rows / round.rows, a.heads), turns = (a.heads + most - 1) / most;
            u32 heads = (a.heads + turns - 1) / turns;
            for (; round.head < a.heads; round.head += heads) {
                round.heads = min(heads, a.heads - round.head);
                if (syncs > 0) sync_blocks();  // the round before may still be read
                decompress(round);
                sync_blocks();
                attend_items(round);
            }
        }
    }

    // The page of a key and the key's offset in it; -1 behind the last key and for a page outside the cache.
    BCG_DEVICE i64 find_page(u32 sequence, i32 key, i32 keys, u32& offset) const {
        offset = 0;
        if (key >= keys) return -1;
        u32 index = (u32)key / a.kv.page_size;
        offset = (u32)key - index * a.kv.page_size;
        i64 page = a.kv.page_table[(i64)sequence * a.kv.max_pages + index];
        return page >= 0 && page < a.kv.num_pages ? page : -1;
    }

    BCG_DEVICE void decompress(const Round& round) {
        u64 total = (u64)(round.rows / WORKSPACE_TILE) * round.heads * PARTS;
        for (u64 index = blockIdx.x; index < total; index += gridDim.x) {
            u32 part = (u32)(index % PARTS), head = (u32)(index / PARTS % round.heads);
            u32 row = (u32)(index / PARTS / round.heads) * WORKSPACE_TILE;
            decompress_tile(round, row, head, part * OUTPUTS);
        }
    }

    // Starts the copies of a step: rows of latents and of the projection, 64 columns of them.
    BCG_DEVICE void copy_step(u32 step, const i64 (&places)[4], const bf16* weight) const {
        u32 row = threadIdx.x / STAGE_CHUNKS, chunk = threadIdx.x % STAGE_CHUNKS, column = step * STAGE_COLUMNS + chunk * 8;
        u32 to = base + step % STAGES * STAGE_BYTES + row * pitch(STAGE_COLUMNS) + chunk * 16;
        constexpr u32 ROWS = THREADS / STAGE_CHUNKS;
#pragma unroll
        for (u32 j = 0; j < 128 / ROWS; j++) {
            bool is_there = places[j] >= 0;
            const bf16* from = (const bf16*)a.kv.latents + (is_there ? places[j] + column : 0);
            copy_async_16(to + j * ROWS * pitch(STAGE_COLUMNS), from, is_there);
        }
        to += 128 * pitch(STAGE_COLUMNS);
#pragma unroll
        for (u32 j = 0; j < OUTPUTS / ROWS; j++)
            copy_async_16(to + j * ROWS * pitch(STAGE_COLUMNS), weight + (i64)(row + j * ROWS) * L + column, true);
    }

    // Writes OUTPUTS columns of WORKSPACE_TILE rows of one head; zeros where there is no key.
    BCG_DEVICE void decompress_tile(const Round& round, u32 row, u32 head, u32 column) {
        constexpr u32 N = OUTPUTS / 16, STEPS = L / STAGE_COLUMNS;  // 8-column blocks of a warp
        u32 at = starts[round.sequence] + row, sequence = find_sequence(round.sequence, round.sequence_end, at);
        i32 first_key = (i32)(at - starts[sequence]), keys = num_keys(a, sequence);
        i64 places[4];
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            u32 offset;
            i64 page = find_page(sequence, first_key + (i32)(threadIdx.x / STAGE_CHUNKS + j * 32), keys, offset);
            places[j] = page < 0 ? -1 : page * a.kv.latent_page_stride + (i64)offset * L;
        }
        const bf16* weight = (const bf16*)a.weight + ((i64)(round.head + head) * WIDTH + column) * L;
#pragma unroll
        for (u32 step = 0; step < STAGES - 1; step++) {
            if (step < STEPS) copy_step(step, places, weight);
            copy_async_commit();
        }
        u32 m = warp % 4 * 32, n = warp / 4 * (OUTPUTS / 2);
        float sums[2][N][4] = {};
#pragma unroll 1
        for (u32 step = 0; step < STEPS; step++) {
            copy_async_wait<STAGES - 2>();
            __syncthreads();  // the step is there, and the one that is copied over was read
            if (step + STAGES - 1 < STEPS) copy_step(step + STAGES - 1, places, weight);
            copy_async_commit();
            u32 latents = base + step % STAGES * STAGE_BYTES, rows = latents + 128 * pitch(STAGE_COLUMNS);
#pragma unroll
            for (u32 c = 0; c < STAGE_CHUNKS; c += 2) {
                u32 x[2][4];
#pragma unroll
                for (u32 i = 0; i < 2; i++)
                    load_matrices(x[i], latents + (m + i * 16 + lane % 16) * pitch(STAGE_COLUMNS) + (c + lane / 16) * 16);
#pragma unroll
                for (u32 j = 0; j < N; j += 2) {
                    u32 b[4], of = n + j * 8 + lane % 8 + lane / 16 * 8;
                    load_matrices(b, rows + of * pitch(STAGE_COLUMNS) + (c + lane / 8 % 2) * 16);
                    u32 low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
                    for (u32 i = 0; i < 2; i++) {
                        mma<bf16>(sums[i][j], x[i], low);
                        mma<bf16>(sums[i][j + 1], x[i], high);
                    }
                }
            }
        }
        copy_async_wait<0>();
        __syncthreads();  // before the next copies
        bf16* out = (bf16*)a.workspace + ((i64)head * round.rows + row + m) * WIDTH + column + n + lane % 4 * 8;
#pragma unroll
        for (u32 i = 0; i < 2; i++)
#pragma unroll
            for (u32 r = 0; r < 2; r++)
#pragma unroll
                for (u32 j = 0; j < N; j += 4) {
                    u32 x[4];
#pragma unroll
                    for (u32 e = 0; e < 4; e++) x[e] = round_pair<bf16>(sums[i][j + e][2 * r], sums[i][j + e][2 * r + 1]);
                    transpose(x);
                    bf16* to = out + (i64)(i * 16 + r * 8 + lane / 4) * WIDTH + j * 8;
                    *(uint4*)to = make_uint4(x[0], x[1], x[2], x[3]);
                }
    }

    BCG_DEVICE void attend_items(const Round& round) {
        u64 total = (u64)num_items(a) * round.heads, index;
        for (u32 turn = 0; next_turn(turn, total, index); turn++) {
            PlanItem p = load_item(a, (u32)(index / round.heads));
            if (p.sequence < round.sequence || p.sequence >= round.sequence_end) continue;
            u32 head = (u32)(index % round.heads);
            i64 row = (i64)head * round.rows + (starts[p.sequence] - starts[round.sequence]);
            attend_tiles(p, round.head + head, (const bf16*)a.workspace + row * WIDTH);
            __syncthreads();  // before the next item's copies
        }
    }

    // Starts the copies of the warp's 16 query rows.
    BCG_DEVICE void copy_queries(const PlanItem& p, u32 head) const {
        constexpr u32 CHUNKS = KEY / 8;
#pragma unroll
        for (u32 j = 0; j < 16 * CHUNKS / 32; j++) {
            u32 index = j * 32 + lane, row = warp * 16 + index / CHUNKS, chunk = index % CHUNKS;
            i64 t = p.row + (i32)row;
            bool is_there = t < p.row_end;
            if (!is_there) t = p.row;
            const bf16* from = (const bf16*)a.q + t * a.q_stride + (i64)head * KEY + chunk * 8;
            if (chunk >= DN / 8) from = (const bf16*)a.q_pe + (t * a.heads + head) * R + (chunk - DN / 8) * 8;
            copy_async_16(base + row * pitch(KEY) + chunk * 16, from, is_there);
        }
    }

    // Copies the warp's rows of a tile, of `columns` elements each.
    template <u32 COLUMNS> BCG_DEVICE void copy_keys(u32 to, u32 pitch, const bf16* from) const {
        constexpr u32 CHUNKS = COLUMNS / 8;
#pragma unroll
        for (u32 j = 0; j < KEYS_PER_WARP * CHUNKS / 32; j++) {
            u32 index = j * 32 + lane, row = index / CHUNKS, chunk = index % CHUNKS;
            copy_async_16(to + row * pitch + chunk * 16, from + (i64)row * WIDTH + chunk * 8, true);
        }
    }

    // Starts the copies of tile n of a sequence's keys and values, which begin at `decompressed`.
    BCG_DEVICE void copy_tile(const PlanItem& p, u32 n, const bf16* decompressed) const {
        constexpr u32 CHUNKS = R / 8;
        u32 first = n * TILE_KEYS + warp * KEYS_PER_WARP, offset;
        u32 k = tile(n) + warp * KEYS_PER_WARP * pitch(KEY), v = tile(n) + K_BYTES + warp * KEYS_PER_WARP * pitch(DV);
        const bf16* from = decompressed + (i64)first * WIDTH;
        copy_keys<DN>(k, pitch(KEY), from);
        copy_keys<DV>(v, pitch(DV), from + DN);
        i32 key = (i32)(first + lane % KEYS_PER_WARP);
        i64 page = find_page(p.sequence, key, p.keys, offset);
        i64 place = page < 0 ? -1 : page * a.kv.rope_page_stride + (i64)offset * R;
#pragma unroll
        for (u32 j = 0; j < KEYS_PER_WARP * CHUNKS / 32; j++) {
            u32 index = j * 32 + lane, row = index / CHUNKS, chunk = index % CHUNKS;
            i64 at = __shfl_sync(FULL_WARP, place, row);
            const bf16* rope_key = (const bf16*)a.kv.rope_keys + (at < 0 ? 0 : at + chunk * 8);
            copy_async_16(k + row * pitch(KEY) + (DN / 8 + chunk) * 16, rope_key, at >= 0);
        }
        u32 bits = __ballot_sync(FULL_WARP, page >= 0 || key >= p.keys);
        if (lane == 0) asm volatile("st.shared.u8 [%0], %1;" ::"r"(in_cache + n % 2 * 8 + warp), "r"(bits) : "memory");
        copy_async_commit();
    }

    BCG_DEVICE u32 tile(u32 n) const { return base + Q_BYTES + n % 2 * (K_BYTES + V_BYTES); }

    // s = q · kᵀ for the warp's 16 rows.
    BCG_DEVICE void score(float (&s)[TILE_KEYS / 2], u32 k) const {
#pragma unroll
        for (u32 i = 0; i < TILE_KEYS / 2; i++) s[i] = 0.0f;
#pragma unroll
        for (u32 c = 0; c < KEY / 8; c += 2) {
            u32 q[4];
            load_matrices(q, base + (warp * 16 + lane % 16) * pitch(KEY) + (c + lane / 16) * 16);
#pragma unroll
            for (u32 n = 0; n < TILE_KEYS; n += 16) {
                u32 b[4];
                load_matrices(b, k + (n + lane % 8 + lane / 16 * 8) * pitch(KEY) + (c + lane / 8 % 2) * 16);
                multiply(s + n / 2, q, b[0], b[1]);
                multiply(s + n / 2 + 4, q, b[2], b[3]);
            }
        }
    }

    // o += p · v, with the weights rounded.
    BCG_DEVICE void mix(float (&o)[DV / 2], const float (&p)[TILE_KEYS / 2], u32 v) const {
#pragma unroll
        for (u32 n = 0; n < TILE_KEYS; n += 16) {
            u32 w[4];
#pragma unroll
            for (u32 i = 0; i < 4; i++) w[i] = round_pair<bf16>(p[n / 2 + 2 * i], p[n / 2 + 2 * i + 1]);
#pragma unroll
            for (u32 c = 0; c < DV / 8; c += 2) {
                u32 b[4];
                load_matrices_transposed(b, v + (n + lane % 16) * pitch(DV) + (c + lane / 16) * 16);
                multiply(o + c * 4, w, b[0], b[1]);
                multiply(o + c * 4 + 4, w, b[2], b[3]);
            }
        }
    }

    // c += a · b: 16 rows of a, 8 columns of b.
    BCG_DEVICE static void multiply(float* c, const u32 (&a)[4], u32 b0, u32 b1) {
        u32 b[2] = {b0, b1};
        mma<bf16>(*(float (*)[4])c, a, b);
    }

    BCG_DEVICE void attend_tiles(const PlanItem& p, u32 head, const bf16* decompressed) {
        i32 row = p.row + (i32)(warp * 16 + lane / 4);
        u32 num_tiles = ((u32)p.keys + TILE_KEYS - 1) / TILE_KEYS;
        copy_queries(p, head);
        if (num_tiles > 0) copy_tile(p, 0, decompressed);
        else copy_async_commit();
        TwoRows rows;
        rows.clear();
        float o[DV / 2] = {};
        for (u32 n = 0; n < num_tiles; n++) {
            if (n + 1 < num_tiles) {
                copy_tile(p, n + 1, decompressed);
                copy_async_wait<1>();
            } else {
                copy_async_wait<0>();
            }
            __syncthreads();
            float s[TILE_KEYS / 2];
            score(s, tile(n));
            i32 first_key = (i32)(n * TILE_KEYS), last_key = first_key + (i32)TILE_KEYS - 1;
            u32 bits[2];
            asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                         : "=r"(bits[0]), "=r"(bits[1])
                         : "r"(in_cache + n % 2 * 8)
                         : "memory");
            if (p.row + (i32)(warp * 16) + p.shift < last_key || p.keys <= last_key || (bits[0] & bits[1]) != FULL_WARP)
                hide(s, bits, first_key, row + p.shift, p.keys);
            rows.weigh(s, a.scale * LOG2_E);
            rows.rescale(o);
            mix(o, s, tile(n) + K_BYTES);
            __syncthreads();  // before the copies of the tile after the next one
        }
        copy_async_wait<0>();
        rows.store((bf16*)a.out + (i64)head * DV, (i64)a.heads * DV, row, p.row_end, o);
    }
};

template <u32 L, u32 DN, u32 R, u32 DV> BCG_DEVICE void mla_prefill(const MlaPrefillArgs& a) {
    extern __shared__ __align__(128) u8 shared[];
    wait_for_inputs();
    release_dependents();
    Prefill<L, DN, R, DV>(a, shared).run();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) mla_prefill_l512_d128(MlaPrefillArgs a) { mla_prefill<512, 128, 64, 128>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) mla_prefill_l64_d32(MlaPrefillArgs a) { mla_prefill<64, 32, 32, 32>(a); }
