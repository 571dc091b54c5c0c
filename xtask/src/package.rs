//! Packages every crate that can be published.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::process::{cargo, output, root, run as run_process, target};

/// Runs `cargo xtask package`.
pub(crate) fn run(flags: &[String]) -> Result<()> {
    if let Some(flag) = flags.iter().find(|flag| !["--allow-dirty", "--verify"].contains(&flag.as_str())) {
        bail!("no flag `{flag}`; there are --verify and --allow-dirty");
    }
    let has = |flag: &str| flags.iter().any(|given| given == flag);
    let text = output(&mut cargo(["metadata", "--format-version", "1", "--no-deps"]))?;
    let metadata: Value = serde_json::from_str(&text)?;
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    // `publish = false` is an empty list of registries.
    let published: Vec<&Value> =
        packages.iter().filter(|package| package["publish"].as_array().is_none_or(|list| !list.is_empty())).collect();
    for package in &published {
        check_fields(package)?;
    }
    let mut command = cargo(["package", "--quiet", "--locked"]);
    for package in &published {
        command.args(["-p", name(package)]);
    }
    if has("--allow-dirty") {
        command.arg("--allow-dirty");
    }
    if !has("--verify") {
        command.arg("--no-verify");
    }
    run_process(&mut command)?;
    for package in &published {
        let version = package["version"].as_str().unwrap_or_default();
        let file = target().join("package").join(format!("{}-{version}.crate", name(package)));
        let bytes = file.metadata().with_context(|| format!("{} was not made", file.display()))?.len();
        println!("{:<14} {:>7} bytes", name(package), bytes);
    }
    Ok(())
}

fn name(package: &Value) -> &str {
    package["name"].as_str().unwrap_or_default()
}

/// Checks what a registry asks for, and that both licence texts and the readme travel with the crate.
fn check_fields(package: &Value) -> Result<()> {
    for field in ["description", "license", "repository", "readme"] {
        ensure!(package[field].is_string(), "crate {} has no `{field}`: add it to its Cargo.toml", name(package));
    }
    for field in ["keywords", "categories"] {
        let given = package[field].as_array().map_or(0, Vec::len);
        ensure!(
            (1..=5).contains(&given),
            "crate {} has {given} `{field}`: a registry takes one to five",
            name(package)
        );
    }
    let manifest = package["manifest_path"].as_str().context("a package without manifest")?;
    let folder = Path::new(manifest).parent().context("a manifest without folder")?;
    for file in ["LICENSE-APACHE", "LICENSE-MIT", "README.md"] {
        ensure!(folder.join(file).is_file(), "crate {} has no {file}: add it to its folder", name(package));
    }
    for file in ["LICENSE-APACHE", "LICENSE-MIT"] {
        let (theirs, ours) = (std::fs::read(folder.join(file))?, std::fs::read(root().join(file))?);
        ensure!(theirs == ours, "{file} of crate {} differs from the project's", name(package));
    }
    Ok(())
}
