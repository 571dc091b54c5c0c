// Choices of experts on their way between ranks, of which each owns as many experts as the others, in order.
#pragma once
#include "bcg.cuh"

// The rank that owns an expert; one beyond all ranks for none, which is -1.
BCG_DEVICE u32 owner_of(i32 expert, u32 experts_of_rank) { return (u32)expert / experts_of_rank; }

// A bit for each rank that owns experts of a token.
BCG_DEVICE u32 owners_of(const i32* experts, u32 chosen, u32 experts_of_rank, u32 num_ranks) {
    u32 owners = 0;
#pragma unroll 1
    for (u32 k = 0; k < chosen; k++)
        if (u32 owner = owner_of(experts[k], experts_of_rank); owner < num_ranks) owners |= 1u << owner;
    return owners;
}

constexpr u32 CHOICES_OF_PACK = 2;

// Choices from `first` on of one token as a rank is sent them: the expert and 1, and the weight; zeros for what it does not
// own. No word says "not yet written" but that of a weight, which is a NaN then.
BCG_DEVICE Pack<float> pack_choices(const i32* experts, const float* weights, u32 first, u32 chosen, u32 to, u32 experts_of_rank) {
    Pack<float> p = {};
#pragma unroll
    for (u32 u = 0; u < CHOICES_OF_PACK; u++) {
        u32 k = first + u;
        if (k >= chosen || owner_of(experts[k], experts_of_rank) != to) continue;
        p.words[2 * u] = (u32)experts[k] + 1;
        p.words[2 * u + 1] = __float_as_uint(weights[k]);
    }
    return p;
}

// Writes such choices; tells whether there is one.
BCG_DEVICE bool unpack_choices(const Pack<float>& p, i32* experts, float* weights, u32 first, u32 chosen) {
    bool has = false;
#pragma unroll
    for (u32 u = 0; u < CHOICES_OF_PACK; u++) {
        u32 k = first + u;
        if (k >= chosen) continue;
        experts[k] = (i32)p.words[2 * u] - 1;
        weights[k] = __uint_as_float(p.words[2 * u + 1]);
        has |= p.words[2 * u] != 0;
    }
    return has;
}
