//! The MLPs: gated, and with a squared ReLU.

use bcg_kernels as ops;
use bcg_runtime::{OpStream, Result, Tensor};

use super::Linear;
use crate::config::{Fields, ModelConfig};
use crate::weights::{Section, Weights};

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

    /// Takes the weights under `name`, of the width that the configuration has for every MLP.
    ///
    /// # Errors
    /// Those of [`Mlp::read_width`] and of [`Weights::take`].
    pub fn load(weights: &mut Weights<'_>, name: &str, config: &ModelConfig) -> crate::Result<Self> {
        Self::load_sized(weights, name, config.hidden_size, Self::read_width(&config.fields)?)
    }

    /// Takes `gate_proj` and `up_proj` of `inner` rows, as one matrix, and `down_proj` under `name`.
    ///
    /// # Errors
    /// Those of [`Weights::take`].
    pub fn load_sized(weights: &mut Weights<'_>, name: &str, hidden: usize, inner: usize) -> crate::Result<Self> {
        let channels: &[Section] = &[Section { units: inner, rows: 1 }];
        let gate_up = [(format!("{name}.gate_proj"), channels), (format!("{name}.up_proj"), channels)];
        Ok(Self {
            gate_up_proj: Linear::column_fused(weights, &gate_up, hidden)?,
            down_proj: Linear::row(weights, &format!("{name}.down_proj"), hidden, inner)?,
        })
    }

    /// `[T, C]` to partial sums, `[T, C]`.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn forward(&self, cx: &mut OpStream, x: &Tensor) -> Result<Tensor> {
        let gate_up = self.gate_up_proj.forward(cx, x)?; // [T, 2 I], of this rank's channels
        let gated = ops::silu_mul(cx, &gate_up)?; // [T, I]
        self.down_proj.forward(cx, &gated)
    }
}

/// `down(relu(up(x))²)`.
#[derive(Debug)]
pub struct Relu2Mlp {
    up_proj: Linear,
    down_proj: Linear,
}

impl Relu2Mlp {
    /// Reads the width of the MLP, `intermediate_size`, and refuses biases and another activation than the squared
    /// ReLU.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) names the field.
    pub fn read_width(fields: &Fields) -> crate::Result<usize> {
        fields.refuse_other("mlp_hidden_act", "relu2", "no other activation is implemented")?;
        fields.refuse_flag("mlp_bias", "biased projections are not implemented")?;
        fields.count("intermediate_size")
    }

    /// Takes `up_proj` and `down_proj` under `name`.
    ///
    /// # Errors
    /// Those of [`Relu2Mlp::read_width`] and of [`Weights::take`].
    pub fn load(weights: &mut Weights<'_>, name: &str, config: &ModelConfig) -> crate::Result<Self> {
        let (hidden, inner) = (config.hidden_size, Self::read_width(&config.fields)?);
        Ok(Self {
            up_proj: Linear::column(weights, &format!("{name}.up_proj"), inner, hidden)?,
            down_proj: Linear::row(weights, &format!("{name}.down_proj"), hidden, inner)?,
        })
    }

    /// `[T, C]` to partial sums, `[T, C]`.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn forward(&self, cx: &mut OpStream, x: &Tensor) -> Result<Tensor> {
        let up = self.up_proj.forward(cx, x)?; // [T, I], of this rank's channels
        let squared = ops::relu2(cx, &up)?; // [T, I]
        drop(up);
        self.down_proj.forward(cx, &squared)
    }
}
