//! The collectives of several ranks, against what plain arithmetic gives.
//!
//! `gpu collectives [--devices 0,1] [--calls N] [--only checks|timing]` runs the rules on GPUs, several ranks on one if a
//! device is named twice, and then prints how long the sums take; a test runs the rules on host devices.

mod call;
mod lane;
mod rules;
pub(crate) mod timing;

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::several::SeveralArgs;

pub use rules::{Size, a_rank_that_does_not_come_is_lost, collectives_match_plain_sums};

/// `gpu collectives`.
///
/// # Errors
/// The first rule that is broken, or the first error of a rank.
pub fn main(args: &[String]) -> Result<()> {
    let options = SeveralArgs::parse(args, Some(("--calls", 20_000)))?;
    if options.checks {
        let begun = Instant::now();
        let (calls, max_delay) = (options.count, Duration::from_micros(300));
        for (gathered, calls) in [(false, calls), (true, calls / 20)] {
            let size = Size { elements: 1 << 21, calls, max_delay, gathered };
            let num_checked = collectives_match_plain_sums(&options.world(Duration::from_secs(10))?, size)?;
            let how = if gathered { ", made of what was gathered," } else { "" };
            println!("{num_checked} results of each rank{how} are right, {:.1} s", begun.elapsed().as_secs_f64());
        }
        let took = a_rank_that_does_not_come_is_lost(&options.world(Duration::from_secs(1))?)?;
        println!("a rank that does not come is lost on all ranks after {:.2} s", took.as_secs_f64());
    }
    if options.timing {
        timing::run(&options.world(Duration::from_secs(10))?)?;
    }
    Ok(())
}
