//! A matrix without bias.

use bcg_kernels as ops;
use bcg_runtime::{DType, OpStream, Result, Tensor};

use crate::weights::{Part, Section, Split, Weights};

/// `y = x Wᵀ`, of which a rank may have a share.
///
/// A *column* linear has a share of the outputs on each rank, computed from the whole input. A *row* linear has a share
/// of the inputs, those that a column linear made on the same rank, and its outputs are partial sums: those of all ranks
/// are added up later, by the next norm.
#[derive(Debug, Clone)]
pub struct Linear {
    /// The matrix, `[N, K]`: a row for each output of this rank.
    pub weight: Tensor,
}

impl Linear {
    /// Takes `{name}.weight` of shape `[outputs, inputs]`, the same on every rank.
    ///
    /// # Errors
    /// Those of [`Weights::take`].
    pub fn load(weights: &mut Weights<'_>, name: &str, outputs: usize, inputs: usize) -> crate::Result<Self> {
        Ok(Self { weight: weights.take(&format!("{name}.weight"), &[outputs, inputs])? })
    }

    /// Takes several matrices that read the same input, `(name, outputs)`, as one, the same on every rank.
    ///
    /// # Errors
    /// Those of [`Weights::take_rows`].
    pub fn load_fused(weights: &mut Weights<'_>, parts: &[(String, usize)], inputs: usize) -> crate::Result<Self> {
        let parts: Vec<_> = parts.iter().map(|(name, rows)| (format!("{name}.weight"), [*rows, inputs])).collect();
        let parts: Vec<_> = parts.iter().map(|(name, shape)| Part::whole(name, shape)).collect();
        Ok(Self { weight: weights.take_rows(&parts)? })
    }

    /// Takes this rank's share of the outputs of `{name}.weight`, `[outputs, inputs]`.
    ///
    /// # Errors
    /// Those of [`Weights::take_rows`].
    pub fn column(weights: &mut Weights<'_>, name: &str, outputs: usize, inputs: usize) -> crate::Result<Self> {
        Self::column_fused(weights, &[(name.to_owned(), &[Section { units: outputs, rows: 1 }])], inputs)
    }

    /// Takes several matrices that read the same input as one. Each has sections of outputs, of which this rank takes its
    /// share.
    ///
    /// # Errors
    /// Those of [`Weights::take_rows`].
    pub fn column_fused(
        weights: &mut Weights<'_>,
        parts: &[(String, &[Section])],
        inputs: usize,
    ) -> crate::Result<Self> {
        let outputs = |sections: &[Section]| sections.iter().map(|section| section.units * section.rows).sum();
        let whole: Vec<(String, [usize; 2])> =
            parts.iter().map(|(name, sections)| (format!("{name}.weight"), [outputs(sections), inputs])).collect();
        let parts: Vec<_> = std::iter::zip(&whole, parts)
            .map(|((name, shape), (_, sections))| Part { name, shape, split: Split::Rows(sections) })
            .collect();
        Ok(Self { weight: weights.take_rows(&parts)? })
    }

    /// Takes this rank's share of the inputs of `{name}.weight`, `[outputs, inputs]`.
    ///
    /// # Errors
    /// Those of [`Weights::take_rows`].
    pub fn row(weights: &mut Weights<'_>, name: &str, outputs: usize, inputs: usize) -> crate::Result<Self> {
        let name = format!("{name}.weight");
        let part = Part { name: &name, shape: &[outputs, inputs], split: Split::Columns };
        Ok(Self { weight: weights.take_rows(&[part])? })
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
