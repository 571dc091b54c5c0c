//! `bcg inspect`: what a captured size consists of, as a table, JSON or a Graphviz picture.

use std::fmt::Write;

use anyhow::{Context, ensure};
use bcg_models::Phase;
use bcg_runtime::{BreakDescription, Description, SegmentDescription};
use clap::Args;
use serde_json::{Value, json};

use crate::args::{EngineArgs, GraphPlan};
use crate::engine::load;

/// Flags of `bcg inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Flags of the engine; graphs are on whatever they say.
    #[command(flatten)]
    pub engine: EngineArgs,

    /// Tokens of the prefill to capture, or sequences of the decode
    #[arg(long, value_name = "N")]
    pub size: usize,

    /// Capture a decode instead of a prefill
    #[arg(long)]
    pub decode: bool,

    /// Print JSON
    #[arg(long, conflicts_with = "dot")]
    pub json: bool,

    /// Print a Graphviz digraph
    #[arg(long)]
    pub dot: bool,
}

/// Runs the command.
///
/// # Errors
/// What is wrong with the flags or the model, or that the capture failed.
pub fn run(args: &InspectArgs) -> anyhow::Result<()> {
    ensure!(args.size > 0, "--size: 0 tokens is no size; give at least 1");
    let mut flags = args.engine.clone();
    flags.enable_breakable_cuda_graph = true;
    let mut plan = flags.plan()?;
    ensure!(
        args.size <= plan.max_batch_tokens,
        "--size: {} is above the {} tokens of a step; raise --chunked-prefill-size",
        args.size,
        plan.max_batch_tokens
    );
    plan.graph = GraphPlan::Ahead;
    let phase = if args.decode { Phase::Decode } else { Phase::Prefill };
    let size_if = |wanted| if phase == wanted { args.size } else { 1 };
    plan.graph_sizes = Some(vec![size_if(Phase::Prefill)]);
    plan.decode_graph_sizes = Some(vec![size_if(Phase::Decode)]);
    plan.graph_max_tokens = None;
    let runner = load::load_runner(&plan)?;
    let description = runner.describe(phase, args.size).context("the size was not captured")?;
    let text = if args.json {
        serde_json::to_string_pretty(&to_json(args.size, &description))? + "\n"
    } else if args.dot {
        to_dot(&description)
    } else {
        to_table(&description)
    };
    print!("{text}");
    Ok(())
}

/// A segment or a break, in the order in which they run.
enum Step<'a> {
    Segment(usize, &'a SegmentDescription),
    Break(usize, &'a BreakDescription),
}

fn steps(description: &Description) -> Vec<Step<'_>> {
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

fn to_table(description: &Description) -> String {
    let mut text = format!(
        "{}: {} segments, {} breaks, {} arena bytes, captured in {:.2} ms\n\n",
        description.name,
        description.segments.len(),
        description.breaks.len(),
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
                format!("{} ({}:{})", one.name, one.file, one.line),
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

fn to_json(size: usize, description: &Description) -> Value {
    let steps: Vec<Value> = steps(description)
        .iter()
        .map(|step| match step {
            Step::Segment(index, segment) => json!({
                "kind": "segment",
                "index": index,
                "is_empty": segment.is_empty,
                "num_nodes": segment.num_nodes,
                "num_copies": segment.num_copies,
                "num_fills": segment.num_fills,
                "kernels": segment.kernels,
            }),
            Step::Break(index, one) => json!({
                "kind": "break",
                "index": index,
                "name": one.name,
                "file": one.file,
                "line": one.line,
                "num_launches": one.num_launches,
                "num_args": one.num_args,
                "bridge_bytes": one.bridge_bytes,
            }),
        })
        .collect();
    json!({
        "name": description.name,
        "size": size,
        "num_segments": description.segments.len(),
        "num_breaks": description.breaks.len(),
        "extent_bytes": description.extent_bytes,
        "capture_ms": description.capture_time.as_secs_f64() * 1e3,
        "steps": steps,
    })
}

fn to_dot(description: &Description) -> String {
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
