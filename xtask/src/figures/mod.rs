//! The standing figures: what the project says of its own speed, and what a new run says against it.
//!
//! `run.sh standing` of the GPU bundle measures them in a few minutes and writes `standing.json`. docs/figures.json
//! holds the run that is accepted, in the same form, with its commit, date and GPU. `cargo xtask figures FILE` compares
//! a run with it by the rule of [`compare`]; `--accept` puts the run in its place. README.md and the documents of docs/
//! quote from it (see [`quote`]), and `cargo xtask tidy` fails where a quote says something else.
//!
//! A file without rows accepts nothing yet: every figure of a run is new, and quotes are not checked.

mod compare;
mod quote;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::process::root;

/// The accepted figures.
const ACCEPTED: &str = "docs/figures.json";

/// The figures of one run of `run.sh standing`.
#[derive(Clone, Debug, Deserialize)]
struct Figures {
    commit: String,
    date: String,
    /// The runtime's name of the device.
    gpu: String,
    driver: String,
    /// What the machine could do in this run.
    ceilings: Vec<Figure>,
    rows: Vec<Figure>,
}

/// One figure: the median of its rounds, and how far they spread.
#[derive(Clone, Debug, Deserialize)]
struct Figure {
    /// What was measured, of which model, at which size: `prefill/qwen3-8b/256`.
    name: String,
    /// A unit per second (`requests/s`, `GB/s`, `TFLOP/s`) is better when larger; any other is a time.
    unit: String,
    median: f64,
    p10: f64,
    p90: f64,
    /// Names of the ceilings whose speed this figure follows from machine to machine; ceilings follow none.
    #[serde(default)]
    follows: Vec<String>,
}

impl Figure {
    /// Whether a larger number is better.
    fn is_rate(&self) -> bool {
        self.unit.ends_with("/s")
    }

    /// Half the spread between p10 and p90, as a part of the median.
    fn noise(&self) -> f64 {
        (self.p90 - self.p10) / 2.0 / self.median
    }

    /// Median with its unit.
    fn text(&self) -> String {
        format!("{} {}", quote::number(self.median), self.unit)
    }
}

impl Figures {
    /// Reads a file and checks that its numbers can be compared.
    fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let figures = serde_json::from_str(&text).map_err(anyhow::Error::from).and_then(Self::checked);
        figures.with_context(|| {
            format!("{} holds no standing figures; `run.sh standing` writes such a file", path.display())
        })
    }

    fn checked(self) -> Result<Self> {
        let mut names = BTreeSet::new();
        for figure in self.ceilings.iter().chain(&self.rows) {
            let Figure { name, median, p10, p90, .. } = figure;
            ensure!(names.insert(name), "{name} stands twice");
            ensure!(0.0 < *p10 && p10 <= median && median <= p90, "{name}: p10 <= median <= p90 does not hold above 0");
        }
        Ok(self)
    }

    /// Returns a row or a ceiling.
    fn find<'a>(list: &'a [Figure], name: &str) -> Option<&'a Figure> {
        list.iter().find(|figure| figure.name == name)
    }

    /// Returns one line that says where the figures come from.
    fn provenance(&self) -> String {
        let Self { commit, date, gpu, driver, .. } = self;
        if self.rows.is_empty() {
            return "none".to_owned();
        }
        format!("{gpu}, driver {driver}, commit {commit}, {date}")
    }
}

/// Runs `cargo xtask figures`.
pub(crate) fn run(args: &[String]) -> Result<()> {
    let accepted = Figures::read(&root().join(ACCEPTED))?;
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--quote"] => quote::rewrite(root(), &accepted),
        [file] if !file.starts_with("--") => compared(&accepted, &Figures::read(Path::new(file))?),
        [file, "--accept"] | ["--accept", file] => accept(&accepted, Path::new(file)),
        _ => bail!("figures wants the standing.json of a run, and perhaps --accept; or --quote alone"),
    }
}

/// Prints what moved, and fails where something got slower.
fn compared(accepted: &Figures, new: &Figures) -> Result<()> {
    let moves = compare::moves(accepted, new);
    print!("{}", compare::text(accepted, new, &moves));
    let slower = moves.iter().filter(|change| change.is_slower()).count();
    ensure!(slower == 0, "slower than {ACCEPTED} says, beyond the noise: {slower} of the figures");
    Ok(())
}

/// Puts a run in the place of the accepted one, and into the documents.
fn accept(accepted: &Figures, file: &Path) -> Result<()> {
    let new = Figures::read(file)?;
    ensure!(!new.rows.is_empty(), "{} has no rows; run.log says which steps failed", file.display());
    ensure!(
        !new.gpu.starts_with("host"),
        "{} was measured on {}, which says nothing about a GPU; accept a run of an H200",
        file.display(),
        new.gpu
    );
    print!("{}", compare::text(accepted, &new, &compare::moves(accepted, &new)));
    fs::copy(file, root().join(ACCEPTED)).with_context(|| format!("cannot copy {} to {ACCEPTED}", file.display()))?;
    println!("{ACCEPTED} is that run now");
    quote::rewrite(root(), &new)
}

/// Adds to `found` each quote of README.md and docs/*.md that differs from docs/figures.json.
pub(crate) fn check_quotes(found: &mut Vec<String>) -> Result<()> {
    let accepted = Figures::read(&root().join(ACCEPTED))?;
    for (path, text) in quote::documents(root())? {
        found.extend(quote::check(&text, &accepted).into_iter().map(|wrong| format!("{path}: {wrong}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run with a ceiling of each kind and a row of each kind, all at `p10..p90` of 2 % about the median.
    pub(super) fn figures() -> Figures {
        let figure = |name: &str, unit: &str, median: f64, follows: &[&str]| Figure {
            name: name.to_owned(),
            unit: unit.to_owned(),
            median,
            p10: median * 0.99,
            p90: median * 1.01,
            follows: follows.iter().map(|name| (*name).to_owned()).collect(),
        };
        Figures {
            commit: "0123456789ab".to_owned(),
            date: "2026-11-30 12:00:00 UTC".to_owned(),
            gpu: "NVIDIA H200".to_owned(),
            driver: "580.1".to_owned(),
            ceilings: vec![
                figure("copy", "GB/s", 4256.0, &[]),
                figure("product", "TFLOP/s", 730.0, &[]),
                figure("driver calls", "µs", 12.2, &[]),
            ],
            rows: vec![
                figure("prefill/qwen3-8b/256", "ms", 7.66, &["copy", "product"]),
                figure("healed/qwen3-8b/256", "µs", 27.9, &["driver calls"]),
                figure("burst/qwen3-8b/128x1024+32", "requests/s", 38.4, &["copy", "product", "driver calls"]),
            ],
        }
    }

    #[test]
    fn the_documents_quote_the_accepted_figures() {
        let mut found = Vec::new();
        check_quotes(&mut found).expect("docs/figures.json holds figures");
        assert_eq!(found, [""; 0]);
    }

    #[test]
    fn a_file_that_cannot_be_compared_is_refused() {
        let mut twice = figures();
        twice.rows.push(twice.rows[0].clone());
        assert!(twice.checked().expect_err("twice").to_string().contains("prefill/qwen3-8b/256 stands twice"));
        for (p10, median, p90) in [(0.0, 0.0, 0.0), (8.0, 7.66, 9.0), (7.0, 7.66, f64::NAN)] {
            let mut wrong = figures();
            wrong.rows[0] = Figure { p10, median, p90, ..wrong.rows[0].clone() };
            wrong.checked().expect_err("a number that is none");
        }
    }
}
