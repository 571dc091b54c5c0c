//! Runs the long soak of the server on the host device.

use anyhow::{Result, bail, ensure};

use crate::process::{cargo, run as run_process};

/// Requests, unless `--requests` says otherwise.
const REQUESTS: u64 = 20_000;

/// Runs `cargo xtask soak`.
pub(crate) fn run(flags: &[String]) -> Result<()> {
    let (mut requests, mut seed) = (REQUESTS, 1);
    let mut flags = flags.iter();
    while let Some(flag) = flags.next() {
        let number = flags.next().and_then(|value| value.parse::<u64>().ok());
        match (flag.as_str(), number) {
            ("--requests", Some(number)) => requests = number,
            ("--seed", Some(number)) => seed = number,
            ("--requests" | "--seed", None) => bail!("{flag} needs a number"),
            _ => bail!("unexpected argument `{flag}`; soak knows --requests N and --seed S"),
        }
    }
    ensure!(requests > 0, "--requests: is 0; give a number of at least 1");
    run_process(
        cargo(["test", "--release", "-p", "bcg-tests", "--test", "serving_soak", "--"])
            .args(["--ignored", "--exact", "--nocapture", "the_long_soak"])
            .env("BCG_SOAK_REQUESTS", requests.to_string())
            .env("BCG_SOAK_SEED", seed.to_string())
            // With one arena, what glibc keeps for threads that are gone does not look like growth.
            .env("MALLOC_ARENA_MAX", "1"),
    )
}
