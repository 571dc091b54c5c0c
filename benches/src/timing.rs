//! Wall-clock samples, and rounds that take turns.
//!
//! Contestants of one comparison run in turns (A B A B …), so that clocks, caches and neighbours are the same for all.

use std::time::Instant;

use anyhow::Result;

/// Sorted times of one contestant, in microseconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Takes at least one time, in any order.
    ///
    /// # Panics
    /// Without any time.
    pub fn new(mut us: Vec<f64>) -> Self {
        assert!(!us.is_empty(), "at least one sample");
        us.sort_by(f64::total_cmp);
        Self(us)
    }

    /// Returns the time that `percent` of the samples do not exceed (nearest rank).
    pub fn percentile(&self, percent: usize) -> f64 {
        let rank = (self.0.len() * percent).div_ceil(100).clamp(1, self.0.len());
        self.0[rank - 1]
    }

    /// Returns the middle time.
    pub fn median(&self) -> f64 {
        self.percentile(50)
    }

    /// Returns the ratios of samples taken in the same round, as samples; order matters, so `pairs` are unsorted times.
    pub fn ratios(pairs: &[(f64, f64)]) -> Self {
        Self::new(pairs.iter().map(|(a, b)| a / b).collect())
    }
}

/// One contestant: work whose host time counts, and a wait that does not.
pub trait Contestant {
    /// Enqueues one forward. Its host time is the sample.
    ///
    /// # Errors
    /// The runtime's or the driver's.
    fn enqueue(&mut self) -> Result<()>;

    /// Waits until it has run, off the clock, so that no queue fills up.
    ///
    /// # Errors
    /// The runtime's or the driver's.
    fn wait(&mut self) -> Result<()>;
}

/// Runs all contestants in turns and returns their host times in microseconds, round by round.
///
/// Every other round goes through them backwards, so that none always follows the same one.
///
/// # Errors
/// The first of a contestant.
pub fn in_turns(contestants: &mut [&mut dyn Contestant], warm_ups: usize, rounds: usize) -> Result<Vec<Vec<f64>>> {
    let mut times = vec![Vec::with_capacity(rounds); contestants.len()];
    for round in 0..warm_ups + rounds {
        for turn in 0..contestants.len() {
            let index = if round % 2 == 0 { turn } else { contestants.len() - 1 - turn };
            let begun = Instant::now();
            contestants[index].enqueue()?;
            let us = begun.elapsed().as_secs_f64() * 1e6;
            contestants[index].wait()?;
            if round >= warm_ups {
                times[index].push(us);
            }
        }
    }
    Ok(times)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let samples = Samples::new((1..=10).rev().map(f64::from).collect());
        assert_eq!([0, 10, 50, 90, 100].map(|percent| samples.percentile(percent)), [1.0, 1.0, 5.0, 9.0, 10.0]);
        assert_eq!(Samples::new(vec![7.0]).median(), 7.0);
    }

    #[test]
    fn ratios_pair_samples_of_the_same_round() {
        let ratios = Samples::ratios(&[(2.0, 1.0), (9.0, 3.0), (1.0, 1.0)]);
        assert_eq!(ratios.median(), 2.0);
    }

    #[test]
    fn contestants_take_turns_and_warm_ups_do_not_count() {
        struct Counting(usize);
        impl Contestant for Counting {
            fn enqueue(&mut self) -> Result<()> {
                self.0 += 1;
                Ok(())
            }
            fn wait(&mut self) -> Result<()> {
                Ok(())
            }
        }
        let (mut a, mut b) = (Counting(0), Counting(0));
        let times = in_turns(&mut [&mut a, &mut b], 2, 3).unwrap();
        assert_eq!((times.len(), times[0].len(), times[1].len()), (2, 3, 3));
        assert_eq!((a.0, b.0), (5, 5));
    }
}
