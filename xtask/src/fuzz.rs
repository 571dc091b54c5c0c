//! Runs the fuzz targets of the tests for longer than the tests do.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use crate::process::{cargo, run as run_process};

const TARGETS: [&str; 4] = ["http", "chat", "safetensors", "config"];

/// Runs `cargo xtask fuzz [TARGET] [--seconds N] [--seed N]`, all targets without one.
pub(crate) fn run(flags: &[String]) -> Result<()> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
    let (mut target, mut seconds, mut seed) = (None, 600, since.as_secs());
    let mut flags = flags.iter();
    while let Some(flag) = flags.next() {
        let mut number = || -> Result<u64> {
            let value = flags.next().with_context(|| format!("{flag} needs a number"))?;
            value.parse().with_context(|| format!("{flag} {value}: not a number"))
        };
        match flag.as_str() {
            "--seconds" => seconds = number()?,
            "--seed" => seed = number()?,
            name if TARGETS.contains(&name) => target = Some(format!("{name}::")),
            other => bail!("unexpected argument `{other}`: give one of {}, --seconds N, --seed N", TARGETS.join(", ")),
        }
    }
    let mut command = cargo(["test", "--quiet", "-p", "bcg-tests", "--test", "fuzz", "--", "--nocapture"]);
    command.args(target);
    run_process(command.env("BCG_FUZZ_SECONDS", seconds.to_string()).env("BCG_FUZZ_SEED", seed.to_string()))
}
