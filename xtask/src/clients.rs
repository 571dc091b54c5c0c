//! Runs clients that others wrote against the server: the official `openai` Python client, SGLang's gateway in front of two
//! servers, and SGLang's benchmark. What operators are told to deploy is checked beside them.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::process::{cargo, command, root, run as run_process, target};
use crate::venv::{python, venv};

/// The package with SGLang's benchmark. Its dependencies are not installed, they run models; `sglang.txt` has what the
/// benchmark needs.
const SGLANG: &str = "sglang==0.5.17";

/// The scripts that run without `--sglang`, in this order.
const SCRIPTS: &[&str] = &["test_openai.py", "test_gateway.py", "test_deployment.py"];

/// Runs `cargo xtask test-clients [--sglang]`.
pub(crate) fn run(flags: &[String]) -> Result<()> {
    let (name, requirements, scripts, package) = match flags {
        [] => ("clients", "requirements.txt", SCRIPTS, None),
        [flag] if flag == "--sglang" => ("sglang", "sglang.txt", &["bench_sglang.py"][..], Some(SGLANG)),
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
    let server = target().join("debug").join("bcg-server");
    scripts.iter().try_for_each(|script| {
        let script = folder.join(script);
        run_process(command(python(&venv)).arg("-u").arg(script).env("BCG_SERVER_BIN", &server))
    })
}
