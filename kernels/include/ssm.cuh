// The recurrence of Mamba2's heads: what the kernels over prompts and over single tokens share. Host reference, shapes and
// checks: kernels/src/ssm/ssd_scan.
#pragma once
#include "args.cuh"
#include "bcg.cuh"

// What a head's parameters are, as the recurrence uses them.
struct SsmHead {
    float a, d, dt_bias;
};

template <typename T> BCG_DEVICE SsmHead load_head(const SsmArgs& a, u32 head) {
    return {-expf(to_f32(((const T*)a.a_log)[head])), to_f32(((const T*)a.d)[head]), to_f32(((const T*)a.dt_bias)[head])};
}

// The time step: softplus of the projection and its bias, within the limits.
BCG_DEVICE float time_step(const SsmArgs& a, const SsmHead& head, float dt) {
    float v = dt + head.dt_bias;
    float softplus = v > 20.0f ? v : log1pf(expf(v));
    return fminf(fmaxf(softplus, a.dt_min), a.dt_max);
}

// The state of a slot from head `head` on, or null for a slot that does not exist.
template <typename S> BCG_DEVICE S* state_of(const SsmArgs& a, i32 slot, u32 head) {
    if (slot < 0 || (u32)slot >= a.num_slots) return nullptr;
    return (S*)a.state + slot * a.slot_stride + (i64)head * a.head_dim * a.state_size;
}
