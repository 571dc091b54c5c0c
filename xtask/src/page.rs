//! Opens the page of `bcg inspect --html` in a headless browser and uses it.
//!
//! Node comes as a Python package and the browser as a package of Node's, so that a machine needs neither.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::process::{cargo, command, output, root, run as run_process, target};
use crate::venv::venv;

/// Runs `cargo xtask test-page`.
pub(crate) fn run() -> Result<()> {
    let (source, folder) = (root().join("tests").join("page"), target().join("page"));
    let read = |name: &str| {
        let file = source.join(name);
        fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
    };
    let bin = venv("page", &read("requirements.txt")?)?.join("bin");
    fs::create_dir_all(&folder)?;
    install(&bin, &source, &folder, &read("package-lock.json")?)?;
    run_process(&mut cargo(["build", "--quiet", "-p", "bcg-cli", "--bin", "bcg"]))?;
    let (page, inspected) = (folder.join("tiny.html"), folder.join("tiny.json"));
    let inspect = ["inspect", "--model", "models/tiny-qwen3", "--device", "host", "--size", "64", "--json", "--html"];
    let json = output(command(target().join("debug").join("bcg")).args(inspect).arg(&page))?;
    fs::write(&inspected, json)?;
    run_process(
        command(bin.join("node"))
            .arg(folder.join("test_page.mjs"))
            .args([&page, &inspected])
            // The browser unpacks itself into the folder of temporary files.
            .env("TMPDIR", &folder),
    )
}

/// Copies the test beside the packages that it imports, and installs these unless they are those of the same lock file.
fn install(bin: &Path, source: &Path, folder: &Path, lock: &str) -> Result<()> {
    for file in ["package.json", "package-lock.json", "test_page.mjs"] {
        fs::copy(source.join(file), folder.join(file))?;
    }
    let stamp = folder.join("installed.json");
    if fs::read_to_string(&stamp).is_ok_and(|installed| installed == lock) {
        return Ok(());
    }
    let _ = fs::remove_file(folder.join("chromium")); // what an earlier browser unpacked
    let mut path = OsString::from(bin);
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    run_process(
        command(bin.join("npm"))
            .args(["ci", "--silent", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix"])
            .arg(folder)
            .env("PATH", path),
    )
    .context("npm could not install the browser; it needs a package registry (see `npm config`)")?;
    fs::write(stamp, lock)?;
    Ok(())
}
