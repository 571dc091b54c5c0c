//! The paged KV cache: keys and values of all sequences, in pages of a fixed number of tokens.
//!
//! Invariants:
//! - all tensors of one cache carry its generation: after [`KvCache::recreate`], a graph that was captured with the
//!   older tensors is refused at replay (law L12);
//! - which sequence owns which page is the business of [`PagePool`](super::PagePool), not of this file.

use bcg_runtime::{DType, Device, Freeze, Generation, Result, Tensor};

use super::CacheLayout;

/// The keys and values of one layer.
#[derive(Debug, Clone, Freeze)]
pub struct LayerKv {
    /// Keys, `[P, S, Hkv, D]`; in latent attention the latents, `[P, S, 1, L]`.
    pub k: Tensor,
    /// Values, `[P, S, Hkv, D]`; in latent attention the rotated keys, `[P, S, 1, R]`.
    pub v: Tensor,
    /// In the prefill role, the same layer's tensors in the decode role: keys, then values.
    pub far: Option<[Tensor; 2]>,
}

/// The keys and values of all layers.
///
/// # Example
/// ```
/// use bcg_models::state::{CacheLayout, KvCache};
/// use bcg_runtime::{DType, Device};
/// let layout = CacheLayout { kv_layers: 2, k: [2, 64], v: [2, 64], q_heads: 4, states: None };
/// let cache = KvCache::new(&Device::host(), DType::Bf16, &layout, [8, 16])?;
/// assert_eq!((cache.layers().len(), cache.num_tokens(), cache.size_bytes()), (2, 128, 131_072));
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<LayerKv>,
    layout: CacheLayout,
    pages: [usize; 2],
    dtype: DType,
    /// Other devices that reach it.
    with: Vec<Device>,
    generation: Generation,
}

impl KvCache {
    /// Makes a zeroed cache of `pages`, `[P, S]`, for a model's layers.
    ///
    /// # Errors
    /// The device's, above all when it has too little memory.
    pub fn new(device: &Device, dtype: DType, layout: &CacheLayout, pages: [usize; 2]) -> Result<Self> {
        Self::new_shared(device, &[], dtype, layout, pages)
    }

    /// As [`new`](Self::new), in memory that the devices `with` reach as well.
    ///
    /// # Errors
    /// As [`new`](Self::new); those of [`Device::zeros_shared`].
    pub fn new_shared(
        device: &Device,
        with: &[Device],
        dtype: DType,
        layout: &CacheLayout,
        pages: [usize; 2],
    ) -> Result<Self> {
        let generation = Generation::new("the KV cache");
        let layers = stamped(zeroed(device, with, dtype, layout, pages)?, &generation)?;
        Ok(Self { layers, layout: layout.clone(), pages, dtype, with: with.to_vec(), generation })
    }

    /// Lets steps push what they write here to `far` as well, whose pages are as large.
    ///
    /// # Errors
    /// [`Error::Shape`](bcg_runtime::Error::Shape) if the two are not of one layout.
    pub fn pushing_to(mut self, far: &Self) -> Result<Self> {
        let of = |cache: &Self| format!("{:?}, {} in pages of {} tokens", cache.layout, cache.dtype, cache.page_size());
        if of(&self) != of(far) {
            return Err(bcg_runtime::Error::shape("KvCache::pushing_to", of(&self), of(far)));
        }
        for (layer, far) in self.layers.iter_mut().zip(&far.layers) {
            layer.far = Some([far.k.clone(), far.v.clone()]);
        }
        Ok(self)
    }

    /// Replaces all tensors by zeroed ones; graphs captured with the older ones are refused from now on.
    ///
    /// # Errors
    /// As [`new`](Self::new); the older tensors then stay, and stay usable.
    pub fn recreate(&mut self, device: &Device) -> Result<()> {
        let mut layers = zeroed(device, &self.with, self.dtype, &self.layout, self.pages)?;
        self.generation.advance();
        for (layer, before) in layers.iter_mut().zip(&mut self.layers) {
            layer.far = before.far.take();
        }
        self.layers = stamped(layers, &self.generation)?;
        Ok(())
    }

    /// The layers, in the model's order.
    pub fn layers(&self) -> &[LayerKv] {
        &self.layers
    }

    /// The number of pages.
    pub fn num_pages(&self) -> usize {
        self.pages[0]
    }

    /// Tokens that a page holds.
    pub fn page_size(&self) -> usize {
        self.pages[1]
    }

    /// Tokens that the cache holds.
    pub fn num_tokens(&self) -> usize {
        self.num_pages() * self.page_size()
    }

    /// Bytes of all layers.
    pub fn size_bytes(&self) -> usize {
        self.num_tokens() * self.layout.kv_bytes_per_token(self.dtype)
    }
}

fn zeroed(
    device: &Device,
    with: &[Device],
    dtype: DType,
    layout: &CacheLayout,
    [pages, size]: [usize; 2],
) -> Result<Vec<LayerKv>> {
    let zeros = |[heads, dim]: [usize; 2]| super::zeros(device, with, &[pages, size, heads, dim], dtype);
    (0..layout.kv_layers).map(|_| Ok(LayerKv { k: zeros(layout.k)?, v: zeros(layout.v)?, far: None })).collect()
}

fn stamped(layers: Vec<LayerKv>, generation: &Generation) -> Result<Vec<LayerKv>> {
    let stamp =
        |layer: LayerKv| Ok(LayerKv { k: layer.k.stamped(generation)?, v: layer.v.stamped(generation)?, ..layer });
    layers.into_iter().map(stamp).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bcg_runtime::{Error, Runner, RunnerOptions};

    const LAYOUT: CacheLayout = CacheLayout { kv_layers: 2, k: [1, 64], v: [1, 32], q_heads: 1, states: None };

    #[test]
    fn tensors_of_a_recreated_cache_are_refused() {
        let device = Device::host();
        let mut runner = Runner::new(&device, RunnerOptions::default()).expect("a runner");
        let mut cache = KvCache::new(&device, DType::Bf16, &LAYOUT, [2, 4]).expect("a cache");
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
        let mut cache = KvCache::new(&device, DType::Bf16, &LAYOUT, [2, 4]).expect("a cache");
        device.host_control().expect("a host device").fail_calls_named("cuMemAlloc", 1);
        assert!(matches!(cache.recreate(&device), Err(Error::OutOfMemory { .. })));
        runner.eager(&(), |cx| cx.fill_zero(&cache.layers()[0].k)).expect("the older tensors are usable");
    }
}
