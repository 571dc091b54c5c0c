//! The collectives of several ranks, against what plain arithmetic gives.
//!
//! `gpu collectives [--devices 0,1] [--calls N] [--only checks|timing]` runs the rules on GPUs, several ranks on one if a
//! device is named twice, and then prints how long the sums take; a test runs the rules on host devices.

mod call;
mod lane;
mod rules;
pub(crate) mod timing;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bcg_runtime::{Device, World, WorldOptions};

pub use rules::{Size, a_rank_that_does_not_come_is_lost, collectives_match_plain_sums};

/// What one run does.
#[derive(Clone, Debug)]
pub struct Options {
    /// The devices of the ranks, in order.
    pub devices: Vec<usize>,
    /// How many small calls of all kinds are made in a random order.
    pub calls: usize,
    /// Whether the rules run.
    pub checks: bool,
    /// Whether the sums are timed.
    pub timing: bool,
}

impl Options {
    /// Reads the arguments of `gpu collectives`.
    ///
    /// # Errors
    /// For an argument that is none of them.
    pub fn parse(args: &[String]) -> Result<Self> {
        let mut options = Self { devices: vec![0, 1], calls: 20_000, checks: true, timing: true };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--devices" => options.devices = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?,
                "--calls" => options.calls = value()?.parse()?,
                "--only" => match value()?.as_str() {
                    "checks" => options.timing = false,
                    "timing" => options.checks = false,
                    other => bail!("--only {other}: expected checks or timing"),
                },
                other => bail!("unknown option {other}"),
            }
        }
        Ok(options)
    }
}

/// `gpu collectives`.
///
/// # Errors
/// The first rule that is broken, or the first error of a rank.
pub fn main(args: &[String]) -> Result<()> {
    let options = Options::parse(args)?;
    let open = |timeout| -> Result<World> {
        let devices = options.devices.iter().map(|&ordinal| Device::cuda(ordinal)).collect::<Result<Vec<_>, _>>()?;
        let mut world_options = WorldOptions::default();
        world_options.timeout = timeout;
        Ok(World::new(devices, world_options)?)
    };
    if options.checks {
        let begun = Instant::now();
        let (calls, max_delay) = (options.calls, Duration::from_micros(300));
        for (gathered, calls) in [(false, calls), (true, calls / 20)] {
            let size = Size { elements: 1 << 21, calls, max_delay, gathered };
            let num_checked = collectives_match_plain_sums(&open(Duration::from_secs(10))?, size)?;
            let how = if gathered { ", made of what was gathered," } else { "" };
            println!("{num_checked} results of each rank{how} are right, {:.1} s", begun.elapsed().as_secs_f64());
        }
        let took = a_rank_that_does_not_come_is_lost(&open(Duration::from_secs(1))?)?;
        println!("a rank that does not come is lost on all ranks after {:.2} s", took.as_secs_f64());
    }
    if options.timing {
        timing::run(&open(Duration::from_secs(10))?)?;
    }
    Ok(())
}
