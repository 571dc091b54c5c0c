//! Attention over paged keys and values, and the writes of its cache.

pub(crate) mod decode_plan;
mod paged_kv;

pub use decode_plan::DecodePlan;
pub use paged_kv::{HEAD_DIM_MAX, PagedKv, takes_head_dim};

ops! {
    decode,
    kv_write,
    prefill,
    qk_norm_rope_kv_write,
}
