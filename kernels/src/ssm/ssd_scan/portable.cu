// One warp for some rows of the state of one sequence and head, token after token; warps take such items in turn.
// Host reference: host.rs; shapes and geometry: mod.rs.
#include "ssm.cuh"

constexpr u32 ROWS = WARP_ROWS;               // rows of the state that a warp keeps
constexpr u32 COLUMNS = STATE_SIZE_MAX / 32;  // columns of each row that a lane keeps

// What a lane reads of one token.
struct Token {
    float dt, x[ROWS], b[COLUMNS], c[COLUMNS];
};

template <typename T> BCG_DEVICE Token load_token(const SsmArgs& a, i64 t, u32 head, u32 first_row) {
    Token token = {};
    u32 lane = threadIdx.x % 32, group = head / a.group_heads;
    const T* x = (const T*)a.x + t * a.x_stride + (i64)head * a.head_dim;
    const T* b = (const T*)a.b + t * a.b_stride + (i64)group * a.state_size;
    const T* c = (const T*)a.c + t * a.c_stride + (i64)group * a.state_size;
    token.dt = to_f32(((const T*)a.dt)[t * a.dt_stride + head]);
#pragma unroll
    for (u32 r = 0; r < ROWS; r++)
        if (first_row + r < a.head_dim) token.x[r] = to_f32(x[first_row + r]);
#pragma unroll
    for (u32 e = 0; e < COLUMNS; e++)
        if (lane + 32 * e < a.state_size) {
            token.b[e] = to_f32(b[lane + 32 * e]);
            token.c[e] = to_f32(c[lane + 32 * e]);
        }
    return token;
}

template <typename T, typename S> BCG_DEVICE void scan_item(const SsmArgs& a, u32 sequence, u32 head, u32 first_row) {
    i64 first = max(a.cu_seqlens_q[sequence], 0), end = min(a.cu_seqlens_q[sequence + 1], (i32)a.rows);
    if (first >= end) return;
    u32 lane = threadIdx.x % 32;
    SsmHead params = load_head<T>(a, head);
    const S* before = state_of<S>(a, a.slots.read[sequence], head);
    S* after = state_of<S>(a, a.slots.write[sequence], head);
    float h[ROWS][COLUMNS];
#pragma unroll
    for (u32 r = 0; r < ROWS; r++)
#pragma unroll
        for (u32 e = 0; e < COLUMNS; e++) {
            bool is_kept = before && first_row + r < a.head_dim && lane + 32 * e < a.state_size;
            h[r][e] = is_kept ? to_f32(before[(i64)(first_row + r) * a.state_size + lane + 32 * e]) : 0.0f;
        }
    Token next = load_token<T>(a, first, head, first_row);
    for (i64 t = first; t < end; t++) {
        Token token = next;
        if (t + 1 < end) next = load_token<T>(a, t + 1, head, first_row);
        float dt = time_step(a, params, token.dt), decay = expf(dt * params.a);
        T* out = (T*)a.out + (t * a.heads + head) * a.head_dim;
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            float scaled = dt * token.x[r], sum = 0.0f;
#pragma unroll
            for (u32 e = 0; e < COLUMNS; e++) {
                h[r][e] = decay * h[r][e] + scaled * token.b[e];
                sum += token.c[e] * h[r][e];
            }
            sum = warp_reduce(sum, Sum());
            if (lane == r && first_row + r < a.head_dim) out[first_row + r] = from_f32<T>(sum + params.d * token.x[r]);
        }
    }
    if (!after) return;
#pragma unroll
    for (u32 r = 0; r < ROWS; r++)
#pragma unroll
        for (u32 e = 0; e < COLUMNS; e++)
            if (first_row + r < a.head_dim && lane + 32 * e < a.state_size)
                after[(i64)(first_row + r) * a.state_size + lane + 32 * e] = from_f32<S>(h[r][e]);
}

template <typename T, typename S> BCG_DEVICE void ssd_scan(const SsmArgs& a) {
    wait_for_inputs();
    release_dependents();
    u32 pieces = (a.head_dim + ROWS - 1) / ROWS;
    u64 of_sequence = (u64)a.heads * pieces, items = of_sequence * a.sequences;
    u64 warps = (u64)gridDim.x * (blockDim.x / 32);
    for (u64 item = (u64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; item < items; item += warps) {
        u32 piece = (u32)(item % of_sequence);
        scan_item<T, S>(a, (u32)(item / of_sequence), piece / pieces, piece % pieces * ROWS);
    }
}

// The dtype of the state, then that of all else.
extern "C" __global__ void ssd_scan_state_f32_bf16(SsmArgs a) { ssd_scan<bf16, float>(a); }
extern "C" __global__ void ssd_scan_state_f32_f16(SsmArgs a) { ssd_scan<f16, float>(a); }
extern "C" __global__ void ssd_scan_state_f32_f32(SsmArgs a) { ssd_scan<float, float>(a); }
extern "C" __global__ void ssd_scan_state_bf16_bf16(SsmArgs a) { ssd_scan<bf16, bf16>(a); }
extern "C" __global__ void ssd_scan_state_bf16_f16(SsmArgs a) { ssd_scan<f16, bf16>(a); }
extern "C" __global__ void ssd_scan_state_bf16_f32(SsmArgs a) { ssd_scan<float, bf16>(a); }
