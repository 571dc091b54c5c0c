//! The messages of `check.rs` and the cases that pin them are one list.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Returns name and text of each message, written one to a line as `name: "text";`.
fn messages() -> BTreeMap<String, String> {
    let (_, table) = include_str!("../src/check.rs").split_once("    messages! {\n").expect("a table of messages");
    let (table, _) = table.split_once("\n    }\n").expect("the end of the table");
    let entries = table.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("//"));
    entries
        .map(|entry| {
            let parts = entry.strip_suffix("\";").and_then(|entry| entry.split_once(": \""));
            let (name, text) = parts.unwrap_or_else(|| panic!("one message to a line, not {entry}"));
            (name.to_owned(), text.to_owned())
        })
        .collect()
}

/// Returns name and text of each assertion about a layout, written one to a line as `const NAME: &str = "text";`.
fn assertions() -> BTreeMap<String, String> {
    let lines =
        include_str!("../src/check.rs").lines().filter_map(|line| line.trim().strip_prefix("pub(crate) const "));
    let parts = lines.filter_map(|line| line.strip_suffix("\";")?.split_once(": &str = \""));
    parts.map(|(name, text)| (name.to_lowercase(), text.to_owned())).collect()
}

/// Returns the text of each file in `tests/ui/fail` with this extension, by name.
fn cases(extension: &str) -> BTreeMap<String, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ui/fail");
    let files = fs::read_dir(folder).expect("a folder of cases").map(|entry| entry.expect("a readable entry").path());
    files
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .map(|path| {
            let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
            (name, fs::read_to_string(&path).expect("a readable case"))
        })
        .collect()
}

fn names(of: &BTreeMap<String, String>) -> BTreeSet<&str> {
    of.keys().map(String::as_str).collect()
}

#[test]
fn each_message_has_one_case_of_its_name() {
    assert_eq!(names(&messages()), names(&cases("rs")));
}

#[test]
fn each_case_pins_its_message_and_no_other_error() {
    let pinned = cases("stderr");
    for (name, text) in messages() {
        let stderr = pinned.get(&name).unwrap_or_else(|| panic!("{name}.stderr is missing"));
        let errors: Vec<_> = stderr.lines().filter(|line| line.starts_with("error")).collect();
        assert!(
            !errors.is_empty() && errors.iter().all(|error| *error == format!("error: {text}")),
            "{name}: {errors:?}"
        );
        assert!(!stderr.contains("warning"), "{name} warns as well");
    }
}

#[test]
fn each_assertion_has_a_case_of_its_name_and_no_other_error() {
    let assertions = assertions();
    assert_eq!(assertions.len(), 3);
    for (name, text) in assertions {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/ui/fail/types/{name}.stderr"));
        let stderr = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let errors: Vec<_> = stderr.lines().filter(|line| line.starts_with("error")).collect();
        assert_eq!(errors, [format!("error[E0080]: evaluation panicked: {text}")], "{name}");
    }
}

#[test]
fn no_message_is_made_elsewhere() {
    let others = [
        ("args.rs", include_str!("../src/args.rs")),
        ("check/kernel_args.rs", include_str!("../src/check/kernel_args.rs")),
        ("expand.rs", include_str!("../src/expand.rs")),
        ("freeze.rs", include_str!("../src/freeze.rs")),
        ("kernel_args.rs", include_str!("../src/kernel_args.rs")),
        ("lib.rs", include_str!("../src/lib.rs")),
    ];
    for (file, source) in others {
        for maker in ["Error::new", "compile_error!", ".error("] {
            assert!(!source.contains(maker), "{file} makes a message with {maker}");
        }
    }
}
