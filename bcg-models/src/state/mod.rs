//! What outlives a forward: the KV cache and who owns which of its pages.

mod kv_cache;
mod page_pool;

pub use kv_cache::{KvCache, LayerKv};
pub use page_pool::{PageLease, PagePool};
