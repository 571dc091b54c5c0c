//! Runs clients that others wrote against the server: the official `openai` Python client, and SGLang's benchmark.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::process::{cargo, command, root, run as run_process, target};
use crate::venv::{python, venv};

/// The package with SGLang's benchmark. Its dependencies are not installed, they run models; `sglang.txt` has what the
/// benchmark needs.
const SGLANG: &str = "sglang==0.5.17";

/// Runs `cargo xtask test-clients [--sglang]`.
pub(crate) fn run(flags: &[String]) -> Result<()> {
    let (name, requirements, script, package) = match flags {
        [] => ("clients", "requirements.txt", "test_openai.py", None),
        [flag] if flag == "--sglang" => ("sglang", "sglang.txt", "bench_sglang.py", Some(SGLANG)),
        _ => bail!("unexpected argument; test-clients takes --sglang or nothing"),
    };
    let folder = root().join("tests").join("clients");
    let file = folder.join(requirements);
    let requirements = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let venv = venv(name, &requirements)?;
    if let Some(package) = package {
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", package];
        run_process(command(python(&venv)).args(pip))?;
    }
    run_process(&mut cargo(["build", "--quiet", "-p", "bcg-cli", "--bin", "bcg-server"]))?;
    run_process(
        command(python(&venv))
            .arg("-u")
            .arg(folder.join(script))
            .env("BCG_SERVER_BIN", target().join("debug").join("bcg-server")),
    )
}
