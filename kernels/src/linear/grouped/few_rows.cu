// The rows of at most 16 tokens times the weights of their experts: bound by reading the weights of the experts that have
// rows, once. A block walks over items, each R rows of the weight of one expert (half gate, half up rows for gate and up),
// and keeps copies on the way across the borders of items. The steps of all its items are dealt to its 16 warps in turn,
// so that no warp idles at the end of an item; the sums are added by the place of a step in its item, in an order that
// depends on the number of columns only. Host reference: host.rs; shapes and geometry: few_rows.rs.
#include "args.cuh"
#include "few_rows.cuh"
#include "silu.cuh"

static_assert(EXPERTS_MAX <= THREADS, "a thread lists each expert");

// Up to `capacity` rows of one expert each, in the order of their places; in shared memory.
struct List {
    u16* expert;
    u16* first;  // place; and, behind the last entry, the end of its rows
    u8* token;   // of each place
    u32 len;

    // Room for an entry of each expert, and more: a token may pick an expert twice.
    BCG_DEVICE List(const GroupedArgs& a, u8* shared) {
        first = (u16*)shared, expert = first + a.experts + a.chosen + 1;
        token = (u8*)(expert + a.experts + a.chosen);
    }

    BCG_DEVICE static constexpr u32 bytes(u32 experts, u32 chosen, u32 tokens) {
        return (2 * (experts + chosen) + 1) * sizeof(u16) + tokens * chosen;
    }

    // Fills the list by all threads of the block, which are as many as experts at least.
    BCG_DEVICE void fill(const GroupedArgs& a, u32 capacity) {
        __shared__ u32 of_warp[WARPS];
        u32 e = threadIdx.x, lane = e % 32, warp = e / 32;
        u32 start = 0, end = 0;
        if (e < a.experts) start = (u32)a.offsets[e], end = (u32)a.offsets[e + 1];
        for (u32 p = e; p < a.places; p += THREADS) token[p] = (u8)((u32)a.rows[p] / a.chosen);
        u32 count = (end - start + capacity - 1) / capacity, index = count;  // index: behind the expert's last entry
#pragma unroll
        for (u32 step = 1; step < 32; step *= 2) {
            u32 before = __shfl_up_sync(FULL_WARP, index, step);
            if (lane >= step) index += before;
        }
        if (lane == 31) of_warp[warp] = index;
        __syncthreads();
        len = 0;
        for (u32 w = 0; w < WARPS; w++) {
            index += w < warp ? of_warp[w] : 0;
            len += of_warp[w];
        }
        for (index -= count; start < end; index++, start += capacity) expert[index] = (u16)e, first[index] = (u16)start;
        if (e + 1 == a.experts) first[len] = (u16)end;
        __syncthreads();
    }
};

template <bool GATED, u32 R, u32 ROWS, u32 STAGES> struct Block : FewRows<R, ROWS, STAGES> {
    using Base = FewRows<R, ROWS, STAGES>;
    using Base::HALVES, Base::TILES, Base::capacity, Base::row, Base::slot, Base::warp;
    static constexpr u32 OUTPUTS = GATED ? R / 2 : R;  // of an item
    // Shared memory of a block for ROWS tokens that choose one of EXPERTS_MAX experts each: what any block of few rows
    // has, the partial sums of a second item, and the list.
    static constexpr u32 ALL_BYTES =
        Base::BLOCK_BYTES + WARPS * ROWS * Base::PITCH * 4 + List::bytes(EXPERTS_MAX, 1, ROWS);

    const GroupedArgs& a;
    List list;
    float* partial;  // of two items
    u32 chunks;      // steps of an item
    u32 groups;      // items of an entry
    u32 items;

    // Where the thread copies from: a step of an item.
    struct Source {
        u32 item;
        u32 chunk;
        u32 rows;     // of x
        u32 outputs;  // of the item, from the thread's first on
        const bf16* weight;
        const bf16* x[HALVES];
    };

    BCG_DEVICE Block(const GroupedArgs& args, u8* shared)
        : Base(args.places / args.chosen, shared), a(args), list(args, shared + this->ring_bytes() + 2 * partial_bytes()) {
        partial = (float*)(shared + this->ring_bytes());
        chunks = (a.depth + STEP - 1) / STEP, groups = (a.outputs + OUTPUTS - 1) / OUTPUTS;
    }

    BCG_DEVICE u32 partial_bytes() const { return WARPS * capacity * Base::PITCH * 4; }

    // Points the source to its item, if there is one.
    BCG_DEVICE void find(Source& s) const {
        if (s.item >= items) return;
        u32 index = s.item / groups, output = s.item % groups * OUTPUTS + row(), first = list.first[index];
        i64 rows_of_expert = (i64)a.outputs * (GATED ? 2 : 1);
        s.rows = list.first[index + 1] - first;
        s.outputs = output < a.outputs ? a.outputs - output : 0;
        s.weight = (const bf16*)a.weight + (list.expert[index] * rows_of_expert + output) * a.depth;
#pragma unroll
        for (u32 t = row(), half = 0; half < HALVES; t += 8, half++) {
            u32 place = first + (t < s.rows ? t : 0);
            s.x[half] = (const bf16*)a.x + (GATED ? list.token[place] : place) * a.x_stride;
        }
    }

    // Goes on to the warp's next step.
    BCG_DEVICE void advance(Source& s) const {
        s.chunk += WARPS;
        if (s.chunk < chunks) return;
        for (; s.chunk >= chunks; s.chunk -= chunks) s.item += gridDim.x;
        find(s);
    }

    BCG_DEVICE void copy(u32 stage, const Source& s) const {
        if (s.item < items) {
            u32 k = s.chunk * STEP + this->column(), to = slot(stage);
            bool is_there = k < a.depth;
#pragma unroll
            for (u32 j = 0; j < TILES; j++) {
                // Gate rows, then up rows.
                u32 output = GATED ? j % (TILES / 2) * 8 : j * 8, part = GATED ? j / (TILES / 2) * a.outputs : 0;
                const bf16* from = s.weight + (i64)(part + output) * a.depth + k;
                copy_async_16(to + j * TILE_BYTES, from, output < s.outputs && is_there);
            }
#pragma unroll
            for (u32 t = row(), half = 0; half < HALVES; t += 8, half++)
                if (t < s.rows) copy_async_16(to + R * STEP_BYTES + half * TILE_BYTES, s.x[half] + k, is_there);
        }
        copy_async_commit();
    }

    // Adds the sums of all warps in order and writes the item's outputs.
    BCG_DEVICE void write(u32 item, u32 rows, const float* sums) const {
        u32 index = item / groups, first_output = item % groups * OUTPUTS;
        bf16* out = (bf16*)a.out + (i64)list.first[index] * a.outputs;
        for (u32 i = threadIdx.x; i < rows * OUTPUTS; i += THREADS) {
            u32 t = i / OUTPUTS, n = i % OUTPUTS;
            float sum = this->total(sums, t, n);
            if constexpr (GATED)
                sum = silu_mul<bf16>(round_to<bf16>(sum), round_to<bf16>(this->total(sums, t, OUTPUTS + n)));
            if (first_output + n < a.outputs) out[(i64)t * a.outputs + first_output + n] = from_f32<bf16>(sum);
        }
    }

    BCG_DEVICE void run() {
        wait_for_inputs();
        list.fill(a, capacity);
        items = list.len * groups;
        Source next = {blockIdx.x, warp};
        for (; next.chunk >= chunks; next.chunk -= chunks) next.item += gridDim.x;
        find(next);
        for (u32 stage = 0; stage < STAGES; stage++, advance(next)) copy(stage, next);
        float sums[TILES][4] = {};
        // part: of the warp in the item's sums, the place of its first step.
        u32 stage = 0, part = warp, turn = 0;
        for (u32 item = blockIdx.x; item < items; item += gridDim.x, turn ^= 1) {
            u32 index = item / groups, rows = list.first[index + 1] - list.first[index];
            for (u32 chunk = part; chunk < chunks; chunk += WARPS) {
                copy_async_wait<STAGES - 1>();
                this->step(stage, rows, sums);
                copy(stage, next);
                advance(next);
                if (++stage == STAGES) stage = 0;
            }
            // While some threads still read the sums of an item, others may write those of the next.
            float* of_turn = partial + turn * partial_bytes() / 4;
            this->keep(of_turn, part, rows, sums);
            __syncthreads();
            write(item, rows, of_turn);
            part = (part - chunks) % WARPS;
        }
    }
};

// Beside each kernel stands ALL_BYTES, for the test of the host's formula.
#define GROUPED_FEW_ROWS(NAME, GATED, ROWS, STAGES)                                                     \
    extern "C" __constant__ const u32 NAME##_few_rows_##ROWS##_bytes =                                  \
        Block<GATED, GROUP, ROWS, STAGES>::ALL_BYTES;                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME##_few_rows_##ROWS(GroupedArgs a) {       \
        extern __shared__ __align__(16) u8 shared[];                                                    \
        release_dependents();                                                                           \
        Block<GATED, GROUP, ROWS, STAGES>(a, shared).run();                                             \
    }

// As many stages as fit into 227 KiB of shared memory.
GROUPED_FEW_ROWS(grouped_gate_up, true, 2, 6)
GROUPED_FEW_ROWS(grouped_gate_up, true, 8, 4)
GROUPED_FEW_ROWS(grouped_gate_up, true, 16, 3)
GROUPED_FEW_ROWS(grouped_linear, false, 2, 6)
GROUPED_FEW_ROWS(grouped_linear, false, 8, 4)
GROUPED_FEW_ROWS(grouped_linear, false, 16, 3)
