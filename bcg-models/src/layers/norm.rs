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
    /// the stream. The branches of several ranks are partial sums, and are added up in the same kernel.
    ///
    /// # Errors
    /// Those of [`ops::rms_norm()`] and of [`ops::all_reduce_add_rms_norm()`].
    pub fn forward_branch(
        &self,
        cx: &mut OpStream,
        branch: Option<Tensor>,
        residual: Tensor,
    ) -> Result<(Tensor, Tensor)> {
        match branch {
            Some(branch) => ops::all_reduce_add_rms_norm(cx, &branch, &residual, &self.weight, self.eps),
            None => Ok((self.forward(cx, &residual)?, residual)),
        }
    }
}
