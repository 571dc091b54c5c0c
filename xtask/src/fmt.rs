//! Formats everything: what `cargo fmt` finds, and the op library, whose modules a macro declares.

use anyhow::Result;

use crate::process::{cargo, command, output, root, run as run_process};

/// Runs `cargo xtask fmt`; with `--check` it changes nothing, and fails if something is not formatted.
pub(crate) fn run(flags: &[String]) -> Result<()> {
    run_process(cargo(["fmt", "--all"]).args(flags))?;
    let listed = ["ls-files", "--cached", "--others", "--exclude-standard", "kernels/src/*.rs"];
    let listed = output(command("git").args(listed))?;
    let files = listed.lines().filter(|path| root().join(path).is_file()); // without those just deleted
    run_process(command("rustfmt").args(["--edition", "2024"]).args(flags).args(files))
}
