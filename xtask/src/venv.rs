//! Python virtual environments under the build folder.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::process::{command, run, target};

/// Makes the environment `name` with these requirements, or keeps one that was made from the same requirements.
pub(crate) fn venv(name: &str, requirements: &str) -> Result<PathBuf> {
    let dir = target().join("venv").join(name);
    let stamp = dir.join("requirements.txt");
    if fs::read_to_string(&stamp).is_ok_and(|made_from| made_from == requirements) {
        return Ok(dir);
    }
    let _ = fs::remove_dir_all(&dir);
    run(command("python3").args(["-m", "venv"]).arg(&dir))
        .context("python3 with its venv module is needed; on Debian: apt-get install python3 python3-venv")?;
    let wanted = dir.join("wanted.txt");
    fs::write(&wanted, requirements)?;
    run(command(python(&dir))
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:", "-r"])
        .arg(&wanted))
    .context("pip could not install the packages; it needs a package index (see `pip config`)")?;
    fs::rename(wanted, stamp)?; // written last: an interrupted install is made again
    Ok(dir)
}

/// Returns the environment's interpreter.
pub(crate) fn python(venv: &Path) -> PathBuf {
    venv.join("bin").join("python")
}
