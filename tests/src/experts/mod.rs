//! Experts that ranks own: what these make of rows, sent in every way, against plain arithmetic.
//!
//! `gpu experts [--devices 0,1] [--replays N] [--only checks|timing]` runs the rule on GPUs, several ranks on one if a device
//! is named twice, and then prints what a layer of Qwen3-30B-A3B takes; a test runs the rule on host devices.

mod case;
mod layer;
mod rules;
mod timing;

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::several::SeveralArgs;

pub use rules::experts_match_plain_math;

/// How long ranks wait for one another.
const TIMEOUT: Duration = Duration::from_secs(10);

/// `gpu experts`.
///
/// # Errors
/// The first result that is wrong, or the first error of a rank.
pub fn main(args: &[String]) -> Result<()> {
    let options = SeveralArgs::parse(args, Some(("--replays", 10_000)))?;
    if options.checks {
        let begun = Instant::now();
        let num_checked = experts_match_plain_math(&options.world(TIMEOUT)?, options.count)?;
        println!("{num_checked} layers of each rank are right, {:.1} s", begun.elapsed().as_secs_f64());
    }
    if options.timing {
        timing::run(&options.world(TIMEOUT)?)?;
    }
    Ok(())
}
