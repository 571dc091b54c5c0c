//! What a captured size consists of, as a table, JSON or a Graphviz picture.

use std::fmt::Write;

use bcg_runtime::{BreakDescription, Description, SegmentDescription};
use serde_json::{Map, Value, json};

/// A fact about a segment or a break: its name in JSON, its heading, and how to read it.
pub(super) type Column<T> = (&'static str, &'static str, fn(&T) -> Value);

/// What is shown of a break, in this order.
pub(super) const BREAK_COLUMNS: &[Column<BreakDescription>] = &[
    ("name", "function", |one| one.name.into()),
    ("file", "file", |one| one.file.into()),
    ("line", "line", |one| one.line.into()),
    ("num_launches", "launches", |one| one.num_launches.into()),
    ("num_args", "frozen tensors", |one| one.num_args.into()),
    ("bridge_bytes", "bridge", |one| one.bridge_bytes.into()),
    ("num_patched", "nodes patched", |one| one.num_patched.into()),
    ("not_healable", "not healable because of", |one| one.not_healable.into()),
];

/// What is shown of a segment, in this order.
pub(super) const SEGMENT_COLUMNS: &[Column<SegmentDescription>] = &[
    ("is_empty", "empty", |segment| segment.is_empty.into()),
    ("num_nodes", "nodes", |segment| segment.num_nodes.into()),
    ("num_copies", "copies", |segment| segment.num_copies.into()),
    ("num_fills", "fills", |segment| segment.num_fills.into()),
    ("kernels", "kernels", |segment| segment.kernels.clone().into()),
];

/// A segment or a break, in the order in which they run.
pub(super) enum Step<'a> {
    Segment(usize, &'a SegmentDescription),
    Break(usize, &'a BreakDescription),
}

/// Puts segments and breaks in the order in which they run.
pub(super) fn steps(description: &Description) -> Vec<Step<'_>> {
    let mut steps = Vec::new();
    let mut breaks = description.breaks.iter().enumerate().peekable();
    for (index, segment) in description.segments.iter().enumerate() {
        steps.push(Step::Segment(index, segment));
        while let Some((at, one)) = breaks.next_if(|(_, one)| one.after_segment <= index) {
            steps.push(Step::Break(at, one));
        }
    }
    steps.extend(breaks.map(|(at, one)| Step::Break(at, one)));
    steps
}

/// Formats the steps as a table for a terminal.
pub(super) fn to_table(description: &Description) -> String {
    let mut text = format!(
        "{}: {} segments, {} breaks, {} merged executables, {} arena bytes, captured in {:.2} ms\n\n",
        description.name,
        description.segments.len(),
        description.breaks.len(),
        description.num_merged,
        description.extent_bytes,
        description.capture_time.as_secs_f64() * 1e3,
    );
    let mut rows = vec![["step", "kind", "launches", "copies", "fills", "bytes", "what"].map(str::to_owned)];
    for (at, step) in steps(description).iter().enumerate() {
        rows.push(match step {
            Step::Segment(_, segment) => [
                at.to_string(),
                "segment".to_owned(),
                segment.kernels.len().to_string(),
                segment.num_copies.to_string(),
                segment.num_fills.to_string(),
                String::new(),
                if segment.is_empty { "(empty)".to_owned() } else { segment.kernels.join(" ") },
            ],
            Step::Break(_, one) => [
                at.to_string(),
                "break".to_owned(),
                one.num_launches.to_string(),
                String::new(),
                String::new(),
                one.bridge_bytes.to_string(),
                format!("{} ({}:{}){}", one.name, one.file, one.line, not_healable(one)),
            ],
        });
    }
    let widths: Vec<usize> =
        (0..7).map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)).collect();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            // Numbers to the right, words to the left.
            if (2..6).contains(&column) {
                let _ = write!(line, "{cell:>width$}  ");
            } else {
                let _ = write!(line, "{cell:<width$}  ");
            }
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// Gives the steps with everything that is known of them.
pub(super) fn to_json(size: usize, description: &Description) -> Value {
    let steps: Vec<Value> = steps(description)
        .iter()
        .map(|step| match step {
            Step::Segment(index, segment) => step_json("segment", *index, SEGMENT_COLUMNS, *segment),
            Step::Break(index, one) => step_json("break", *index, BREAK_COLUMNS, *one),
        })
        .collect();
    json!({
        "name": description.name,
        "size": size,
        "num_segments": description.segments.len(),
        "num_breaks": description.breaks.len(),
        "num_merged": description.num_merged,
        "extent_bytes": description.extent_bytes,
        "capture_ms": description.capture_time.as_secs_f64() * 1e3,
        "steps": steps,
    })
}

/// Says why a break cannot be healed, if so.
fn not_healable(one: &BreakDescription) -> String {
    one.not_healable.map_or_else(String::new, |why| format!(", not healable because of {why}"))
}

fn step_json<T>(kind: &str, index: usize, columns: &[Column<T>], one: &T) -> Value {
    let mut step = Map::from_iter([("kind".to_owned(), kind.into()), ("index".to_owned(), index.into())]);
    step.extend(columns.iter().map(|(key, _, read)| ((*key).to_owned(), read(one))));
    step.into()
}

/// Draws the steps as a Graphviz digraph.
pub(super) fn to_dot(description: &Description) -> String {
    let mut text = format!("digraph \"{}\" {{\n  rankdir=TB;\n  node [fontname=monospace];\n", description.name);
    let steps = steps(description);
    for (at, step) in steps.iter().enumerate() {
        let _ = match step {
            Step::Segment(index, segment) => writeln!(
                text,
                "  s{at} [shape=box, label=\"segment {index}\\n{}\"];",
                if segment.is_empty { "(empty)".to_owned() } else { segment.kernels.join("\\n") }
            ),
            Step::Break(index, one) => writeln!(
                text,
                "  s{at} [shape=octagon, style=filled, fillcolor=gold, label=\"break {index}: {}\\n{} launches, {} bridge bytes\"];",
                one.name, one.num_launches, one.bridge_bytes
            ),
        };
    }
    for at in 1..steps.len() {
        let _ = writeln!(text, "  s{} -> s{at};", at - 1);
    }
    text + "}\n"
}
