//! Figures in documents: the table of all, and single ones within sentences.
//!
//! - Between the comment lines of [`BEGIN`] and [`END`] stands the table of all accepted figures.
//! - After a comment of [`MARK`] and a figure's name stand the figure's number and its unit, on the same line. A word
//!   stands before the comment, because Markdown ends a paragraph at a line that begins with one. The number has as many
//!   decimals as its author likes, so that a sentence may say `8 ms` of 7.66 ms.
//!
//! `cargo xtask figures --quote` writes both anew; `cargo xtask tidy` says where they differ. While no run is accepted,
//! the table says so, and what sentences say is not checked.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::{ACCEPTED, Figure, Figures};

const BEGIN: &str = "<!-- figures -->";
const END: &str = "<!-- /figures -->";
const MARK: &str = "<!-- figure: ";
const MARK_END: &str = " -->";

/// Returns the documents that may quote: path within the project, and text.
pub(super) fn documents(root: &Path) -> Result<Vec<(String, String)>> {
    let mut documents = Vec::new();
    for folder in ["", "docs/"] {
        for entry in fs::read_dir(root.join(folder))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.ends_with(".md") {
                let path = format!("{folder}{name}");
                let text = fs::read_to_string(root.join(&path)).with_context(|| format!("cannot read {path}"))?;
                documents.push((path, text));
            }
        }
    }
    documents.sort();
    Ok(documents)
}

/// Returns what a document quotes wrongly, with line numbers.
pub(super) fn check(text: &str, figures: &Figures) -> Vec<String> {
    let Quoted { stale, broken, .. } = quoted(text, figures);
    let remedy = |stale| format!("{stale}; run `cargo xtask figures --quote`");
    broken.into_iter().chain(stale.into_iter().map(remedy)).collect()
}

/// Writes the figures into the documents.
pub(super) fn rewrite(root: &Path, figures: &Figures) -> Result<()> {
    let mut all_broken = Vec::new();
    for (path, text) in documents(root)? {
        let Quoted { text: new, broken, .. } = quoted(&text, figures);
        all_broken.extend(broken.into_iter().map(|broken| format!("{path}: {broken}")));
        if new != text {
            fs::write(root.join(&path), new).with_context(|| format!("cannot write {path}"))?;
            println!("{path} quotes {ACCEPTED} again");
        }
    }
    if !all_broken.is_empty() {
        bail!("some quotes were left as they are:\n  {}", all_broken.join("\n  "));
    }
    Ok(())
}

/// A document with its quotes written anew.
#[derive(Debug, Default)]
struct Quoted {
    text: String,
    /// What differed before.
    stale: Vec<String>,
    /// What cannot be written anew.
    broken: Vec<String>,
}

fn quoted(text: &str, figures: &Figures) -> Quoted {
    let mut quoted = Quoted::default();
    let Some((before, rest)) = text.split_once(BEGIN) else {
        quoted.sentences(text, 1, figures);
        return quoted;
    };
    quoted.sentences(before, 1, figures);
    let line_number = before.lines().count() + 1;
    let Some((old, after)) = rest.split_once(END) else {
        quoted.broken.push(format!("line {line_number}: the table has no end; write {END} after it"));
        quoted.text += &text[before.len()..];
        return quoted;
    };
    let new = format!("\n{}", table(figures));
    if old != new {
        quoted.stale.push(format!("line {line_number}: the table is not that of {ACCEPTED}"));
    }
    quoted.text += &format!("{BEGIN}{new}{END}");
    quoted.sentences(after, line_number + old.matches('\n').count(), figures);
    quoted
}

impl Quoted {
    /// Adds text without a table, whose first line has this number.
    fn sentences(&mut self, text: &str, first_line: usize, figures: &Figures) {
        let mut rest = text;
        while let Some(at) = rest.find(MARK) {
            self.text += &rest[..at];
            rest = &rest[at..];
            let line_number = first_line + text[..text.len() - rest.len()].matches('\n').count();
            let line = rest.lines().next().unwrap_or_default();
            if self.text.trim_end_matches([' ', '-', '*', '>']).ends_with('\n') || self.text.is_empty() {
                self.broken
                    .push(format!("line {line_number}: a comment first on its line ends the paragraph; move it"));
            }
            let (mark, old, new) = match sentence(line, figures) {
                Ok(parts) => parts,
                Err(why) => {
                    self.broken.push(format!("line {line_number}: {why}"));
                    (MARK, "", String::new())
                }
            };
            if old != new {
                self.stale.push(format!("line {line_number}: {old} stands where {ACCEPTED} says {new}"));
            }
            self.text += &format!("{mark}{new}");
            rest = &rest[mark.len() + old.len()..];
        }
        self.text += rest;
    }
}

/// Splits a line that begins with a mark into the mark and the number after it, and returns them with the number that
/// should stand there.
fn sentence<'a>(line: &'a str, figures: &Figures) -> Result<(&'a str, &'a str, String), String> {
    let name_end = line.find(MARK_END).ok_or("the comment with a figure's name has no end on its line")?;
    let (mark, rest) = line.split_at(name_end + MARK_END.len());
    let name = &line[MARK.len()..name_end];
    let old = &rest[..rest.find(|c: char| !c.is_ascii_digit() && !".,".contains(c)).unwrap_or(rest.len())];
    if old.is_empty() {
        return Err(format!("no number stands after the comment of {name}, on its line"));
    }
    if figures.rows.is_empty() {
        return Ok((mark, old, old.to_owned()));
    }
    let figure = Figures::find(&figures.rows, name).ok_or_else(|| format!("{ACCEPTED} has no figure {name}"))?;
    if !rest[old.len()..].strip_prefix(' ').is_some_and(|unit| unit.starts_with(&figure.unit)) {
        return Err(format!("the number of {name} is not followed by a space and its unit, {}", figure.unit));
    }
    let decimals = old.split_once('.').map_or(0, |(_, decimals)| decimals.len());
    Ok((mark, old, with_commas(&format!("{:.decimals$}", figure.median))))
}

/// Returns the table of all figures, each line with its end.
fn table(figures: &Figures) -> String {
    if figures.rows.is_empty() {
        return "No run is accepted yet.\n".to_owned();
    }
    let ceiling = |figure: &Figure| format!("{} {}", figure.name, figure.text());
    let ceilings: Vec<String> = figures.ceilings.iter().map(ceiling).collect();
    let mut text = format!("{}.\nCeilings of the run: {}.\n\n", figures.provenance(), ceilings.join(", "));
    text += "| figure | median | p10..p90 | unit |\n|---|---|---|---|\n";
    for Figure { name, unit, median, p10, p90, .. } in &figures.rows {
        let [median, p10, p90] = [median, p10, p90].map(|value| number(*value));
        text += &format!("| `{name}` | {median} | {p10}..{p90} | {unit} |\n");
    }
    text
}

/// A number as it is in the file, with commas between thousands.
pub(super) fn number(value: f64) -> String {
    with_commas(&value.to_string())
}

fn with_commas(digits: &str) -> String {
    let integer = digits.find('.').unwrap_or(digits.len());
    let mut text = digits.to_owned();
    let mut at = integer;
    while at > 3 {
        at -= 3;
        text.insert(at, ',');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::tests::figures;
    use super::*;

    const QUOTING: &str = "\
# Title

It takes <!-- figure: prefill/qwen3-8b/256 -->7 ms and
then <!-- figure: prefill/qwen3-8b/256 -->7.60 ms, or <!-- figure: healed/qwen3-8b/256 -->27.9 µs.

<!-- figures -->
old
<!-- /figures -->

A burst: <!-- figure: burst/qwen3-8b/128x1024+32 -->9.9 requests/s
";

    #[test]
    fn quotes_are_written_anew_with_as_many_decimals() {
        let Quoted { text, broken, .. } = quoted(QUOTING, &figures());
        assert_eq!(broken, [""; 0]);
        assert!(
            text.contains("-->8 ms and\n") && text.contains("-->7.66 ms, or") && text.contains("-->27.9 µs."),
            "{text}"
        );
        assert!(
            text.ends_with(
                "\n<!-- /figures -->\n\nA burst: <!-- figure: burst/qwen3-8b/128x1024+32 -->38.4 requests/s\n"
            )
        );
        assert!(text.contains("driver 580.1, commit 0123456789ab"), "{text}");
        assert!(text.contains("\n| `prefill/qwen3-8b/256` | 7.66 | 7.5834..7.7366 | ms |\n"), "{text}");
        assert_eq!(check(&text, &figures()), [""; 0]);
        assert_eq!(quoted(&text, &figures()).text, text);
    }

    #[test]
    fn a_quote_that_differs_is_named_with_its_line() {
        let remedy = "; run `cargo xtask figures --quote`";
        let wrong = check(QUOTING, &figures());
        let expected = [
            "line 3: 7 stands where docs/figures.json says 8",
            "line 4: 7.60 stands where docs/figures.json says 7.66",
            "line 6: the table is not that of docs/figures.json",
            "line 10: 9.9 stands where docs/figures.json says 38.4",
        ];
        assert_eq!(wrong, expected.map(|line| format!("{line}{remedy}")));
    }

    #[test]
    fn a_quote_that_cannot_be_read_is_named_and_left_alone() {
        for (text, why) in [
            ("a <!-- figure: nonsense -->7 ms", "line 1: docs/figures.json has no figure nonsense"),
            ("\na <!-- figure: nonsense\n-->7 ms", "line 2: the comment with a figure's name has no end on its line"),
            ("a <!-- figure: prefill/qwen3-8b/256 -->\n8 ms", "line 1: no number stands after the comment of"),
            ("a <!-- figure: prefill/qwen3-8b/256 -->8 µs", "line 1: the number of prefill/qwen3-8b/256 is not"),
            ("a\n- <!-- figure: prefill/qwen3-8b/256 -->8 ms", "line 2: a comment first on its line ends"),
            ("a\n<!-- figures -->\nold", "line 2: the table has no end; write <!-- /figures --> after it"),
        ] {
            let Quoted { text: new, stale, broken } = quoted(text, &figures());
            assert_eq!((new.as_str(), stale.len(), broken.len()), (text, 0, 1), "{broken:?}");
            assert!(broken[0].starts_with(why), "{broken:?}");
        }
    }

    #[test]
    fn without_an_accepted_run_the_table_says_so_and_sentences_stay() {
        let none = Figures { ceilings: vec![], rows: vec![], ..figures() };
        let Quoted { text, stale, broken } = quoted(QUOTING, &none);
        assert_eq!((stale.len(), broken.len()), (1, 0));
        assert_eq!(text, QUOTING.replace("\nold\n", "\nNo run is accepted yet.\n"));
    }

    #[test]
    fn thousands_have_commas() {
        assert_eq!(
            [0.41, 7.66, 999.0, 4256.0, 1_234_567.5].map(number),
            ["0.41", "7.66", "999", "4,256", "1,234,567.5"]
        );
    }
}
