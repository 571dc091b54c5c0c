//! Checks what the compiler and clippy do not: names, lengths, leftovers, links, places of unsafe code, the order of
//! layers, and that every rule of the documentation names a test that exists.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::layers;
use crate::process::{command, output, root};

/// Lines of a Rust file, documentation and in-file tests included.
const LINES_MAX: usize = 600;

/// Files that are one concept and still longer.
const LONGER: &[(&str, usize)] = &[("bcg-runtime/src/device/cuda/sys.rs", 800)];

/// File names that say nothing about what is inside.
const BANNED_NAMES: &[&str] = &["util", "utils", "helper", "helpers", "misc", "common", "manager"];

/// Where unsafe code may be; each place has its reason.
const UNSAFE_PLACES: &[&str] = &[
    "bcg-runtime/src/device/",          // the drivers, cuBLASLt, the host device
    "bcg-runtime/src/arena/",           // graph memory
    "bcg-runtime/src/launch.rs",        // argument structs as bytes
    "bcg-runtime/src/op.rs",            // declares kernels in its tests
    "bcg-runtime/src/scrub.rs",         // declares a kernel
    "examples/own_kernel.rs",           // declares a kernel
    "kernels/src/",                     // declare kernels
    "tests/src/conformance/kernels.rs", // declares kernels
    "tests/src/device_faults.rs",       // declares a kernel
    "tests/src/random/collectives.rs",  // declares kernels
    "tests/src/random/kernels.rs",      // declares kernels
    "benches/src/program.rs",           // declares a kernel
    "bcg-macros/src/kernel_args.rs",    // what a derive writes
    "bcg-runtime/src/compile/",         // loads CUDA's libraries, binds the compiler
    "bcg-models/src/weights/files.rs",  // maps the header of checkpoint files
    "benches/src/raw.rs",               // raw driver calls to compare with
    "tests/src/allocations.rs",         // counts allocations
];

/// Folders whose Rust files are examples of what must not compile.
const WRONG_ON_PURPOSE: &str = "/tests/ui/";

/// A file of the project and its text.
struct File {
    path: String,
    text: String,
}

impl File {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Yields line numbers and lines, without comment lines.
    fn code_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines = self.text.lines().enumerate().map(|(index, line)| (index + 1, line));
        lines.filter(|(_, line)| !line.trim_start().starts_with("//"))
    }
}

/// Runs `cargo xtask tidy`.
pub(crate) fn run() -> Result<()> {
    let files = files()?;
    let mut found = Vec::new();
    for file in &files {
        check_name(file, &mut found);
        check_length(file, &mut found);
        check_leftovers(file, &mut found);
        check_unsafe(file, &mut found);
        check_links(file, &mut found);
    }
    layers::check(files.iter().map(|file| (file.path.as_str(), file.text.as_str())), &mut found)?;
    let num_rules = check_rules(&files, &mut found)?;
    check_readme(&files, &mut found);
    crate::figures::check_quotes(&mut found)?;
    if !found.is_empty() {
        bail!("{} to tidy:\n  {}", found.len(), found.join("\n  "));
    }
    println!("{} files and {num_rules} rules are tidy", files.len());
    Ok(())
}

/// Returns the text files that git knows or would add.
fn files() -> Result<Vec<File>> {
    let listed = output(command("git").args(["ls-files", "--cached", "--others", "--exclude-standard"]))
        .context("tidy lists the files with git; run it in a clone")?;
    let mut files = Vec::new();
    for path in listed.lines().filter(|path| !path.starts_with("models/")) {
        // A deleted file is still listed until the deletion is committed, and a binary file is not UTF-8.
        if let Ok(text) = fs::read_to_string(root().join(path)) {
            files.push(File { path: path.to_owned(), text });
        }
    }
    Ok(files)
}

fn check_name(file: &File, found: &mut Vec<String>) {
    for part in Path::new(&file.path) {
        let stem = Path::new(part).file_stem().unwrap_or_default().to_string_lossy();
        if BANNED_NAMES.contains(&stem.as_ref()) {
            found.push(format!("{}: `{stem}` says nothing; name the concept", file.path));
        }
    }
}

fn check_length(file: &File, found: &mut Vec<String>) {
    let longer = LONGER.iter().find(|(path, _)| *path == file.path);
    let max = longer.map_or(LINES_MAX, |(_, max)| *max);
    let lines = file.text.lines().count();
    if file.is_rust() && lines > max {
        found.push(format!("{}: {lines} lines, over its {max}; split it by concept", file.path));
    }
}

fn check_leftovers(file: &File, found: &mut Vec<String>) {
    // Written in two parts, so that this file does not find itself.
    let leftovers = [concat!("FIX", "ME"), concat!("dbg", "!("), concat!("todo", "!("), concat!("unimplemented", "!(")];
    let foreign_paths = [concat!("/wo", "rk/"), concat!("/ro", "ot/")];
    for (index, line) in file.text.lines().enumerate() {
        let line_number = index + 1;
        for leftover in leftovers.iter().filter(|leftover| line.contains(**leftover)) {
            found.push(format!("{}:{line_number}: leftover `{leftover}`", file.path));
        }
        for path in foreign_paths.iter().filter(|path| line.contains(**path)) {
            found.push(format!("{}:{line_number}: `{path}` is a path of one machine", file.path));
        }
    }
}

fn check_unsafe(file: &File, found: &mut Vec<String>) {
    let is_allowed = UNSAFE_PLACES.iter().any(|place| file.path.starts_with(place));
    if !file.is_rust() || is_allowed || file.path.contains(WRONG_ON_PURPOSE) {
        return;
    }
    let forms = ["{", "fn ", "impl ", "extern "].map(|next| format!("{}safe {next}", "un"));
    for (line_number, line) in file.code_lines() {
        if forms.iter().any(|form| line.contains(form.as_str())) {
            found.push(format!("{}:{line_number}: unsafe code outside its places (see xtask/src/tidy.rs)", file.path));
        }
    }
}

/// Checks that relative links of Markdown files lead somewhere.
fn check_links(file: &File, found: &mut Vec<String>) {
    if !file.path.ends_with(".md") {
        return;
    }
    let folder = root().join(&file.path);
    let folder = folder.parent().unwrap_or(root());
    for (_, rest) in file.text.match_indices("](").map(|(at, _)| file.text[at..].split_at(2)) {
        let target = rest.split(')').next().unwrap_or_default();
        let path = target.split('#').next().unwrap_or_default();
        if !path.is_empty() && !path.contains("://") && !folder.join(path).exists() {
            found.push(format!("{}: the link to {target} leads nowhere", file.path));
        }
    }
}

/// Checks each row `| rule | law | code | test |` of CAPTURE_RULES.md, and that every conformance rule has one; returns how
/// many rows there are.
fn check_rules(files: &[File], found: &mut Vec<String>) -> Result<usize> {
    const PATH: &str = "docs/CAPTURE_RULES.md";
    let rules = files.iter().find(|file| file.path == PATH).with_context(|| format!("{PATH} is missing"))?;
    let tests: BTreeSet<&str> = files.iter().filter(|file| file.is_rust()).flat_map(functions).collect();
    let mut count = 0;
    for (index, line) in rules.text.lines().enumerate() {
        let cells: Vec<&str> = line.trim().trim_matches('|').split('|').map(str::trim).collect();
        let is_heading = cells.last() == Some(&"test") || line.contains("---");
        if !line.starts_with('|') || is_heading {
            continue;
        }
        let at = format!("{PATH}:{}", index + 1);
        let [_, _, code, test] = cells[..] else {
            found.push(format!("{at}: a rule has four cells: rule, law, code, test"));
            continue;
        };
        count += 1;
        for path in quoted(code).filter(|path| !root().join(path).exists()) {
            found.push(format!("{at}: there is no file {path}"));
        }
        if quoted(test).next().is_none() {
            found.push(format!("{at}: the rule names no test"));
        }
        for test in quoted(test) {
            let name = test.rsplit("::").next().unwrap_or(test);
            if !tests.contains(name) && !root().join(test).is_file() {
                found.push(format!("{at}: there is no test `{test}`"));
            }
        }
    }
    for file in files.iter().filter(|file| file.path.starts_with("tests/src/conformance/")) {
        let written =
            file.text.lines().filter(|line| line.starts_with("pub fn ") && line.ends_with("device: &Device) {"));
        for rule in written.filter_map(|line| line["pub fn ".len()..].split('(').next()) {
            if !rules.text.contains(&format!("::{rule}`")) {
                found.push(format!("{PATH}: the rule `{rule}` of {} has no row", file.path));
            }
        }
    }
    Ok(count)
}

fn functions(file: &File) -> impl Iterator<Item = &str> {
    file.code_lines().filter_map(|(_, line)| {
        let (_, rest) = line.split_once("fn ")?;
        rest.split(['(', '<']).next().filter(|name| !name.is_empty())
    })
}

/// Yields what stands between backticks.
fn quoted(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

/// Checks that the example in the project's README is the one that the runtime's documentation tests run.
fn check_readme(files: &[File], found: &mut Vec<String>) {
    let example = |path: &str| {
        let text = &files.iter().find(|file| file.path == path)?.text;
        let (_, rest) = text.split_once("```rust\n")?;
        Some(rest.split_once("```")?.0)
    };
    let (shown, tested) = (example("README.md"), example("bcg-runtime/README.md"));
    if shown.is_none() || shown != tested {
        found.push("README.md: it shows the ```rust example of bcg-runtime/README.md, which is the tested one".into());
    }
}
