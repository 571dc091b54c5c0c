//! A rank's share of a model.

/// Which share of each divided dimension a rank has.
///
/// # Example
/// ```
/// use bcg_models::weights::Shard;
/// let shard = Shard { rank: 1, num_ranks: 4 };
/// assert_eq!(shard.range(32), 8..16);
/// assert_eq!(Shard::WHOLE.range(32), 0..32);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shard {
    /// The rank, below `num_ranks`.
    pub rank: usize,
    /// The ranks that a dimension is divided among; at least 1.
    pub num_ranks: usize,
}

impl Shard {
    /// The share of a model that is not divided: all of it.
    pub const WHOLE: Self = Self { rank: 0, num_ranks: 1 };

    /// Returns the part of a dimension of `len` that is this rank's; the number of ranks divides `len`.
    pub fn range(self, len: usize) -> std::ops::Range<usize> {
        let part = len / self.num_ranks;
        self.rank * part..(self.rank + 1) * part
    }
}
