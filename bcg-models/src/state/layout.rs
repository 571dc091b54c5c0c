//! What a sequence keeps between steps, as its model needs it.

use bcg_runtime::DType;

/// What the layers of a model keep of each token, and of each sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheLayout {
    /// Layers with keys and values.
    pub kv_layers: usize,
    /// Key heads and their dimensions.
    pub k: [usize; 2],
    /// Value heads and their dimensions.
    pub v: [usize; 2],
    /// Query heads that read them.
    pub q_heads: usize,
    /// The state-space layers, if there are any.
    pub states: Option<StateLayout>,
}

/// What state-space layers keep of a sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateLayout {
    /// Layers with a state.
    pub layers: usize,
    /// Channels of the convolution, and inputs that it looks back at.
    pub conv: [usize; 2],
    /// Heads H, their dimensions P, and the state size N.
    pub ssm: [usize; 3],
    /// The element type of the state: f32, or bf16 at half the bytes.
    pub ssm_dtype: DType,
}

/// How many layers of a stage keep something between steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CachedLayers {
    /// Layers with keys and values.
    pub kv: usize,
    /// State-space layers.
    pub states: usize,
}

impl CacheLayout {
    /// The layout of a stage of a pipeline: that of the model, with these layers only.
    #[must_use]
    pub fn with_layers(&self, layers: CachedLayers) -> Self {
        let states = self.states.clone().filter(|_| layers.states > 0);
        let states = states.map(|states| StateLayout { layers: layers.states, ..states });
        Self { kv_layers: layers.kv, states, ..self.clone() }
    }

    /// The bytes of keys and values that one token holds in all layers.
    pub fn kv_bytes_per_token(&self, dtype: DType) -> usize {
        self.kv_layers * (self.k[0] * self.k[1] + self.v[0] * self.v[1]) * dtype.size_bytes()
    }
}

impl StateLayout {
    /// The bytes of one slot in all layers.
    pub fn bytes_per_slot(&self, dtype: DType) -> usize {
        let bytes = |shape: &[usize], dtype: DType| shape.iter().product::<usize>() * dtype.size_bytes();
        self.layers * (bytes(&self.conv, dtype) + bytes(&self.ssm, self.ssm_dtype))
    }
}
