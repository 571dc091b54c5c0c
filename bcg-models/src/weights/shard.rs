//! A rank's share of a model: which part of each tensor, and of what is kept between steps, a rank has.
//!
//! Everything is divided in two ways. The rows of a matrix, which give its outputs, are divided among the ranks for what
//! each rank computes by itself: heads, channels of an MLP, tokens of the vocabulary. The columns of the matrix that
//! reads them are divided alike, and its outputs are partial sums. What follows from both, the next norm and all that
//! reads the residual stream, every rank has whole.

use std::ops::Range;

use bcg_runtime::RANKS_MAX;

use crate::config::ModelConfig;
use crate::error::Result;

/// Which share of each divided dimension a rank has.
///
/// # Example
/// ```
/// use bcg_models::weights::Shard;
/// let shard = Shard::new(1, 4);
/// assert_eq!(shard.range(32), 8..16);
/// assert_eq!(shard.range(2), 0..1, "ranks 0 and 1 both keep the first of two key-value heads");
/// assert_eq!(Shard::WHOLE.range(32), 0..32);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shard {
    /// The rank, below `num_ranks`.
    pub rank: usize,
    /// The ranks that a dimension is divided among; at least 1.
    pub num_ranks: usize,
    /// How experts are divided.
    pub experts: Experts,
}

/// How the ranks divide the experts of a mixture. Shared experts, which every token has, are divided by channels always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Experts {
    /// Each rank has a share of the channels of every expert.
    #[default]
    ByChannels,
    /// Each rank has a share of the experts, those whole; rows come to them so.
    Whole(MoeA2a),
}

/// How rows come to experts that other ranks own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum MoeA2a {
    /// Not at all: every rank has all rows, and computes what its own experts make of them.
    #[default]
    None,
    /// Each rank chooses experts for a share of the rows, and pushes each of these into the planes of the ranks that own its
    /// experts; what they make of it comes back the same way. All of it is captured.
    Push,
    /// As [`MoeA2a::Push`], but in messages of one size for all ranks, whose exchange is an eager break: for an exchange through
    /// a library.
    Break,
}

impl Experts {
    /// Refuses whole experts for a model that has none.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) names the architecture.
    pub fn refuse_whole(self, config: &ModelConfig) -> Result<()> {
        match self {
            Self::ByChannels => Ok(()),
            Self::Whole(_) => {
                let remedy = "give `ep` 1: no rank can have experts of its own";
                let expected = "a mixture of experts";
                Err(config.fields.error("architectures", expected, format!("{:?}", config.architecture), remedy))
            }
        }
    }
}

impl Shard {
    /// The share of a model that is not divided: all of it.
    pub const WHOLE: Self = Self::new(0, 1);

    /// The share of `rank` of so many, with experts divided by channels.
    pub const fn new(rank: usize, num_ranks: usize) -> Self {
        Self { rank, num_ranks, experts: Experts::ByChannels }
    }

    /// Tells whether all ranks can have equally many of `units` things, or, if there are fewer things than ranks, each
    /// thing can be kept by equally many ranks.
    pub fn divides(self, units: usize) -> bool {
        units > 0 && (units.is_multiple_of(self.num_ranks) || self.num_ranks.is_multiple_of(units))
    }

    /// Returns which of `units` equal things this rank keeps: its share of them, or, if there are fewer things than
    /// ranks, one, which its neighbours keep too. The shard [divides](Self::divides) them.
    pub fn range(self, units: usize) -> Range<usize> {
        let Self { rank, num_ranks, .. } = self.among(units);
        let part = units / num_ranks;
        rank * part..(rank + 1) * part
    }

    /// Returns how many of `units` things each rank keeps, as [`Shard::range`] has it.
    pub fn share(self, units: usize) -> usize {
        self.range(units).len()
    }

    /// The shard among the groups of ranks that keep the same of `units` things.
    pub(super) fn among(self, units: usize) -> Self {
        let num_ranks = self.num_ranks.min(units);
        Self { rank: self.rank * num_ranks / self.num_ranks, num_ranks, ..self }
    }
}

/// A count of a configuration that the ranks divide among themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Divided {
    /// The field of `config.json`.
    pub field: &'static str,
    /// The count that stands there.
    pub count: usize,
    /// Whether several ranks may keep the same one where there are fewer than ranks.
    pub is_shared: bool,
}

impl Divided {
    /// A count of which each rank has an equal share of its own.
    pub fn new(field: &'static str, count: usize) -> Self {
        Self { field, count, is_shared: false }
    }

    fn works_with(&self, num_ranks: usize) -> bool {
        let is_even = self.count.is_multiple_of(num_ranks);
        is_even || (self.is_shared && Shard::new(0, num_ranks).divides(self.count))
    }
}

/// Refuses a number of ranks that does not divide all counts.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) names the first field that does not fit, and the numbers of ranks that work.
pub(crate) fn check(config: &ModelConfig, divided: &[Divided], num_ranks: usize) -> Result<()> {
    let Some(refused) = divided.iter().find(|divided| num_ranks == 0 || !divided.works_with(num_ranks)) else {
        return Ok(());
    };
    let works = |num_ranks: &usize| divided.iter().all(|divided| divided.works_with(*num_ranks));
    let works: Vec<String> = (1..=RANKS_MAX).filter(works).map(|num_ranks| num_ranks.to_string()).collect();
    let expected = match refused.is_shared {
        true => format!("a multiple or a divisor of {num_ranks} ranks"),
        false => format!("a multiple of {num_ranks} ranks"),
    };
    let remedy = format!("numbers of ranks that work: {}", works.join(", "));
    Err(config.fields.error(refused.field, expected, refused.count, &remedy))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_equal_and_few_things_are_kept_by_neighbours() {
        let ranges = |num_ranks, units| -> Vec<_> {
            (0..num_ranks).map(|rank| Shard::new(rank, num_ranks).range(units)).collect()
        };
        assert_eq!(ranges(4, 8), [0..2, 2..4, 4..6, 6..8]);
        assert_eq!(ranges(4, 2), [0..1, 0..1, 1..2, 1..2]);
        assert_eq!(ranges(8, 4), [0..1, 0..1, 1..2, 1..2, 2..3, 2..3, 3..4, 3..4]);
        assert_eq!(ranges(2, 1), [0..1, 0..1]);
        let shard = Shard::new(0, 4);
        assert_eq!(
            [0, 1, 2, 3, 4, 6, 8].map(|units| shard.divides(units)),
            [false, true, true, false, true, false, true]
        );
    }
}
