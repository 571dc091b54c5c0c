//! The arguments of those commands of the `gpu` binary that check and then time what several devices do.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bcg_runtime::{Device, World, WorldOptions};

/// What one run does.
#[derive(Clone, Debug)]
pub(crate) struct SeveralArgs {
    /// The devices, in order; several ranks share one that is named twice.
    pub(crate) devices: Vec<usize>,
    /// How much is checked.
    pub(crate) count: usize,
    /// Whether the rules run.
    pub(crate) checks: bool,
    /// Whether times are taken.
    pub(crate) timing: bool,
}

impl SeveralArgs {
    /// Reads `--devices`, `--only checks|timing` and, where a command has one, the flag of a count with its default.
    ///
    /// # Errors
    /// For an argument that is none of them.
    pub(crate) fn parse(args: &[String], count: Option<(&str, usize)>) -> Result<Self> {
        let default = count.map_or(0, |(_, default)| default);
        let mut read = Self { devices: vec![0, 1], count: default, checks: true, timing: true };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--devices" => read.devices = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?,
                "--only" => match value()?.as_str() {
                    "checks" => read.timing = false,
                    "timing" => read.checks = false,
                    other => bail!("--only {other}: expected checks or timing"),
                },
                flag if count.is_some_and(|(name, _)| name == flag) => read.count = value()?.parse()?,
                other => bail!("unknown option {other}"),
            }
        }
        Ok(read)
    }

    /// Opens the devices.
    ///
    /// # Errors
    /// For one that cannot be used.
    pub(crate) fn open(&self) -> Result<Vec<Device>> {
        open(&self.devices)
    }

    /// A world with a rank on each device, each opened anew.
    ///
    /// # Errors
    /// As [`open`](Self::open); those of [`World::new`].
    pub(crate) fn world(&self, timeout: Duration) -> Result<World> {
        let mut options = WorldOptions::default();
        options.timeout = timeout;
        Ok(World::new(self.open()?, options)?)
    }
}

/// Opens GPUs by their numbers.
///
/// # Errors
/// For one that cannot be used.
pub(crate) fn open(numbers: &[usize]) -> Result<Vec<Device>> {
    Ok(numbers.iter().map(|&number| Device::cuda(number)).collect::<Result<_, _>>()?)
}
