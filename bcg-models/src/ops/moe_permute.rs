//! Assignments of tokens to experts, in the order of the experts.

use bcg_runtime::{DType, Result, Tensor};

use super::check::Check;

/// Where the rows of each expert lie once the chosen `(token, k)` pairs are ordered by expert.
///
/// A place is an index in that order; pairs of one expert keep the order of `t K + k`. Padded rows have no place.
#[derive(Clone, Debug)]
pub struct ExpertPlan {
    /// `[E + 1]` i32: expert e has the places `offsets[e]..offsets[e + 1]`; the last one is the number of places in use.
    pub offsets: Tensor,
    /// `[T K]` i32: place to `t K + k`; -1 behind the last place in use.
    pub rows: Tensor,
    /// `[T, K]` i32: the place of each pair; -1 in padded rows.
    pub places: Tensor,
}

impl ExpertPlan {
    /// Refuses a plan whose tensors do not fit together, or that is not of `num_experts`.
    pub(crate) fn check(&self, check: Check, num_experts: usize) -> Result<()> {
        check.rank("places", &self.places, &["T", "K"])?;
        check.dense("places", &self.places, self.places.shape(), DType::I32)?;
        check.dense("rows", &self.rows, &[self.places.num_elements()], DType::I32)?;
        check.dense("offsets", &self.offsets, &[num_experts + 1], DType::I32)
    }
}
