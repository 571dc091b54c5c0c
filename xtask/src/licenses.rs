//! Checks the licence of every dependency, on all platforms, against a list.
//!
//! Not cargo-deny, for two reasons. Every fresh machine would build it first, which was given up after five minutes on
//! two busy cores (2026-11-30), to replace a hundred lines. And what it knows beyond them, security advisories, lies in a
//! database on the network: with it the gate could not run offline, and could fail today on what passed yesterday. Look
//! for advisories outside of the gate, with `cargo deny check advisories`.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::process::{cargo, output};

/// The licences that may be linked into a program under Apache-2.0 or MIT.
const ALLOWED: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Runs `cargo xtask licenses`.
pub(crate) fn run() -> Result<()> {
    let text = output(&mut cargo(["metadata", "--format-version", "1", "--locked"]))?;
    let metadata: Value = serde_json::from_str(&text)?;
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let (mut refused, mut counts) = (Vec::new(), BTreeMap::new());
    for package in packages {
        let (name, version) = (&package["name"], &package["version"]);
        match package["license"].as_str() {
            None => refused.push(format!("{name} {version}: states no licence expression")),
            Some(license) => {
                *counts.entry(license).or_insert(0) += 1;
                match is_allowed(license) {
                    Ok(true) => {}
                    Ok(false) => refused.push(format!("{name} {version}: {license}")),
                    Err(error) => refused.push(format!("{name} {version}: {license}: {error}")),
                }
            }
        }
    }
    if !refused.is_empty() {
        bail!(
            "licences that are not on the list in xtask/src/licenses.rs:\n  {}\nreplace the dependency, or add a licence \
             that allows linking",
            refused.join("\n  ")
        );
    }
    println!("{} packages, {} licence expressions, all on the list", packages.len(), counts.len());
    Ok(())
}

/// Evaluates an SPDX expression: `OR` needs one side, `AND` both; the old `/` means `OR`.
fn is_allowed(expression: &str) -> Result<bool> {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut words = spaced.split_whitespace().peekable();
    let allowed = any(&mut words)?;
    match words.next() {
        None => Ok(allowed),
        Some(word) => bail!("unexpected `{word}`"),
    }
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn any(words: &mut Words<'_>) -> Result<bool> {
    let mut allowed = all(words)?;
    while words.next_if_eq(&"OR").is_some() {
        allowed |= all(words)?;
    }
    Ok(allowed)
}

fn all(words: &mut Words<'_>) -> Result<bool> {
    let mut allowed = one(words)?;
    while words.next_if_eq(&"AND").is_some() {
        allowed &= one(words)?;
    }
    Ok(allowed)
}

fn one(words: &mut Words<'_>) -> Result<bool> {
    match words.next() {
        Some("(") => {
            let allowed = any(words)?;
            words.next_if_eq(&")").context("`)` is missing")?;
            Ok(allowed)
        }
        Some(license) if !["AND", "OR", "WITH", ")"].contains(&license) => {
            if words.next_if_eq(&"WITH").is_some() {
                let exception = words.next().context("an exception is missing after WITH")?;
                return Ok(ALLOWED.contains(&format!("{license} WITH {exception}").as_str()));
            }
            Ok(ALLOWED.contains(&license))
        }
        other => bail!("a licence is missing before {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::is_allowed;

    #[test]
    fn or_needs_one_side_and_and_needs_both() {
        assert!(is_allowed("GPL-3.0 OR MIT").unwrap());
        assert!(!is_allowed("GPL-3.0 AND MIT").unwrap());
        assert!(is_allowed("(MIT OR Apache-2.0) AND Unicode-3.0").unwrap());
        assert!(!is_allowed("MIT AND (GPL-2.0 OR GPL-3.0)").unwrap());
        assert!(is_allowed("GPL-3.0 AND ISC OR MIT").unwrap());
        assert!(is_allowed("MIT/Apache-2.0").unwrap());
    }

    #[test]
    fn an_exception_belongs_to_its_licence() {
        assert!(is_allowed("Apache-2.0 WITH LLVM-exception OR GPL-2.0").unwrap());
        assert!(!is_allowed("GPL-2.0 WITH Classpath-exception-2.0").unwrap());
    }

    #[test]
    fn nonsense_is_an_error_and_not_a_pass() {
        for wrong in ["", "MIT OR", "(MIT", "MIT)", "MIT MIT", "AND MIT"] {
            assert!(is_allowed(wrong).is_err(), "{wrong}");
        }
    }
}
