//! The gated MLP.

use bcg_runtime::{CaptureStream, Result, Tensor};

use super::Linear;
use crate::config::Fields;
use crate::ops;
use crate::weights::Weights;

/// `down(silu(gate(x)) * up(x))`.
#[derive(Debug)]
pub struct Mlp {
    gate_up_proj: Linear,
    down_proj: Linear,
}

impl Mlp {
    /// Reads the width of the MLP, `intermediate_size`, and refuses another activation than SiLU.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) names the field.
    pub fn read_width(fields: &Fields) -> crate::Result<usize> {
        fields.refuse_other("hidden_act", "silu", "no other activation is implemented")?;
        fields.count("intermediate_size")
    }

    /// Takes `gate_proj` and `up_proj` of `inner` rows, as one matrix, and `down_proj` under `name`.
    ///
    /// # Errors
    /// Those of [`Weights::take`].
    pub fn load(weights: &mut Weights<'_>, name: &str, hidden: usize, inner: usize) -> crate::Result<Self> {
        let gate_up = [(format!("{name}.gate_proj"), inner), (format!("{name}.up_proj"), inner)];
        Ok(Self {
            gate_up_proj: Linear::load_fused(weights, &gate_up, hidden)?,
            down_proj: Linear::load(weights, &format!("{name}.down_proj"), hidden, inner)?,
        })
    }

    /// `[T, C]` to `[T, C]`.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn forward(&self, cx: &mut CaptureStream, x: &Tensor) -> Result<Tensor> {
        let gate_up = self.gate_up_proj.forward(cx, x)?; // [T, 2 I]
        let gated = ops::silu_mul(cx, &gate_up)?; // [T, I]
        self.down_proj.forward(cx, &gated)
    }
}
