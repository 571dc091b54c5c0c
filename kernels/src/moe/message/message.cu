// Rows and their choices as messages of one size to every rank, in whole packs: those of the choices, then those of the row.
// Host reference: host.rs; shapes and geometry: mod.rs.
#include "args.cuh"
#include "moe_exchange.cuh"

BCG_DEVICE u32 choice_packs(u32 chosen) { return (chosen + CHOICES_OF_PACK - 1) / CHOICES_OF_PACK; }

// A block for each row of a message.
template <typename T, bool WIDE> BCG_DEVICE void moe_pack(const PackArgs& a) {
    constexpr u32 LEN = Pack<T>::LEN;
    wait_for_inputs();
    release_dependents();
    u32 to = blockIdx.x / a.tokens, t = blockIdx.x % a.tokens, choices = choice_packs(a.chosen);
    const i32* experts = a.experts + (i64)t * a.chosen;
    const float* weights = a.weights + (i64)t * a.chosen;
    uint4* message = (uint4*)a.message + (i64)blockIdx.x * (choices + a.row_packs);
    bool has = false;
    for (u32 k = 0; k < a.chosen; k++) has |= owner_of(experts[k], a.experts_of_rank) == to;
    for (u32 i = threadIdx.x; i < choices; i += blockDim.x) {
        Pack<float> p = pack_choices(experts, weights, i * CHOICES_OF_PACK, a.chosen, to, a.experts_of_rank);
        message[i] = make_uint4(p.words[0], p.words[1], p.words[2], p.words[3]);
    }
    const T* x = (const T*)a.x + (i64)t * a.x_stride;
    for (u32 i = threadIdx.x; i < a.row_packs; i += blockDim.x) {
        Pack<T> p = {};
        if (has) p = load_pack<WIDE>(x, i * LEN, a.columns);
        message[choices + i] = make_uint4(p.words[0], p.words[1], p.words[2], p.words[3]);
    }
}

template <typename T> BCG_DEVICE void moe_pack(const PackArgs& a) {
    u64 low = (u64)a.x | (a.x_stride | a.columns) * sizeof(T);
    if (low % 16 == 0) moe_pack<T, true>(a);
    else moe_pack<T, false>(a);
}

extern "C" __global__ void moe_pack_bf16(PackArgs a) { moe_pack<bf16>(a); }
extern "C" __global__ void moe_pack_f16(PackArgs a) { moe_pack<f16>(a); }
extern "C" __global__ void moe_pack_f32(PackArgs a) { moe_pack<float>(a); }

// A thread for each pack of choices.
extern "C" __global__ void moe_unpack(UnpackArgs a) {
    wait_for_inputs();
    release_dependents();
    u32 choices = choice_packs(a.chosen), i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.rows * choices) return;
    u32 row = i / choices, at = i % choices;
    uint4 v = ((const uint4*)a.message)[(i64)row * (choices + a.row_packs) + at];
    Pack<float> p = {{v.x, v.y, v.z, v.w}};
    i64 first = (i64)row * a.chosen;
    unpack_choices(p, a.experts + first, a.weights + first, at * CHOICES_OF_PACK, a.chosen);
}
