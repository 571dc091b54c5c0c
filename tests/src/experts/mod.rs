//! Experts that ranks own: what these make of rows, sent in every way, against plain arithmetic.
//!
//! `gpu experts [--devices 0,1] [--replays N] [--only checks|timing]` runs the rule on GPUs, several ranks on one if a device
//! is named twice, and then prints what a layer of Qwen3-30B-A3B takes; a test runs the rule on host devices.

mod case;
mod layer;
mod rules;
mod timing;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bcg_runtime::{Device, World, WorldOptions};

pub use rules::experts_match_plain_math;

/// What one run does.
#[derive(Clone, Debug)]
pub struct Options {
    /// The devices of the ranks, in order.
    pub devices: Vec<usize>,
    /// How often the graph of each case is replayed.
    pub replays: usize,
    /// Whether the rule runs.
    pub checks: bool,
    /// Whether layers are timed.
    pub timing: bool,
}

impl Options {
    /// Reads the arguments of `gpu experts`.
    ///
    /// # Errors
    /// For an argument that is none of them.
    pub fn parse(args: &[String]) -> Result<Self> {
        let mut options = Self { devices: vec![0, 1], replays: 10_000, checks: true, timing: true };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--devices" => options.devices = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?,
                "--replays" => options.replays = value()?.parse()?,
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

/// `gpu experts`.
///
/// # Errors
/// The first result that is wrong, or the first error of a rank.
pub fn main(args: &[String]) -> Result<()> {
    let options = Options::parse(args)?;
    let open = || -> Result<World> {
        let devices = options.devices.iter().map(|&ordinal| Device::cuda(ordinal)).collect::<Result<Vec<_>, _>>()?;
        let mut world_options = WorldOptions::default();
        world_options.timeout = Duration::from_secs(10);
        Ok(World::new(devices, world_options)?)
    };
    if options.checks {
        let begun = Instant::now();
        let num_checked = experts_match_plain_math(&open()?, options.replays)?;
        println!("{num_checked} layers of each rank are right, {:.1} s", begun.elapsed().as_secs_f64());
    }
    if options.timing {
        timing::run(&open()?)?;
    }
    Ok(())
}
