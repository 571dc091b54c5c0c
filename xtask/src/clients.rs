//! Runs the official `openai` Python client against the server.

use std::fs;

use anyhow::{Context, Result};

use crate::process::{cargo, command, root, run as run_process, target};
use crate::venv::{python, venv};

/// Runs `cargo xtask test-clients`.
pub(crate) fn run() -> Result<()> {
    let folder = root().join("tests").join("clients");
    let file = folder.join("requirements.txt");
    let requirements = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let venv = venv("clients", &requirements)?;
    run_process(&mut cargo(["build", "--quiet", "-p", "bcg-server", "--bin", "bcg-server"]))?;
    run_process(
        command(python(&venv))
            .arg("-u")
            .arg(folder.join("test_openai.py"))
            .env("BCG_SERVER_BIN", target().join("debug").join("bcg-server")),
    )
}
