//! Checks the order of rooms: the runtime's layers, its rings, the crates below the engine, and the names of public types.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;

use crate::imports::{Crate, Edges, public_types, rings};
use crate::process::{cargo, output, root};

/// The layers of the runtime, the lowest first, by files and folders of its `src`. A file may import its own layer and those
/// below.
///
/// Kernels and pieces of work (`launch`, `op`) describe what a device takes, so they stand beside it. A runner runs forwards
/// eagerly without any graph, and a graph captures on a runner, so the runner is the lower one.
const LAYERS: &[(&str, &[&str])] = &[
    ("base", &["error", "dtype", "shape", "address", "break_site", "compile"]),
    ("device", &["device", "launch", "op"]),
    ("memory", &["arena", "generation"]),
    ("tensor", &["tensor", "frozen", "world"]),
    ("stream", &["stream", "segment", "matmul", "scrub"]),
    ("capture", &["capture"]),
    ("runner", &["runner", "transfer"]),
    ("replay", &["replay"]),
    ("graph", &["graph", "timeline"]),
    ("cache", &["cache", "ladder"]),
];

/// Files of the runtime that import each other, with the reason. There may be no other ring.
const KNOTS: &[&[&str]] = &[
    // A break is a step of the tape that its own context writes: context, writer, step and body hold each other by type.
    &["capture/context.rs", "capture/eager.rs", "capture/step.rs", "capture/writer.rs"],
    // A graph's nodes are work, and launching a graph is work that the queue holds.
    &["device/host/graph.rs", "device/host/matmul.rs", "device/host/queue.rs", "device/host/work.rs"],
];

/// Crates in which a public type's name may stand once only.
const CRATES: &[&str] = &["bcg-cli", "bcg-engine", "bcg-macros", "bcg-models", "bcg-runtime", "bcg-server", "kernels"];

/// Names that several crates use for what is their own of a kind.
const SHARED_NAMES: &[&str] = &[
    "Error",  // each crate's errors
    "Result", // each crate's alias for a result with its error
];

/// Crates that the engine may not depend on, not even through another one: it knows neither HTTP nor a command line.
const NOT_BELOW_ENGINE: &[&str] = &["axum", "clap", "hyper"];

/// Checks the sources, given as paths within the project and texts.
pub(crate) fn check<'a>(
    files: impl Iterator<Item = (&'a str, &'a str)> + Clone,
    found: &mut Vec<String>,
) -> Result<()> {
    let in_runtime = files.clone().filter_map(|(path, text)| Some((path.strip_prefix("bcg-runtime/src/")?, text)));
    let edges = Crate::new(in_runtime).edges();
    check_layers(&edges, found);
    check_rings(&edges, found);
    check_names(files, found);
    check_engine(found)
}

fn layer(file: &str) -> Option<usize> {
    let first = file.split('/').next()?.trim_end_matches(".rs");
    LAYERS.iter().position(|(_, rooms)| rooms.contains(&first))
}

fn check_layers(edges: &Edges<'_>, found: &mut Vec<String>) {
    let name = |layer: usize| LAYERS[layer].0;
    for (from, to) in edges.iter().flat_map(|(from, to)| to.iter().map(move |to| (from, to))) {
        match (layer(from), layer(to)) {
            (Some(low), Some(high)) if low < high => found.push(format!(
                "bcg-runtime/src/{from}: imports {to}, which is above it ({} < {})",
                name(low),
                name(high)
            )),
            (Some(_), Some(_)) => {}
            (None, _) => found.push(format!("bcg-runtime/src/{from}: is in no layer (see xtask/src/layers.rs)")),
            (_, None) => found.push(format!("bcg-runtime/src/{to}: is in no layer (see xtask/src/layers.rs)")),
        }
    }
}

fn check_rings(edges: &Edges<'_>, found: &mut Vec<String>) {
    for ring in rings(edges).iter().filter(|ring| !KNOTS.contains(&ring.as_slice())) {
        found.push(format!("bcg-runtime/src: these files import each other in a ring: {}", ring.join(", ")));
    }
}

/// Checks that no two public types have one name.
fn check_names<'a>(files: impl Iterator<Item = (&'a str, &'a str)>, found: &mut Vec<String>) {
    let mut places: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (path, text) in files.filter(|(path, _)| path.ends_with(".rs")) {
        let is_of_crate = path.split_once("/src/").is_some_and(|(name, _)| CRATES.contains(&name));
        for name in is_of_crate.then(|| public_types(text)).into_iter().flatten() {
            places.entry(name).or_default().push(path);
        }
    }
    for (name, paths) in places.iter().filter(|(name, paths)| paths.len() > 1 && !SHARED_NAMES.contains(name)) {
        found.push(format!("`{name}` names {} public types: {}", paths.len(), paths.join(", ")));
    }
}

fn check_engine(found: &mut Vec<String>) -> Result<()> {
    const ENGINE: &str = "bcg-engine";
    if !root().join(Path::new(ENGINE)).join("Cargo.toml").is_file() {
        return Ok(());
    }
    let tree = output(&mut cargo(["tree", "--package", ENGINE, "--edges", "normal", "--prefix", "none"]))?;
    let names = tree.lines().filter_map(|line| line.split(' ').next());
    for name in NOT_BELOW_ENGINE.iter().filter(|name| names.clone().any(|other| other == **name)) {
        found.push(format!("{ENGINE}/Cargo.toml: depends on {name}, which knows HTTP or a command line"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(check: impl Fn(&Edges<'_>, &mut Vec<String>), files: &[(&'static str, &'static str)]) -> Vec<String> {
        let mut found = Vec::new();
        check(&Crate::new(files.iter().copied()).edges(), &mut found);
        found
    }

    #[test]
    fn an_upward_import_is_found() {
        let tensor = ("tensor.rs", "use crate::arena::Arena;");
        let arena = ("arena/mod.rs", "use crate::tensor::Tensor;");
        let why = ["bcg-runtime/src/arena/mod.rs: imports tensor.rs, which is above it (memory < tensor)"];
        assert_eq!(found(check_layers, &[tensor, arena]), why);
        assert!(found(check_layers, &[tensor, ("arena/mod.rs", "")]).is_empty());
        assert_eq!(found(check_layers, &[tensor, arena, ("attic.rs", "use crate::tensor::Tensor;")]).len(), 2);
    }

    #[test]
    fn a_new_ring_is_found_and_a_known_knot_is_not() {
        let ring = [("launch.rs", "use crate::op::Op;"), ("op.rs", "use crate::launch::Launch;")];
        assert_eq!(
            found(check_rings, &ring),
            ["bcg-runtime/src: these files import each other in a ring: launch.rs, op.rs"]
        );
        let knot = [
            ("capture/context.rs", "use super::writer::W;"),
            ("capture/writer.rs", "use super::step::S;"),
            ("capture/step.rs", "use super::eager::E;"),
            ("capture/eager.rs", "use super::context::C;"),
        ];
        assert!(found(check_rings, &knot).is_empty());
    }

    #[test]
    fn two_public_types_of_one_name_are_found() {
        let files = [
            ("bcg-models/src/a.rs", "pub struct Phase; pub enum Error {}"),
            ("bcg-server/src/b.rs", "pub enum Phase {} pub enum Error {}"),
            ("tests/src/c.rs", "pub struct Phase;"),
        ];
        let mut found = Vec::new();
        check_names(files.into_iter(), &mut found);
        assert_eq!(found, ["`Phase` names 2 public types: bcg-models/src/a.rs, bcg-server/src/b.rs"]);
    }
}
