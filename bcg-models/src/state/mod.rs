//! What outlives a forward: the KV cache, the states of state-space layers, and who owns which of their pages and
//! slots.

mod kv_cache;
mod layout;
mod page_pool;
mod state_cache;
mod state_lease;

use bcg_runtime::{DType, Device, Result, Tensor};

pub use kv_cache::{KvCache, LayerKv};
pub use layout::{CacheLayout, CachedLayers, StateLayout};
pub use page_pool::{PageLease, PagePool};
pub use state_cache::{LayerState, StateCache};
pub use state_lease::StateLease;

/// All that a forward reads and writes of earlier steps.
#[derive(Debug, Clone)]
pub struct Caches {
    /// Keys and values of attention layers.
    pub kv: KvCache,
    /// States of state-space layers.
    pub states: StateCache,
}

/// Zeros in memory of `device`, which the devices `with` reach as well, if there are any.
fn zeros(device: &Device, with: &[Device], shape: &[usize], dtype: DType) -> Result<Tensor> {
    if with.is_empty() { device.zeros(shape, dtype) } else { device.zeros_shared(with, shape, dtype) }
}
