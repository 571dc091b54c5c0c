// The state-space scan on tensor cores, for bf16 with 64 channels to a head and a state of 64 or 128. A block owns a head
// of a sequence and walks over it in chunks of 64 rows; the state stays in registers, so that nothing goes through device
// memory between chunks. For the rows of a chunk and the state S ahead of it, everything is a matrix product:
//
//   y[i] = exp(cum[i]) S C[i] + sum over j <= i of G[i, j] x[j] + D x[i],   G[i, j] = C[i]·B[j] exp(cum[i] - cum[j]) dt[j]
//   S    = exp(cum[last]) S + sum over j of exp(cum[last] - cum[j]) dt[j] x[j] B[j]ᵀ,                cum = cumulated dt A
//
// S, G and the weighted x are not exact in bf16: each is split into two, which leaves the error of f32.
// The products are computed transposed, y[p, i] and S[p, n]: then S is, as it stands in registers, an operand of the first
// one and the result of the last one. Host reference: host.rs; shapes: mod.rs; geometry:
// tiled.rs.
#include "mma.cuh"
#include "ssm.cuh"

constexpr u32 P = HEAD_DIM;  // channels of a head
constexpr u32 TILES = CHUNK / 16;

// What reading and writing a state costs, in chunks.
constexpr u32 STATE_COST = 1;

// The warp that prepares the decays; it has the least to do else.
constexpr u32 DECAY_WARP = 7;

// What a row does with the state; logarithms are to base 2.
struct Decays {
    float cum[CHUNK];     // logarithm of the decay from ahead of the chunk to behind the row
    float decay[CHUNK];   // that decay
    float dt[CHUNK];      // 0 behind the sequence
    float weight[CHUNK];  // by which the row enters the state behind the chunk
};

template <u32 N> struct Memory {
    bf16 c[2][CHUNK * N], b[2][CHUNK * N], x[2][CHUNK * P];  // 16-byte word w of a row stands at w ^ row % 8
    u32 g[2][TILES * (TILES + 1) / 2][4][32];  // G, high and low parts: tiles up to the diagonal, of 8x8 matrices
    float4 sums[8][4][32];                     // what a warp leaves to another
    Decays decays[2];
    u32 costs[THREADS / 32], ends[THREADS / 32], share[2];
};

// Rows from `row` on, up to a chunk, of one head of a sequence.
struct Place {
    u32 sequence, head;
    i32 first, row, end;  // first, end: of the sequence
    i32 read, write;      // slots; -1: none

    BCG_DEVICE bool begins() const { return row == first; }
    BCG_DEVICE bool ends() const { return end - row <= (i32)CHUNK; }
    // Tiles of 16 rows that are not empty.
    BCG_DEVICE u32 tiles() const { return ends() ? (u32)(end - row + 15) / 16 : TILES; }
};

// What the decays of two rows of a chunk are computed from.
struct RawDecays {
    float dt[2];
    bool is_row[2];  // not behind the sequence
    SsmHead head;
};

BCG_DEVICE float2 load_pair(const float* p) { return *(const float2*)p; }
BCG_DEVICE float2 unpack(u32 both) { return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)); }
BCG_DEVICE float2 load_pair(const bf16* p) { return unpack(*(const u32*)p); }
BCG_DEVICE void store_pair(float* p, float x, float y) { *(float2*)p = make_float2(x, y); }
BCG_DEVICE void store_pair(bf16* p, float x, float y) { *(u32*)p = round_pair<bf16>(x, y); }

// Two values as the sum of two pairs of bf16.
BCG_DEVICE void split(float x, float y, u32& high, u32& low) {
    high = round_pair<bf16>(x, y);
    float2 v = unpack(high);
    low = round_pair<bf16>(x - v.x, y - v.y);
}

// c += (high + low) b.
BCG_DEVICE void mma_split(float (&c)[4], const u32 (&high)[4], const u32 (&low)[4], u32 b0, u32 b1) {
    u32 b[2] = {b0, b1};
    mma<bf16>(c, high, b);
    mma<bf16>(c, low, b);
}

template <u32 COLUMNS> BCG_DEVICE u32 word_at(const bf16* tile, u32 row, u32 word) {
    return shared_address(tile) + row * COLUMNS * 2 + ((word ^ row % 8) << 4);
}

template <typename S, u32 N> struct Scan {
    static constexpr u32 HALF = N / 2;  // columns of the state that a warp has, of 16 channels

    const SsmArgs& a;
    Memory<N>& memory;
    u32 warp, lane, half, channels;  // half of the columns, tile of channels
    u32 end;                         // of the block's share: sequence * heads + head
    float state[HALF / 8][4];

    BCG_DEVICE Scan(const SsmArgs& args, Memory<N>& shared) : a(args), memory(shared) {
        warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        half = warp / 4, channels = warp % 4;
    }

    BCG_DEVICE i32 start(u32 sequence) const { return min(max(a.cu_seqlens_q[sequence], 0), (i32)a.rows); }
    BCG_DEVICE u32 cost(u32 sequence) const {
        i32 rows = start(sequence + 1) - start(sequence);
        return rows > 0 ? (u32)(rows + CHUNK - 1) / CHUNK + STATE_COST : 0;
    }

    // Finds the block's share of the heads of all sequences. Laid out one after the other, each as long as it costs, those
    // are its that have their middle in its part of the whole length. Blocks of a multiprocessor are neighbours there.
    BCG_DEVICE u32 find_share() {
        u32 each = (a.sequences + THREADS - 1) / THREADS, own = 0, last = 0;
        u32 from = min(threadIdx.x * each, a.sequences), to = min(from + each, a.sequences);
        for (u32 s = from; s < to; s++) {
            u32 c = cost(s);
            own += c;
            if (c > 0) last = s + 1;
        }
        u32 sum = own;
        for (u32 offset = 1; offset < 32; offset *= 2) {
            u32 other = __shfl_up_sync(FULL_WARP, sum, offset);
            if (lane >= offset) sum += other;
        }
        last = warp_reduce(last, Max());
        if (lane == 31) memory.costs[warp] = sum, memory.ends[warp] = last;
        if (threadIdx.x < 2) memory.share[threadIdx.x] = ~0u;
        __syncthreads();
        u64 before = sum - own, total = 0;
        for (u32 w = 0; w < THREADS / 32; w++) {
            if (w < warp) before += memory.costs[w];
            total += memory.costs[w];
            last = max(last, memory.ends[w]);
        }
        u32 multiprocessors = gridDim.x / BLOCKS;
        u32 place = blockIdx.x % multiprocessors * BLOCKS + blockIdx.x / multiprocessors;
        for (u32 edge = 0; edge < 2; edge++) {
            // All lengths twice, so that a middle is a whole number.
            u64 part = (2 * total * a.heads * (place + edge) + gridDim.x - 1) / gridDim.x, at = 2 * before * a.heads;
            u32 found = ~0u;
            for (u32 s = from; s < to && found == ~0u; s++) {
                u64 c = cost(s);
                if (c == 0) continue;
                u64 head = part <= at + c ? 0 : (part - at - c + 2 * c - 1) / (2 * c);
                if (head < a.heads) found = s * a.heads + (u32)head;
                at += 2 * c * a.heads;
            }
            found = __reduce_min_sync(FULL_WARP, found);
            if (lane == 0 && found != ~0u) atomicMin(&memory.share[edge], found);
        }
        __syncthreads();
        end = min(memory.share[1], last * a.heads);
        return min(memory.share[0], end);
    }

    BCG_DEVICE bool is_there(const Place& p) const { return p.sequence * a.heads + p.head < end; }

    // Finds the first rows from p.sequence on.
    BCG_DEVICE void enter(Place& p) const {
        for (; is_there(p); p.sequence++, p.head = 0) {
            p.first = p.row = start(p.sequence), p.end = start(p.sequence + 1);
            p.read = a.slots.read[p.sequence], p.write = a.slots.write[p.sequence];
            if (p.first < p.end) return;
        }
    }

    BCG_DEVICE void advance(Place& p) const {
        if (!p.ends()) {
            p.row += CHUNK;
            return;
        }
        p.row = p.first;
        if (++p.head < a.heads) return;
        p.head = 0, p.sequence++;
        enter(p);
    }

    // Where the lane's two columns of a matrix of 8 columns, and of row `lane / 4`, stand in a head's state.
    BCG_DEVICE u32 in_state(u32 matrix) const {
        return (channels * 16 + lane / 4) * N + half * HALF + matrix * 8 + lane % 4 * 2;
    }

    template <u32 COLUMNS>
    BCG_DEVICE void copy_rows(bf16* tile, const void* from, i64 stride, u32 column, const Place& p) const {
        constexpr u32 WORDS = COLUMNS / 8;
        const bf16* first = (const bf16*)from + p.row * stride + column;
        u32 rows = (u32)(p.end - p.row), words = p.tiles() * 16 * WORDS;
#pragma unroll
        for (u32 i = threadIdx.x; i < CHUNK * WORDS; i += THREADS) {
            u32 row = i / WORDS, word = i % WORDS;
            bool is_row = row < rows;
            const bf16* src = first + (is_row ? row * stride : 0) + word * 8;
            if (i < words) copy_async_16(word_at<COLUMNS>(tile, row, word), src, is_row);
        }
    }

    // Starts the copy of a chunk, and has a state that it begins with fetched from memory.
    BCG_DEVICE void copy(const Place& p, u32 stage) const {
        u32 group = p.head / a.group_heads;
        copy_rows<N>(memory.c[stage], a.c, a.c_stride, group * N, p);
        copy_rows<N>(memory.b[stage], a.b, a.b_stride, group * N, p);
        copy_rows<P>(memory.x[stage], a.x, a.x_stride, p.head * P, p);
        constexpr u32 LINE = 128;
        const u8* state = p.begins() ? (const u8*)state_of<S>(a, p.read, p.head) : nullptr;
        if (state && threadIdx.x * LINE < P * N * sizeof(S))
            asm volatile("prefetch.global.L2 [%0];" ::"l"(state + threadIdx.x * LINE));
    }

    // Two rows of a chunk for each lane.
    BCG_DEVICE RawDecays load_decays(const Place& p) const {
        RawDecays raw;
        const bf16* dt = (const bf16*)a.dt + p.head;
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
            i32 row = p.row + (i32)(lane * 2 + j);
            raw.is_row[j] = row < p.end;
            raw.dt[j] = raw.is_row[j] ? to_f32(dt[row * a.dt_stride]) : 0.0f;
        }
        raw.head = load_head<bf16>(a, p.head);
        return raw;
    }

    BCG_DEVICE void store_decays(const RawDecays& raw, u32 stage) const {
        float rate = raw.head.a * LOG2_E, dt[2];
#pragma unroll
        for (u32 j = 0; j < 2; j++) dt[j] = raw.is_row[j] ? time_step(a, raw.head, raw.dt[j]) : 0.0f;
        float first = dt[0] * rate, sum = first + dt[1] * rate;
        for (u32 offset = 1; offset < 32; offset *= 2) {
            float other = __shfl_up_sync(FULL_WARP, sum, offset);
            if (lane >= offset) sum += other;
        }
        float before = __shfl_up_sync(FULL_WARP, sum, 1), all = __shfl_sync(FULL_WARP, sum, 31);
        if (lane > 0) first += before;
        Decays& to = memory.decays[stage];
        store_pair(&to.cum[lane * 2], first, sum);
        store_pair(&to.decay[lane * 2], exp2_fast(first), exp2_fast(sum));
        store_pair(&to.dt[lane * 2], dt[0], dt[1]);
        store_pair(&to.weight[lane * 2], exp2_fast(all - first) * dt[0], exp2_fast(all - sum) * dt[1]);
    }

    // Computes G of the chunk, 16 rows and up to 24 columns for each warp: all up to the diagonal.
    BCG_DEVICE void weigh(u32 stage, u32 tiles) const {
        // For each warp, from the last digit on: which 16 rows, the first 8 columns of them, and how many times 8.
        u32 tile = 0x02112333 >> warp * 4 & 15, first = 0x03200630 >> warp * 4 & 15, count = 0x23223233 >> warp * 4 & 15;
        if (tile >= tiles) return;
        float g[3][4] = {};
#pragma unroll
        for (u32 k = 0; k < N / 8; k += 4) {
            u32 c0[4], c1[4], row = tile * 16 + lane % 16;
            load_matrices(c0, word_at<N>(memory.c[stage], row, k + lane / 16));
            load_matrices(c1, word_at<N>(memory.c[stage], row, k + 2 + lane / 16));
#pragma unroll
            for (u32 m = 0; m < 3; m++) {
                if (m >= count) break;
                u32 b[4];
                load_matrices(b, word_at<N>(memory.b[stage], (first + m) * 8 + lane % 8, k + lane / 8));
                u32 b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
                mma<bf16>(g[m], c0, b0);
                mma<bf16>(g[m], c1, b1);
            }
        }
        const Decays& d = memory.decays[stage];
        u32 row = tile * 16 + lane / 4;
        float cum[2] = {d.cum[row], d.cum[row + 8]};
#pragma unroll
        for (u32 m = 0; m < 3; m++) {
            if (m >= count) break;
            u32 column = (first + m) * 8 + lane % 4 * 2, at = tile * (tile + 1) / 2 + (first + m) / 2;
            float2 cum_j = load_pair(&d.cum[column]), dt = load_pair(&d.dt[column]);
#pragma unroll
            for (u32 r = 0; r < 2; r++) {
                u32 i = row + 8 * r, high, low;
                float x = column <= i ? g[m][2 * r] * exp2_fast(cum[r] - cum_j.x) * dt.x : 0.0f;
                float y = column + 1 <= i ? g[m][2 * r + 1] * exp2_fast(cum[r] - cum_j.y) * dt.y : 0.0f;
                split(x, y, high, low);
                u32 matrix = r * 2 + (first + m) % 2;
                memory.g[0][at][matrix][lane] = high;
                memory.g[1][at][matrix][lane] = low;
            }
        }
    }

    // y[p, i] = exp(cum[i]) S C[i] over the warp's columns of the state, for all rows of the chunk.
    BCG_DEVICE void read_state(float (&y)[TILES][2][4], u32 stage, u32 tiles) const {
#pragma unroll
        for (u32 k = 0; k < HALF / 8; k += 2) {
            u32 high[4], low[4];
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const float* from = &state[k + i / 2][i % 2 * 2];
                split(from[0], from[1], high[i], low[i]);
            }
#pragma unroll
            for (u32 t = 0; t < TILES; t++) {
                if (t >= tiles) break;
                u32 c[4], word = half * (HALF / 8) + k + lane / 8 % 2;
                load_matrices(c, word_at<N>(memory.c[stage], t * 16 + lane % 8 + lane / 16 * 8, word));
                mma_split(y[t][0], high, low, c[0], c[1]);
                mma_split(y[t][1], high, low, c[2], c[3]);
            }
        }
        const Decays& d = memory.decays[stage];
#pragma unroll
        for (u32 t = 0; t < TILES; t++)
#pragma unroll
            for (u32 m = 0; m < 2; m++) {
                float2 decay = load_pair(&d.decay[t * 16 + m * 8 + lane % 4 * 2]);
                y[t][m][0] *= decay.x, y[t][m][1] *= decay.y, y[t][m][2] *= decay.x, y[t][m][3] *= decay.y;
            }
    }

    // S = exp(cum[last]) S + x̃ᵀ B, where x̃ are the weighted rows.
    BCG_DEVICE void update_state(const u32 (&x)[TILES][4], u32 stage, u32 tiles) {
        const Decays& d = memory.decays[stage];
        float kept = d.decay[CHUNK - 1];
#pragma unroll
        for (u32 m = 0; m < HALF / 8; m++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) state[m][i] *= kept;
#pragma unroll
        for (u32 t = 0; t < TILES; t++) {
            if (t >= tiles) break;
            u32 high[4], low[4];
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                float2 weight = load_pair(&d.weight[t * 16 + i / 2 * 8 + lane % 4 * 2]);
                float2 v = unpack(x[t][i]);
                split(v.x * weight.x, v.y * weight.y, high[i], low[i]);
            }
#pragma unroll
            for (u32 m = 0; m < HALF / 8; m += 2) {
                u32 b[4], row = t * 16 + lane % 16;
                load_matrices_transposed(b, word_at<N>(memory.b[stage], row, half * (HALF / 8) + m + lane / 16));
                mma_split(state[m], high, low, b[0], b[1]);
                mma_split(state[m + 1], high, low, b[2], b[3]);
            }
        }
    }

    // y[p, i] += sum over j of G[i, j] x[j, p] + D x[i, p] for 16 rows of the chunk; writes them.
    BCG_DEVICE void finish_rows(float (&y)[2][4], const u32 (&x)[TILES][4], u32 tile, const u32 (&own)[4], float skip,
                                const Place& p) const {
#pragma unroll
        for (u32 t = 0; t < TILES; t++) {
            if (t > tile) break;
            u32 high[4], low[4], at = tile * (tile + 1) / 2 + t;
            load_matrices(high, shared_address(memory.g[0][at]) + lane * 16);
            load_matrices(low, shared_address(memory.g[1][at]) + lane * 16);
#pragma unroll
            for (u32 m = 0; m < 2; m++) {
                u32 h[2] = {high[2 * m], high[2 * m + 1]}, l[2] = {low[2 * m], low[2 * m + 1]};
                mma<bf16>(y[m], x[t], h);
                mma<bf16>(y[m], x[t], l);
            }
        }
        u32 words[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            float* to = &y[i / 2][i % 2 * 2];
            float2 v = unpack(own[i]);
            words[i] = transpose_matrix(round_pair<bf16>(to[0] + skip * v.x, to[1] + skip * v.y));
        }
        transpose(words);
        i32 row = p.row + (i32)(tile * 16 + lane % 4 / 2 * 8 + lane / 4);
        bf16* out = (bf16*)a.out + ((i64)row * a.heads + p.head) * P + channels * 16 + lane % 2 * 8;
        if (row < p.end) *(uint4*)out = make_uint4(words[0], words[1], words[2], words[3]);
    }

    // Scans a chunk; `ahead` are the decays of the next one.
    BCG_DEVICE void scan(const Place& p, u32 stage, bool has_state, float skip, const RawDecays& ahead) {
        u32 tiles = p.tiles();
        weigh(stage, tiles);
        float y[TILES][2][4] = {};
        if (has_state) read_state(y, stage, tiles);
        if (warp == DECAY_WARP) store_decays(ahead, stage ^ 1);
        // Two warps have the columns of the state of the same channels: the first finishes tiles 0 and 3 of the rows, the
        // second 1 and 2, which is the same work.
        float kept[2][2][4];
#pragma unroll
        for (u32 e = 0; e < 2; e++)
#pragma unroll
            for (u32 m = 0; m < 2; m++) {
                float v[4];
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    float outer = y[e ? 3 : 0][m][i], inner = y[e ? 2 : 1][m][i];
                    kept[e][m][i] = half ? inner : outer;
                    v[i] = half ? outer : inner;
                }
                memory.sums[warp][e * 2 + m][lane] = make_float4(v[0], v[1], v[2], v[3]);
            }
        __syncthreads();  // G and the sums are there
        u32 x[TILES][4];
#pragma unroll
        for (u32 t = 0; t < TILES; t++) {
            u32 word = channels * 2 + lane / 8 % 2;
            u32 row = t * 16 + lane % 8 + lane / 16 * 8;
            if (t < tiles) load_matrices_transposed(x[t], word_at<P>(memory.x[stage], row, word));
        }
#pragma unroll
        for (u32 e = 0; e < 2; e++) {
            u32 tile = e ? 3 - half : half, own[4];
            if (tile >= tiles) continue;
#pragma unroll
            for (u32 m = 0; m < 2; m++) {
                float4 v = memory.sums[warp ^ 4][e * 2 + m][lane];
                kept[e][m][0] += v.x, kept[e][m][1] += v.y, kept[e][m][2] += v.z, kept[e][m][3] += v.w;
            }
#pragma unroll
            for (u32 i = 0; i < 4; i++) own[i] = half ? x[e ? 2 : 1][i] : x[e ? 3 : 0][i];
            finish_rows(kept[e], x, tile, own, skip, p);
        }
        update_state(x, stage, tiles);
    }

    BCG_DEVICE void load_state(const S* from) {
#pragma unroll
        for (u32 m = 0; m < HALF / 8; m++)
#pragma unroll
            for (u32 r = 0; r < 2; r++) {
                float2 v = load_pair(from + in_state(m) + r * 8 * N);
                state[m][2 * r] = v.x, state[m][2 * r + 1] = v.y;
            }
    }

    BCG_DEVICE void store_state(S* to) const {
#pragma unroll
        for (u32 m = 0; m < HALF / 8; m++)
#pragma unroll
            for (u32 r = 0; r < 2; r++) store_pair(to + in_state(m) + r * 8 * N, state[m][2 * r], state[m][2 * r + 1]);
    }

    BCG_DEVICE void clear_state() {
#pragma unroll
        for (u32 m = 0; m < HALF / 8; m++) state[m][0] = state[m][1] = state[m][2] = state[m][3] = 0.0f;
    }

    BCG_DEVICE void run() {
        u32 first = find_share(), stage = 0;
        Place next = {first / a.heads, first % a.heads};
        enter(next);
        if (!is_there(next)) return;
        copy(next, stage);
        copy_async_commit();
        RawDecays ahead = {};
        if (warp == DECAY_WARP) store_decays(load_decays(next), stage);
        bool has_state = false;
        float skip = 0.0f;
        while (is_there(next)) {
            Place now = next;
            advance(next);
            if (now.begins()) {
                const S* before = state_of<S>(a, now.read, now.head);
                has_state = before != nullptr;
                if (has_state) load_state(before);
                else clear_state();
                skip = to_f32(((const bf16*)a.d)[now.head]);
            }
            copy_async_wait<0>();
            __syncthreads();  // the chunk is there, and the one before is done with
            if (is_there(next)) {
                copy(next, stage ^ 1);
                if (warp == DECAY_WARP) ahead = load_decays(next);
            }
            copy_async_commit();
            scan(now, stage, has_state, skip, ahead);
            has_state = true;
            S* after = now.ends() ? state_of<S>(a, now.write, now.head) : nullptr;
            if (after) store_state(after);
            stage ^= 1;
        }
    }
};

#define SSD_SCAN_TILED(N, NAME, S)                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) ssd_scan_tiled_n##N##_##NAME(SsmArgs a) {          \
        extern __shared__ uint4 memory[];                                                                           \
        wait_for_inputs();                                                                                          \
        release_dependents();                                                                                       \
        Scan<S, N>(a, *(Memory<N>*)memory).run();                                                                   \
    }
SSD_SCAN_TILED(64, f32, float)
SSD_SCAN_TILED(64, bf16, bf16)
SSD_SCAN_TILED(128, f32, float)
SSD_SCAN_TILED(128, bf16, bf16)
