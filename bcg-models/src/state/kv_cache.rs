//! The paged KV cache: keys and values of all sequences, in pages of a fixed number of tokens.
//!
//! Invariants:
//! - all tensors of one cache carry its generation: after [`KvCache::recreate`], a graph that was captured with the older
//!   tensors is refused at replay (law L12);
//! - which sequence owns which page is the business of [`PagePool`](super::PagePool), not of this file.

use bcg_runtime::{DType, Device, Freeze, Generation, Result, Tensor};

/// The keys and values of one layer.
#[derive(Debug, Clone, Freeze)]
pub struct LayerKv {
    /// `[P, S, Hkv, D]`.
    pub k: Tensor,
    /// `[P, S, Hkv, D]`.
    pub v: Tensor,
}

/// The keys and values of all layers.
///
/// # Example
/// ```
/// use bcg_models::state::KvCache;
/// use bcg_runtime::{DType, Device};
/// let cache = KvCache::new(&Device::host(), DType::Bf16, 2, [8, 16, 2, 64])?;
/// assert_eq!((cache.layers().len(), cache.num_tokens(), cache.size_bytes()), (2, 128, 131_072));
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<LayerKv>,
    shape: [usize; 4],
    dtype: DType,
    generation: Generation,
}

impl KvCache {
    /// Makes a zeroed cache of `num_layers` layers, each of `shape` `[P, S, Hkv, D]` for keys and again for values.
    ///
    /// # Errors
    /// The device's, above all when it has too little memory.
    pub fn new(device: &Device, dtype: DType, num_layers: usize, shape: [usize; 4]) -> Result<Self> {
        let generation = Generation::new("the KV cache");
        let layers = stamped(zeroed(device, dtype, num_layers, shape)?, &generation)?;
        Ok(Self { layers, shape, dtype, generation })
    }

    /// Replaces all tensors by zeroed ones; graphs captured with the older ones are refused from now on.
    ///
    /// # Errors
    /// As [`new`](Self::new); the older tensors then stay, and stay usable.
    pub fn recreate(&mut self, device: &Device) -> Result<()> {
        let layers = zeroed(device, self.dtype, self.layers.len(), self.shape)?;
        self.generation.advance();
        self.layers = stamped(layers, &self.generation)?;
        Ok(())
    }

    /// The layers, in the model's order.
    pub fn layers(&self) -> &[LayerKv] {
        &self.layers
    }

    /// Pages.
    pub fn num_pages(&self) -> usize {
        self.shape[0]
    }

    /// Tokens that a page holds.
    pub fn page_size(&self) -> usize {
        self.shape[1]
    }

    /// Tokens that the cache holds.
    pub fn num_tokens(&self) -> usize {
        self.num_pages() * self.page_size()
    }

    /// Bytes of all layers.
    pub fn size_bytes(&self) -> usize {
        2 * self.layers.len() * self.shape.iter().product::<usize>() * self.dtype.size_bytes()
    }
}

fn zeroed(device: &Device, dtype: DType, num_layers: usize, shape: [usize; 4]) -> Result<Vec<LayerKv>> {
    let zeros = || device.zeros(&shape, dtype);
    (0..num_layers).map(|_| Ok(LayerKv { k: zeros()?, v: zeros()? })).collect()
}

fn stamped(layers: Vec<LayerKv>, generation: &Generation) -> Result<Vec<LayerKv>> {
    let stamp = |layer: LayerKv| Ok(LayerKv { k: layer.k.stamped(generation)?, v: layer.v.stamped(generation)? });
    layers.into_iter().map(stamp).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bcg_runtime::{Error, Runner, RunnerOptions};

    #[test]
    fn tensors_of_a_recreated_cache_are_refused() {
        let device = Device::host();
        let mut runner = Runner::new(&device, RunnerOptions::default()).expect("a runner");
        let mut cache = KvCache::new(&device, DType::Bf16, 1, [2, 4, 1, 64]).expect("a cache");
        let old = cache.layers()[0].clone();
        cache.recreate(&device).expect("another cache");
        let new = cache.layers()[0].clone();
        assert!(matches!(runner.eager(&(), |cx| cx.fill_zero(&old.k)), Err(Error::Generation { .. })));
        runner.eager(&(), |cx| cx.fill_zero(&new.k)).expect("the new tensors are usable");
    }

    #[test]
    fn a_cache_that_cannot_be_recreated_stays_usable() {
        let device = Device::host();
        let mut runner = Runner::new(&device, RunnerOptions::default()).expect("a runner");
        let mut cache = KvCache::new(&device, DType::Bf16, 2, [2, 4, 1, 64]).expect("a cache");
        device.host_control().expect("a host device").fail_calls_named("cuMemAlloc", 1);
        assert!(matches!(cache.recreate(&device), Err(Error::OutOfMemory { .. })));
        runner.eager(&(), |cx| cx.fill_zero(&cache.layers()[0].k)).expect("the older tensors are usable");
    }
}
