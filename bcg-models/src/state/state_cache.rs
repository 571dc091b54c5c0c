//! The states of state-space layers: what a convolution and a scan hand from one step of a sequence to the next.
//!
//! Invariants:
//! - a step reads one slot of a sequence and writes its other one. So a forward changes nothing that it reads: one that
//!   is repeated, as a verified replay or a failed capture is, gives the same again;
//! - all tensors of one cache carry its generation: after [`StateCache::recreate`], a graph that was captured with the
//!   older tensors is refused at replay (law L12);
//! - which sequence owns which slots is the business of [`PagePool`](super::PagePool), not of this file.

use bcg_runtime::{DType, Device, Freeze, Generation, Result, Tensor};

use super::StateLayout;

/// The states of one layer.
#[derive(Debug, Clone, Freeze)]
pub struct LayerState {
    /// The last inputs of the convolution, `[slots, channels, K - 1]`, oldest first.
    pub conv: Tensor,
    /// The state of the scan, `[slots, H, P, N]`.
    pub ssm: Tensor,
    /// In the prefill role, the same layer's tensors in the decode role: of the convolution, then of the scan.
    pub far: Option<[Tensor; 2]>,
}

/// The states of all state-space layers.
///
/// # Example
/// ```
/// use bcg_models::state::{StateCache, StateLayout};
/// use bcg_runtime::{DType, Device};
/// let layout = StateLayout { layers: 2, conv: [96, 3], ssm: [4, 8, 16], ssm_dtype: DType::F32 };
/// let cache = StateCache::new(&Device::host(), DType::Bf16, Some(&layout), 6)?;
/// assert_eq!((cache.layers().len(), cache.size_bytes()), (2, 2 * 6 * (96 * 3 * 2 + 4 * 8 * 16 * 4)));
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct StateCache {
    layers: Vec<LayerState>,
    layout: Option<StateLayout>,
    slots: usize,
    dtype: DType,
    /// Other devices that reach them.
    with: Vec<Device>,
    generation: Generation,
}

impl StateCache {
    /// Makes zeroed states of `slots` slots; none if the model has no such layer.
    ///
    /// # Errors
    /// The device's, above all when it has too little memory.
    pub fn new(device: &Device, dtype: DType, layout: Option<&StateLayout>, slots: usize) -> Result<Self> {
        Self::new_shared(device, &[], dtype, layout, slots)
    }

    /// As [`new`](Self::new), in memory that the devices `with` reach as well.
    ///
    /// # Errors
    /// As [`new`](Self::new); those of [`Device::zeros_shared`].
    pub fn new_shared(
        device: &Device,
        with: &[Device],
        dtype: DType,
        layout: Option<&StateLayout>,
        slots: usize,
    ) -> Result<Self> {
        let generation = Generation::new("the state cache");
        let layers = stamped(zeroed(device, with, dtype, layout, slots)?, &generation)?;
        Ok(Self { layers, layout: layout.cloned(), slots, dtype, with: with.to_vec(), generation })
    }

    /// Lets the step that ends a prompt push the state of its sequence to `far` as well.
    ///
    /// # Errors
    /// [`Error::Shape`](bcg_runtime::Error::Shape) if the two are not of one layout.
    pub fn pushing_to(mut self, far: &Self) -> Result<Self> {
        if self.layout != far.layout {
            let [own, far] = [&self, far].map(|states| format!("{:?}", states.layout));
            return Err(bcg_runtime::Error::shape("StateCache::pushing_to", own, far));
        }
        for (layer, far) in self.layers.iter_mut().zip(&far.layers) {
            layer.far = Some([far.conv.clone(), far.ssm.clone()]);
        }
        Ok(self)
    }

    /// Replaces all tensors by zeroed ones; graphs captured with the older ones are refused from now on.
    ///
    /// # Errors
    /// As [`new`](Self::new); the older tensors then stay, and stay usable.
    pub fn recreate(&mut self, device: &Device) -> Result<()> {
        let mut layers = zeroed(device, &self.with, self.dtype, self.layout.as_ref(), self.slots)?;
        self.generation.advance();
        for (layer, before) in layers.iter_mut().zip(&mut self.layers) {
            layer.far = before.far.take();
        }
        self.layers = stamped(layers, &self.generation)?;
        Ok(())
    }

    /// The state-space layers, in the model's order.
    pub fn layers(&self) -> &[LayerState] {
        &self.layers
    }

    /// Bytes of all layers.
    pub fn size_bytes(&self) -> usize {
        self.slots * self.layout.as_ref().map_or(0, |layout| layout.bytes_per_slot(self.dtype))
    }
}

fn zeroed(
    device: &Device,
    with: &[Device],
    dtype: DType,
    layout: Option<&StateLayout>,
    slots: usize,
) -> Result<Vec<LayerState>> {
    let Some(StateLayout { layers, conv, ssm, ssm_dtype }) = layout else { return Ok(Vec::new()) };
    let layer = || {
        Ok(LayerState {
            conv: super::zeros(device, with, &[slots, conv[0], conv[1]], dtype)?,
            ssm: super::zeros(device, with, &[slots, ssm[0], ssm[1], ssm[2]], *ssm_dtype)?,
            far: None,
        })
    };
    (0..*layers).map(|_| layer()).collect()
}

fn stamped(layers: Vec<LayerState>, generation: &Generation) -> Result<Vec<LayerState>> {
    let stamp = |layer: LayerState| {
        Ok(LayerState { conv: layer.conv.stamped(generation)?, ssm: layer.ssm.stamped(generation)?, ..layer })
    };
    layers.into_iter().map(stamp).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bcg_runtime::{Error, Runner, RunnerOptions};

    #[test]
    fn states_of_a_recreated_cache_are_refused() {
        let device = Device::host();
        let mut runner = Runner::new(&device, RunnerOptions::default()).expect("a runner");
        let layout = StateLayout { layers: 1, conv: [8, 3], ssm: [2, 4, 4], ssm_dtype: DType::F32 };
        let mut cache = StateCache::new(&device, DType::Bf16, Some(&layout), 2).expect("states");
        let old = cache.layers()[0].clone();
        cache.recreate(&device).expect("other states");
        assert!(matches!(runner.eager(&(), |cx| cx.fill_zero(&old.ssm)), Err(Error::Generation { .. })));
        runner.eager(&(), |cx| cx.fill_zero(&cache.layers()[0].ssm)).expect("the new tensors are usable");
    }
}
