//! Which sizes are captured, and whether a forward replays or runs eagerly: one predicate, closed reasons.

use std::fmt;

use crate::{Error, Result};

/// Sizes up to this one may pad by more than an eighth.
const EXACT_BELOW: usize = 16;

/// The capture sizes, in rising order.
///
/// # Example
/// ```
/// use bcg_runtime::Ladder;
/// let ladder = Ladder::relative(64, 1)?;
/// assert_eq!(ladder.sizes(), [1, 2, 4, 8, 12, 16, 18, 20, 22, 24, 26, 28, 30, 32, 36, 40, 44, 48, 52, 56, 60, 64]);
/// assert_eq!(ladder.size_for(33), Some(36));
/// assert_eq!(ladder.size_for(65), None);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ladder {
    sizes: Vec<usize>,
}

impl Ladder {
    /// Makes sizes up to `max` whose steps are an eighth of the size, so that padding stays at or below 12.5 % above 16
    /// rows. Sizes are multiples of `alignment`, which the model's layers ask for; `max` is rounded down to one.
    ///
    /// # Errors
    /// [`Error::Option`] if no size is left.
    pub fn relative(max: usize, alignment: usize) -> Result<Self> {
        let alignment = alignment.max(1);
        let max = max / alignment * alignment;
        let mut sizes = Vec::new();
        for small in [1, 2, 4, 8, 12] {
            sizes.push(small);
        }
        let mut size = EXACT_BELOW;
        while size < max {
            sizes.push(size);
            size = size.saturating_add(1 << (size / 8).ilog2());
        }
        sizes.push(max);
        let aligned = sizes.into_iter().filter_map(|size| size.checked_next_multiple_of(alignment));
        Self::explicit(aligned.filter(|&size| size <= max).collect())
    }

    /// Makes a ladder of every size up to `max`, so that nothing is padded: for a cache that captures lazily.
    ///
    /// # Errors
    /// [`Error::Option`] if `max` is 0.
    ///
    /// # Example
    /// ```
    /// assert_eq!(bcg_runtime::Ladder::exact(64)?.size_for(33), Some(33));
    /// # Ok::<(), bcg_runtime::Error>(())
    /// ```
    pub fn exact(max: usize) -> Result<Self> {
        Self::explicit((1..=max).collect())
    }

    /// Makes a ladder of the given sizes, in any order.
    ///
    /// # Errors
    /// [`Error::Option`] if there are none, or one is 0.
    pub fn explicit(mut sizes: Vec<usize>) -> Result<Self> {
        sizes.sort_unstable();
        sizes.dedup();
        if sizes.last().is_none_or(|&largest| largest == 0) {
            let message = "graphs are asked for but no capture size is left; give at least one size above 0".to_owned();
            return Err(Error::Option { option: "capture sizes", message });
        }
        if sizes[0] == 0 {
            let message = "0 is not a capture size; remove it".to_owned();
            return Err(Error::Option { option: "capture sizes", message });
        }
        Ok(Self { sizes })
    }

    /// Drops the sizes above `max`, such as the size of a prefill chunk.
    ///
    /// # Errors
    /// [`Error::Option`] if no size is left.
    pub fn clamped(&self, max: usize) -> Result<Self> {
        Self::explicit(self.sizes.iter().copied().filter(|&size| size <= max).collect())
    }

    /// Returns the sizes, in rising order.
    pub fn sizes(&self) -> &[usize] {
        &self.sizes
    }

    /// Returns the largest size.
    pub fn largest(&self) -> usize {
        self.sizes[self.sizes.len() - 1]
    }

    /// Returns the smallest size that holds `rows`.
    pub fn size_for(&self, rows: usize) -> Option<usize> {
        self.sizes.get(self.sizes.partition_point(|&size| size < rows)).copied()
    }
}

/// Why a forward runs eagerly although graphs are there. Closed: a metric counts each of them.
///
/// # Example
/// ```
/// use bcg_runtime::EagerReason;
/// let names: Vec<_> = EagerReason::ALL.iter().map(|reason| reason.name()).collect();
/// assert_eq!(names[2], "above_largest");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EagerReason {
    /// Graphs are switched off.
    Disabled,
    /// The batch has no rows.
    NoRows,
    /// The batch has more rows than the largest capture size.
    AboveLargest,
    /// The next capture size is more than twice the batch.
    TooMuchPadding,
    /// That size was not captured, and is not captured while serving.
    NotCaptured,
    /// That size failed to capture before.
    CaptureFailed,
    /// The graph of that size takes more memory than all graphs may.
    OverBudget,
}

impl EagerReason {
    /// All reasons, for metrics.
    pub const ALL: [Self; 7] = [
        Self::Disabled,
        Self::NoRows,
        Self::AboveLargest,
        Self::TooMuchPadding,
        Self::NotCaptured,
        Self::CaptureFailed,
        Self::OverBudget,
    ];

    /// Returns the reason's name in metrics, such as `above_largest`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Disabled => "disabled",
            Self::NoRows => "no_rows",
            Self::AboveLargest => "above_largest",
            Self::TooMuchPadding => "too_much_padding",
            Self::NotCaptured => "not_captured",
            Self::CaptureFailed => "capture_failed",
            Self::OverBudget => "over_budget",
        }
    }
}

impl fmt::Display for EagerReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What to do with a forward; see [`GraphCache`](crate::GraphCache) for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Replay the graph of this size.
    Replay {
        /// The capture size.
        size: usize,
    },
    /// Capture this size with this batch, which is also its run.
    Capture {
        /// The capture size.
        size: usize,
    },
    /// Run eagerly.
    Eager(EagerReason),
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn padding_is_at_most_an_eighth_above_sixteen_rows(max in 17usize..9000, rows in 17usize..9000) {
            let ladder = Ladder::relative(max, 1).unwrap();
            if rows <= max {
                let size = ladder.size_for(rows).unwrap();
                assert!((size - rows) * 8 <= rows, "{rows} rows are padded to {size}");
            } else {
                assert_eq!(ladder.size_for(rows), None);
            }
        }

        #[test]
        fn sizes_are_aligned_and_end_at_the_aligned_maximum(max in 1usize..5000, alignment in 1usize..65) {
            match Ladder::relative(max, alignment) {
                Ok(ladder) => {
                    assert!(ladder.sizes().iter().all(|size| size % alignment == 0));
                    assert_eq!(ladder.largest(), max / alignment * alignment);
                }
                Err(_) => assert!(max < alignment),
            }
        }
    }

    #[test]
    fn an_empty_ladder_is_an_error() {
        for refused in [
            Ladder::explicit(vec![]),
            Ladder::explicit(vec![0]),
            Ladder::explicit(vec![0, 4]),
            Ladder::relative(0, 1),
            Ladder::exact(0),
        ] {
            assert!(matches!(refused, Err(Error::Option { .. })), "{refused:?}");
        }
        assert!(Ladder::explicit(vec![64]).unwrap().clamped(32).is_err());
    }

    #[test]
    fn sizes_up_to_the_largest_number_there_is_do_not_overflow() {
        let largest = |alignment| Ladder::relative(usize::MAX, alignment).unwrap().largest();
        assert_eq!([1, 64, usize::MAX].map(largest), [usize::MAX, usize::MAX - 63, usize::MAX]);
    }

    #[test]
    fn clamping_drops_the_sizes_above_the_chunk() {
        assert_eq!(Ladder::explicit(vec![8, 64, 16]).unwrap().clamped(32).unwrap().sizes(), [8, 16]);
    }
}
