//! Everything that a machine with a GPU must run, built on a machine without one.
//!
//! `target/gpu-bundle` holds stripped executables, the tiny checkpoints, the data sets, `run.sh` and what it calls; it
//! needs no Rust.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::process::{cargo, command, output, root, run as run_process, target};

/// Small enough to be copied anywhere.
const BYTES_MAX: u64 = 60 << 20;

const PROFILE: &str = "bundle";

/// Executables and the packages they come from.
const EXECUTABLES: [(&str, &str); 4] =
    [("bcg-tests", "gpu"), ("bcg-benches", "mechanism"), ("bcg-benches", "matmul"), ("bcg-examples", "own_kernel")];

/// `bcg`, which `gpu` holds too: the two share nearly all of their code.
const BCG: &str = "#!/bin/sh\nexec \"$(dirname \"$0\")/gpu\" bcg \"$@\"\n";

/// Folders of the project that travel along.
const FOLDERS: [&str; 4] = ["models", "tests/data", "tests/geometry", "benches/peers"];

/// Runs `cargo xtask gpu-bundle`.
pub(crate) fn run() -> Result<()> {
    let mut build = cargo(["build", "--locked", "--profile", PROFILE]);
    for (package, executable) in EXECUTABLES {
        build.args(["-p", package, "--bin", executable]);
    }
    run_process(&mut build)?;
    let bundle = root().join("target").join("gpu-bundle");
    let _ = fs::remove_dir_all(&bundle);
    fs::create_dir_all(bundle.join("bin"))?;
    for (_, executable) in EXECUTABLES {
        copy(&target().join(PROFILE).join(executable), &bundle.join("bin").join(executable))?;
    }
    let bcg = bundle.join("bin").join("bcg");
    fs::write(&bcg, BCG)?;
    fs::set_permissions(&bcg, fs::Permissions::from_mode(0o755))?;
    for folder in FOLDERS {
        copy(&root().join(folder), &bundle.join(folder))?;
    }
    for script in ["run.sh", "standing.py", "device_faults.py"] {
        copy(&root().join("xtask").join(script), &bundle.join(script))?;
    }
    fs::write(bundle.join("COMMIT"), commit())?;
    let bytes = size_bytes(&bundle)?;
    println!(
        "target/gpu-bundle: {:.1} MiB; run `target/gpu-bundle/run.sh` on a machine with a GPU",
        bytes as f64 / (1 << 20) as f64
    );
    ensure!(bytes <= BYTES_MAX, "the bundle is larger than {} MiB: leave something out", BYTES_MAX >> 20);
    Ok(())
}

/// Runs `cargo xtask test-gpu`.
pub(crate) fn test() -> Result<()> {
    let gpu = output(command("nvidia-smi").args(["--query-gpu=name,driver_version", "--format=csv,noheader"]));
    let gpu = gpu.context(
        "test-gpu needs an NVIDIA GPU and its driver on this machine; without one, run `cargo test --workspace`",
    )?;
    eprint!("{gpu}");
    run()?;
    run_process(&mut command(root().join("target").join("gpu-bundle").join("run.sh")))
}

/// Names the commit, and says if the tree differs from it.
fn commit() -> String {
    output(command("git").args(["describe", "--always", "--dirty", "--abbrev=12"]))
        .unwrap_or_else(|_| "unknown\n".into())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if from.is_dir() {
        fs::create_dir_all(to)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(())
}

fn size_bytes(path: &Path) -> Result<u64> {
    if !path.is_dir() {
        return Ok(path.metadata()?.len());
    }
    fs::read_dir(path)?.map(|entry| size_bytes(&entry?.path())).sum()
}
