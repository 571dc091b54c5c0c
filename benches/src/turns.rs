//! Rounds that take turns.
//!
//! Contestants of one comparison run in turns (A B A B …), so that clocks, caches and neighbours are the same for all.

use std::time::Instant;

use anyhow::Result;

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
