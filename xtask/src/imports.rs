//! Which file of a crate imports which: read from the sources' tokens, without a compiler.
//!
//! A path that begins with `crate`, `self`, `super` or a module of the same file leads to the file of its longest module;
//! what a module re-exports leads on to where it is defined. Code under `#[cfg(test)]` does not count, and neither does what
//! a folder's `mod.rs` takes from its own files.

use std::collections::{BTreeMap, BTreeSet};

/// A module's path within its crate; empty for `lib.rs`.
type Path = Vec<String>;

/// The files of one crate.
pub(crate) struct Crate<'a> {
    modules: BTreeMap<Path, Module<'a>>,
    /// Modules of tests alone.
    tests: BTreeSet<Path>,
}

struct Module<'a> {
    file: &'a str,
    /// What its `use` items and its expressions name, as written.
    imports: Vec<Vec<&'a str>>,
    /// The names that it passes on, and where it has them from.
    re_exports: BTreeMap<&'a str, Vec<&'a str>>,
}

/// What each file imports, both relative to the crate's `src`.
pub(crate) type Edges<'a> = BTreeMap<&'a str, BTreeSet<&'a str>>;

impl<'a> Crate<'a> {
    /// Reads the files of a crate, given as paths relative to its `src` and texts.
    pub(crate) fn new(files: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let (mut modules, mut tests) = (BTreeMap::new(), BTreeSet::new());
        for (file, text) in files {
            let path = module_path(file);
            let mut tokens = tokens(text);
            for name in remove_tests(&mut tokens) {
                tests.insert(path.iter().map(String::as_str).chain([name]).map(str::to_owned).collect());
            }
            let (imports, re_exports) = imports(&tokens);
            modules.insert(path, Module { file, imports, re_exports });
        }
        Self { modules, tests }
    }

    /// Returns the imports among the crate's files, `lib.rs` and tests left out.
    pub(crate) fn edges(&self) -> Edges<'a> {
        let mut edges = Edges::new();
        for (path, module) in self.modules.iter().filter(|(path, _)| !path.is_empty() && !self.tests.contains(*path)) {
            for import in &module.imports {
                let Some(to) = self.absolute(path, import).and_then(|to| self.module_of(&to, 0)) else { continue };
                let is_own = module.file.ends_with("mod.rs") && to.starts_with(path);
                if !to.is_empty() && to != *path && !is_own {
                    edges.entry(module.file).or_default().insert(self.modules[&to].file);
                }
            }
        }
        edges
    }

    fn absolute(&self, from: &[String], import: &[&str]) -> Option<Path> {
        let mut base = from.to_vec();
        let mut rest = import;
        match rest {
            ["crate", names @ ..] => (base, rest) = (Path::new(), names),
            ["self", names @ ..] => rest = names,
            ["super", ..] => {
                while let ["super", names @ ..] = rest {
                    base.pop();
                    rest = names;
                }
            }
            [first, ..] => {
                base.push((*first).to_owned());
                let is_module = self.modules.contains_key(&base);
                base.pop();
                if !is_module {
                    return None;
                }
            }
            [] => return None,
        }
        base.extend(rest.iter().map(|name| (*name).to_owned()));
        Some(base)
    }

    /// Returns the module that a path leads to.
    fn module_of(&self, path: &[String], depth: usize) -> Option<Path> {
        let len = (0..=path.len()).rev().find(|&len| self.modules.contains_key(&path[..len]))?;
        let (module, item) = path.split_at(len);
        let re_export = item.first().and_then(|name| self.modules[module].re_exports.get(name.as_str()));
        match re_export {
            // The bound ends names that lead in a circle.
            Some(origin) if depth < 8 => self.module_of(&self.absolute(module, origin)?, depth + 1),
            _ => Some(module.to_vec()),
        }
    }
}

/// Returns the files that import each other in rings, each ring sorted.
pub(crate) fn rings<'a>(edges: &Edges<'a>) -> Vec<Vec<&'a str>> {
    let reach = |from: &'a str| {
        let (mut seen, mut open) = (BTreeSet::new(), vec![from]);
        while let Some(file) = open.pop() {
            open.extend(edges.get(file).into_iter().flatten().filter(|next| seen.insert(**next)));
        }
        seen
    };
    let reached: BTreeMap<&str, BTreeSet<&str>> = edges.keys().map(|file| (*file, reach(file))).collect();
    let mut rings = BTreeSet::new();
    for (file, seen) in reached.iter().filter(|(file, seen)| seen.contains(*file)) {
        let is_in_ring = |other: &&&str| reached.get(**other).is_some_and(|seen| seen.contains(file));
        rings.insert(seen.iter().filter(is_in_ring).copied().collect::<Vec<_>>());
    }
    rings.into_iter().collect()
}

/// Returns the names of the public types that a file defines, aliases included.
pub(crate) fn public_types(text: &str) -> Vec<&str> {
    let mut tokens = tokens(text);
    remove_tests(&mut tokens);
    let kinds = ["struct", "enum", "union", "trait", "type"];
    let defines = |window: &&[&'_ str]| window[0] == "pub" && kinds.contains(&window[1]);
    tokens.windows(3).filter(defines).map(|window| window[2]).collect()
}

fn module_path(file: &str) -> Path {
    let path = file.trim_end_matches(".rs");
    let path = path.strip_suffix("/mod").unwrap_or(path);
    if path == "lib" { Path::new() } else { path.split('/').map(str::to_owned).collect() }
}

/// Splits a source into names, `::` and single signs; comments, literals and lifetimes are left out.
fn tokens(text: &str) -> Vec<&str> {
    let bytes = text.as_bytes();
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80;
    let mut tokens = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &text[at..];
        let len = match bytes[at] {
            b'/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            b'/' if rest.starts_with("/*") => rest.find("*/").map_or(rest.len(), |end| end + 2),
            b'"' => string_len(rest),
            b'r' if rest.starts_with("r\"") || rest.starts_with("r#") => raw_string_len(rest),
            b'\'' => char_len(rest),
            byte if byte.is_ascii_whitespace() => 1,
            byte => {
                let len = match byte {
                    _ if is_name(byte) => rest.bytes().take_while(|byte| is_name(*byte)).count(),
                    b':' if rest.starts_with("::") => 2,
                    _ => 1,
                };
                tokens.push(&rest[..len]);
                len
            }
        };
        at += len;
    }
    tokens
}

fn string_len(text: &str) -> usize {
    let mut is_escaped = false;
    let end = text.bytes().enumerate().skip(1).find(|(_, byte)| {
        let ends = *byte == b'"' && !is_escaped;
        is_escaped = *byte == b'\\' && !is_escaped;
        ends
    });
    end.map_or(text.len(), |(at, _)| at + 1)
}

fn raw_string_len(text: &str) -> usize {
    let hashes = text[1..].bytes().take_while(|byte| *byte == b'#').count();
    if text.as_bytes().get(1 + hashes) != Some(&b'"') {
        return 2; // a raw name
    }
    let end = format!("\"{}", "#".repeat(hashes));
    let begin = hashes + 2;
    text[begin..].find(&end).map_or(text.len(), |at| begin + at + end.len())
}

/// The length of a character literal, or of a lifetime.
fn char_len(text: &str) -> usize {
    let mut chars = text.char_indices().skip(1);
    match (chars.next(), chars.next()) {
        (Some((_, '\\')), Some((at, _))) => text[at + 1..].find('\'').map_or(text.len(), |end| at + 1 + end + 1),
        (Some(_), Some((at, '\''))) => at + 1,
        _ => 1 + text[1..].bytes().take_while(|byte| byte.is_ascii_alphanumeric() || *byte == b'_').count(),
    }
}

/// Removes what stands under `#[cfg(test)]` and returns the names of modules declared there.
fn remove_tests<'a>(tokens: &mut Vec<&'a str>) -> Vec<&'a str> {
    const CFG_TEST: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut names = Vec::new();
    while let Some(begin) = tokens.windows(CFG_TEST.len()).position(|window| window == CFG_TEST) {
        let (mut depth, mut end) = (0, begin + CFG_TEST.len());
        if let ["mod", name, ";", ..] = tokens[end..] {
            names.push(name);
        }
        while end < tokens.len() {
            match tokens[end] {
                "{" => depth += 1,
                "}" => depth -= 1,
                _ => {}
            }
            let is_end = depth == 0 && matches!(tokens[end], "}" | ";");
            end += 1;
            if is_end {
                break;
            }
        }
        tokens.drain(begin..end);
    }
    names
}

type Imports<'a> = (Vec<Vec<&'a str>>, BTreeMap<&'a str, Vec<&'a str>>);

fn imports<'a>(tokens: &[&'a str]) -> Imports<'a> {
    let (mut paths, mut re_exports) = (Vec::new(), BTreeMap::new());
    let mut at = 0;
    while at < tokens.len() {
        let before = at.checked_sub(1).map_or("", |before| tokens[before]);
        if tokens[at] == "use" {
            let end = tokens[at..].iter().position(|token| *token == ";").map_or(tokens.len(), |len| at + len);
            for (path, name) in use_tree(&tokens[at + 1..end]) {
                if matches!(before, "pub" | ")") {
                    re_exports.insert(name, path.clone());
                }
                paths.push(path);
            }
            at = end;
        } else if matches!(tokens[at], "crate" | "super") && !matches!(before, "::" | "$" | "in") {
            let mut path = vec![tokens[at]];
            while let ["::", name, ..] = tokens[at + 1..] {
                path.push(name);
                at += 2;
            }
            if path.len() > 1 {
                paths.push(path);
            }
        }
        at += 1;
    }
    (paths, re_exports)
}

/// Returns the paths of a `use` item, each with the name that it gets.
fn use_tree<'a>(tokens: &[&'a str]) -> Vec<(Vec<&'a str>, &'a str)> {
    let Some(open) = tokens.iter().position(|token| *token == "{") else {
        let path_end = tokens.iter().position(|token| *token == "as").unwrap_or(tokens.len());
        let path: Vec<&str> = tokens[..path_end].iter().copied().filter(|token| *token != "::").collect();
        return tokens.last().map(|name| (path, *name)).into_iter().collect();
    };
    let prefix: Vec<&str> = tokens[..open].iter().copied().filter(|token| *token != "::").collect();
    let (mut depth, mut begin, mut found) = (0, open + 1, Vec::new());
    for at in open + 1..tokens.len() {
        match tokens[at] {
            "{" => depth += 1,
            "}" if depth > 0 => depth -= 1,
            "," | "}" if depth == 0 => {
                for (path, name) in use_tree(&tokens[begin..at]) {
                    found.push((prefix.iter().copied().chain(path).collect(), name));
                }
                begin = at + 1;
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edges_of(files: &[(&'static str, &'static str)]) -> Vec<(&'static str, &'static str)> {
        let edges = Crate::new(files.iter().copied()).edges();
        edges.into_iter().flat_map(|(from, to)| to.into_iter().map(move |to| (from, to))).collect()
    }

    #[test]
    fn imports_are_found_however_they_are_written() {
        let files = [
            ("lib.rs", "mod a; mod b; mod c; mod d; pub use b::B as Bee; pub use d::e::E;"),
            ("a.rs", "use std::fmt; use crate::{Bee, c::{self, C}}; fn f() -> crate::E { 'x'; \"crate::c::no\" }"),
            ("b.rs", "// use crate::a::A;\nfn f(x: &'static str) { super::c::g(x) }"),
            ("c.rs", "#[cfg(test)]\nmod tests { use crate::a::A; fn f() { {} } }"),
            ("d/mod.rs", "mod e; use e::E;"),
            ("d/e.rs", "use super::D;"),
        ];
        assert_eq!(
            edges_of(&files),
            [("a.rs", "b.rs"), ("a.rs", "c.rs"), ("a.rs", "d/e.rs"), ("b.rs", "c.rs"), ("d/e.rs", "d/mod.rs")]
        );
    }

    #[test]
    fn rings_are_found_and_chains_are_not() {
        let files = [
            ("a.rs", "use crate::b::B;"),
            ("b.rs", "use crate::c::C;"),
            ("c.rs", "use crate::b::B; use crate::d::D;"),
            ("d.rs", ""),
        ];
        assert_eq!(rings(&Crate::new(files).edges()), [["b.rs", "c.rs"]]);
    }

    #[test]
    fn only_public_types_are_listed() {
        let text = "pub struct A; pub(crate) enum B {} pub type C = A; struct D; impl T for A { type E = A; }";
        assert_eq!(public_types(text), ["A", "C"]);
    }
}
