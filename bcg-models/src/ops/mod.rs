//! The ops that models are made of: shape checks, launch geometry and host reference of every kernel.
//!
//! One file per op, named like its CUDA source in `kernels/src`. An op takes the stream first, checks its tensors,
//! takes its output from the arena and enqueues one kernel; it works the same eagerly, under capture and inside breaks.
//!
//! - A host reference rounds exactly where the CUDA kernel does, and sums in f32.
//! - A row of an output depends on the same row of the inputs only, never on how many rows there are; in attention,
//!   convolution and scan, also on the rows of its sequence before it. So padding changes no valid row, and NaN in padded
//!   rows stays there. Exceptions, on CUDA: [`attention_decode()`] and [`mla_decode()`] cut a row's sum where the lengths of
//!   other sequences have it, but not padded ones; above 16 rows [`linear()`] takes another algorithm for another number of
//!   rows, and [`grouped_linear()`] another one than up to 16. [`moe_route()`] orders valid rows among each other, and
//!   places no padded one.
//! - No op reads anything back, synchronises or looks at a live value.
//!
//! A new op is four files: `kernels/src/x.cu`, `ops/x.rs`, a line here, a test in `tests/src/ops/x.rs`.
//!
//! Shape letters: T tokens, B sequences, C hidden, I intermediate, Hq/Hkv query/key-value heads, D head dim, V
//! vocabulary, P pages, S page size, E experts, K chosen experts; in state-space layers H heads, P channels of a head, N
//! state size, G groups of heads, K kernel of the convolution; in latent attention H heads, L latent, R rotated part, Dn
//! the other part of queries and keys, Dv values.

mod check;
mod decode_plan;
mod float;
mod latent_kv;
mod paged_kv;
mod random;
mod state_slots;

mod add_rms_norm;
mod argmax;
mod attention_decode;
mod attention_prefill;
mod causal_conv1d;
mod copy_rows;
mod fill;
mod fill_random;
mod gated_rms_norm;
mod gather_rows;
mod grouped_linear;
mod grouped_linear_few_rows;
mod grouped_linear_hopper;
mod head_linear;
mod kv_write;
mod linear;
mod linear_few_rows;
mod logit_bias;
mod logits;
mod mla_decode;
mod mla_kv_write;
mod mla_prefill;
mod moe_combine;
mod moe_permute;
mod moe_route;
mod qk_norm_rope_kv_write;
mod relu2;
mod rms_norm;
mod sample;
mod silu_mul;
mod ssd_scan;
mod ssd_scan_tiled;
mod ssm_update;
mod token_mask;
mod top_logprobs;
mod unpack_inputs;

pub use add_rms_norm::add_rms_norm;
pub use argmax::{argmax, argmax_to};
pub use attention_decode::{attention_decode, attention_decode_to};
pub use attention_prefill::{
    AttentionPrefill, attention_prefill, attention_prefill_plan, attention_prefill_plan_len, attention_prefill_to,
};
pub use causal_conv1d::{CausalConv1d, causal_conv1d};
pub use copy_rows::copy_rows;
pub use decode_plan::DecodePlan;
pub use fill::fill;
pub use fill_random::fill_random;
pub use gated_rms_norm::gated_rms_norm;
pub use gather_rows::gather_rows;
pub use grouped_linear::{grouped_gate_up, grouped_linear};
pub use head_linear::{head_linear, head_linear_transposed};
pub use kv_write::kv_write;
pub use latent_kv::LatentKv;
pub use linear::{linear, linear_to};
pub use logit_bias::logit_bias;
pub use mla_decode::mla_decode;
pub use mla_kv_write::{MlaKvWrite, mla_kv_write};
pub use mla_prefill::{MlaPrefill, mla_prefill};
pub use moe_combine::moe_combine;
pub use moe_permute::{ExpertPlan, moe_permute};
pub use moe_route::{Routing, Scores, Scoring, moe_route};
pub use paged_kv::PagedKv;
pub use qk_norm_rope_kv_write::{QkNormRopeKvWrite, qk_norm_rope_kv_write, rope_inv_freq};
pub use relu2::relu2;
pub use rms_norm::rms_norm;
pub use sample::{SampleInputs, sample, sample_to};
pub use silu_mul::silu_mul;
pub use ssd_scan::{SsmInputs, ssd_scan};
pub use ssm_update::ssm_update;
pub use token_mask::token_mask;
pub use top_logprobs::top_logprobs;
pub use unpack_inputs::unpack_inputs;
