//! A matrix without bias.

use bcg_kernels as ops;
use bcg_runtime::{DType, OpStream, Result, Tensor};

use crate::weights::Weights;

/// `y = x Wᵀ`.
#[derive(Debug, Clone)]
pub struct Linear {
    /// The matrix, `[N, K]`: a row for each output.
    pub weight: Tensor,
}

impl Linear {
    /// Takes `{name}.weight` of shape `[outputs, inputs]`.
    ///
    /// # Errors
    /// Those of [`Weights::take`].
    pub fn load(weights: &mut Weights<'_>, name: &str, outputs: usize, inputs: usize) -> crate::Result<Self> {
        Ok(Self { weight: weights.take(&format!("{name}.weight"), &[outputs, inputs])? })
    }

    /// Takes several matrices that read the same input, `(name, outputs)`, as one.
    ///
    /// # Errors
    /// Those of [`Weights::take_rows`].
    pub fn load_fused(weights: &mut Weights<'_>, parts: &[(String, usize)], inputs: usize) -> crate::Result<Self> {
        let parts: Vec<_> = parts.iter().map(|(name, rows)| (format!("{name}.weight"), [*rows, inputs])).collect();
        let parts: Vec<_> = parts.iter().map(|(name, shape)| (name.as_str(), shape.as_slice())).collect();
        Ok(Self { weight: weights.take_rows(&parts)? })
    }

    /// `[T, K]` to `[T, N]`, in the dtype of `x`.
    ///
    /// # Errors
    /// Those of [`ops::linear()`].
    pub fn forward(&self, cx: &mut OpStream, x: &Tensor) -> Result<Tensor> {
        ops::linear(cx, x, &self.weight)
    }

    /// `[T, K]` to `[T, N]` in f32.
    ///
    /// # Errors
    /// Those of [`ops::linear_to`].
    pub fn forward_f32(&self, cx: &mut OpStream, x: &Tensor) -> Result<Tensor> {
        ops::linear_to(cx, x, &self.weight, DType::F32)
    }
}
