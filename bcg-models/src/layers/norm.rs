//! Root-mean-square normalisation.

use bcg_kernels as ops;
use bcg_runtime::{OpStream, Result, Tensor};

use crate::weights::Weights;

/// `y = x / rms(x) * weight`.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    /// The factor of each channel, `[C]`.
    pub weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    /// Takes `{name}.weight` of `width` elements.
    ///
    /// # Errors
    /// Those of [`Weights::take`].
    pub fn load(weights: &mut Weights<'_>, name: &str, width: usize, eps: f32) -> crate::Result<Self> {
        Ok(Self { weight: weights.take(&format!("{name}.weight"), &[width])?, eps })
    }

    /// Normalises `x`, `[T, C]`.
    ///
    /// # Errors
    /// Those of [`ops::rms_norm()`].
    pub fn forward(&self, cx: &mut OpStream, x: &Tensor) -> Result<Tensor> {
        ops::rms_norm(cx, x, &self.weight, self.eps)
    }

    /// Adds the branch of the layer before, if there is one, to the residual stream; returns the normalised stream, and
    /// the stream.
    ///
    /// # Errors
    /// As [`forward_add`](Self::forward_add).
    pub fn forward_branch(
        &self,
        cx: &mut OpStream,
        branch: Option<Tensor>,
        residual: Tensor,
    ) -> Result<(Tensor, Tensor)> {
        match branch {
            Some(branch) => self.forward_add(cx, &branch, &residual),
            None => Ok((self.forward(cx, &residual)?, residual)),
        }
    }

    /// Adds `x` to `residual` and normalises the sum; returns the normalised sum, and the sum.
    ///
    /// # Errors
    /// Those of [`ops::add_rms_norm()`].
    pub fn forward_add(&self, cx: &mut OpStream, x: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        ops::add_rms_norm(cx, x, residual, &self.weight, self.eps)
    }
}
