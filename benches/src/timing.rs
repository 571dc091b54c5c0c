//! Wall-clock samples: how often something is timed, and what is said about the times.

use std::time::{Duration, Instant};

use anyhow::Result;

/// Sorted times or ratios of one contestant.
#[derive(Clone, Debug, PartialEq)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Takes at least one value, in any order.
    ///
    /// # Panics
    /// Without any value.
    pub fn new(mut values: Vec<f64>) -> Self {
        assert!(!values.is_empty(), "at least one sample");
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    /// Returns the value that `percent` of the samples do not exceed (nearest rank).
    pub fn percentile(&self, percent: usize) -> f64 {
        let rank = (self.0.len() * percent).div_ceil(100).clamp(1, self.0.len());
        self.0[rank - 1]
    }

    /// Returns the mean.
    pub fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }

    /// Returns how many there are.
    #[expect(clippy::len_without_is_empty, reason = "there is at least one")]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns the middle value.
    pub fn median(&self) -> f64 {
        self.percentile(50)
    }

    /// Returns the ratios of values taken in the same round, as samples; order matters, so `pairs` are unsorted.
    pub fn ratios(pairs: &[(f64, f64)]) -> Self {
        Self::new(pairs.iter().map(|(a, b)| a / b).collect())
    }
}

/// How often something is timed: `rounds` times after the warm-ups, or fewer when that takes longer than `budget`.
#[derive(Clone, Copy, Debug)]
pub struct Rounds {
    /// Untimed rounds before the first timed one.
    pub warm_ups: usize,
    /// Timed rounds.
    pub rounds: usize,
    /// No further round begins once the timed ones took this long, but [`Rounds::LEAST`] are always made.
    pub budget: Duration,
}

impl Rounds {
    /// Timed rounds that are made whatever they cost.
    pub const LEAST: usize = 3;

    /// Runs `round` and returns what the timed rounds returned.
    ///
    /// # Errors
    /// The first of a round.
    pub fn run<R>(&self, mut round: impl FnMut() -> Result<R>) -> Result<Vec<R>> {
        let mut begun = Instant::now();
        for _ in 0..self.warm_ups {
            round()?;
            // A slow round warms up as well as several fast ones.
            if begun.elapsed() > self.budget / 10 {
                break;
            }
        }
        begun = Instant::now();
        let mut results = Vec::with_capacity(self.rounds);
        for done in 0..self.rounds {
            if done >= Self::LEAST && begun.elapsed() > self.budget {
                break;
            }
            results.push(round()?);
        }
        Ok(results)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let samples = Samples::new((1..=10).rev().map(f64::from).collect());
        assert_eq!([0, 10, 50, 90, 100].map(|percent| samples.percentile(percent)), [1.0, 1.0, 5.0, 9.0, 10.0]);
        assert_eq!(samples.mean(), 5.5);
        assert_eq!(Samples::new(vec![7.0]).median(), 7.0);
    }

    #[test]
    fn ratios_pair_samples_of_the_same_round() {
        let ratios = Samples::ratios(&[(2.0, 1.0), (9.0, 3.0), (1.0, 1.0)]);
        assert_eq!(ratios.median(), 2.0);
    }

    #[test]
    fn warm_ups_are_not_timed_and_a_budget_ends_the_rounds() {
        let mut calls = 0;
        let mut count = || {
            calls += 1;
            Ok(calls)
        };
        let budget = Duration::from_secs(60);
        assert_eq!(Rounds { warm_ups: 2, rounds: 3, budget }.run(&mut count).unwrap(), [3, 4, 5]);
        let spent = Rounds { warm_ups: 0, rounds: 9, budget: Duration::ZERO };
        assert_eq!(spent.run(&mut count).unwrap().len(), Rounds::LEAST);
    }
}
