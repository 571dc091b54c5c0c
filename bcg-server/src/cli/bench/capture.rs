//! `bcg bench capture`: how long the captures of all sizes take, and what memory they keep.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use bcg_models::{ModelRunner, Progress};
use clap::Args;

use super::report::{Environment, Report};
use crate::args::{CaptureArg, EngineArgs};
use crate::engine::load;
use crate::progress::LoadProgress;

/// Flags of `bcg bench capture`.
#[derive(Debug, Args)]
pub struct CaptureArgs {
    /// Flags of the engine; graphs are on whatever they say, up to 8192 tokens unless they say otherwise.
    #[command(flatten)]
    pub engine: EngineArgs,

    /// Also write the figures to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Largest token count that is captured when no flag says another.
const MAX_TOKENS: usize = 8192;

/// Captures and times.
///
/// # Errors
/// What is wrong with the flags or the model, or that a capture failed.
pub fn measure(args: &CaptureArgs) -> Result<Report> {
    let mut flags = args.engine.clone();
    flags.enable_breakable_cuda_graph = true;
    flags.capture = CaptureArg::Ahead;
    let largest = match (&flags.cuda_graph_sizes, flags.cuda_graph_max_tokens) {
        (Some(sizes), _) => sizes.iter().copied().max().unwrap_or(1),
        (None, Some(tokens)) => tokens,
        (None, None) => *flags.cuda_graph_max_tokens.insert(MAX_TOKENS),
    };
    flags.chunked_prefill_size = flags.chunked_prefill_size.max(largest);
    let mut progress = LoadProgress::new();
    let mut runner = load::load_uncaptured(&flags.plan()?, &mut progress)?;

    let mut report = Report::new(Environment::read(runner.device().name()));
    report.note(format!("model {}", flags.model.display()));
    report.note(
        "ms: host time of the size's capture, its dummy run included. arena_bytes: arena memory that a replay uses, shared \
         by all sizes. device_bytes: device memory that is gone after the capture, executables and arena growth together.",
    );
    let device = runner.device().clone();
    let free = || device.memory_info().map(|memory| memory.free_bytes);
    let mut marks = Vec::new();
    let summary = runner.capture(&mut |done: Progress| {
        marks.push((Instant::now(), free()));
        progress.update(done);
    })?;
    progress.finish(&runner, Some(&summary));
    let marks = marks.into_iter().map(|(at, free)| Ok(Mark { at, free_bytes: free? })).collect::<Result<Vec<_>>>()?;
    let (first, last) = (marks.first().context("no size was captured")?, marks.last().context("no size was captured")?);
    each_size(&runner, &summary.sizes, &marks, &mut report);
    report.row(
        "capture",
        vec![
            ("sizes", summary.sizes.len().into()),
            ("segments", summary.segments.into()),
            ("breaks", summary.breaks.into()),
            ("seconds", (last.at - first.at).as_secs_f64().into()),
            ("graph_bytes", summary.graph_bytes.into()),
            ("device_bytes", first.free_bytes.saturating_sub(last.free_bytes).into()),
        ],
    );
    Ok(report)
}

/// The time and the free memory before a size is captured, or after the last one.
struct Mark {
    at: Instant,
    free_bytes: usize,
}

/// Adds a row for each size. They are captured from the largest down, with a mark before each and one at the end.
fn each_size(runner: &ModelRunner, sizes: &[usize], marks: &[Mark], report: &mut Report) {
    for (&size, pair) in sizes.iter().rev().zip(marks.windows(2)) {
        let description = runner.describe(size).unwrap_or_default();
        report.row(
            "capture of a size",
            vec![
                ("tokens", size.into()),
                ("ms", ((pair[1].at - pair[0].at).as_secs_f64() * 1e3).into()),
                ("arena_bytes", description.extent_bytes.into()),
                ("device_bytes", pair[0].free_bytes.saturating_sub(pair[1].free_bytes).into()),
            ],
        );
    }
}
