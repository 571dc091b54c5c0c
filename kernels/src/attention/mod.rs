//! Attention over paged keys and values, and the writes of its cache.

pub(crate) mod decode_plan;
mod paged_kv;

pub use decode_plan::DecodePlan;
pub use paged_kv::PagedKv;

ops! {
    decode,
    kv_write,
    prefill,
    qk_norm_rope_kv_write,
}
