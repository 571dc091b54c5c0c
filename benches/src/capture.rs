//! `bcg bench capture`: how long the captures of all sizes take, and what memory they keep.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use bcg_engine::{CaptureMode, EngineOptions, load};
use bcg_models::{CaptureSummary, ForwardPath, ModelRunner, Phase, Progress};
use clap::Args;

use super::make_room;
use super::progress::LoadBar;
use super::report::{Environment, Report};
use crate::sequences::Sequences;

/// Flags of `bcg bench capture`.
#[derive(Debug, Args)]
pub struct CaptureArgs {
    /// Also write the figures to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// SGLang's capture sizes of prefills to 8192 tokens: first size, last size, step.
const PREFILL: [[usize; 3]; 6] =
    [[4, 32, 4], [48, 256, 16], [288, 512, 32], [576, 1024, 64], [1280, 4096, 256], [4608, 8192, 512]];

/// SGLang's capture sizes of decodes to 256 sequences, in the same way.
const DECODE: [[usize; 3]; 4] = [[1, 1, 1], [2, 4, 2], [8, 12, 4], [16, 256, 8]];

fn expand(ranges: &[[usize; 3]]) -> Vec<usize> {
    ranges.iter().flat_map(|&[first, last, step]| (first..=last).step_by(step)).collect()
}

/// Captures and times.
///
/// # Errors
/// What is wrong with the options or the model, or that a capture failed.
pub fn measure(engine: &EngineOptions) -> Result<Report> {
    let mut options = engine.clone();
    options.enable_breakable_cuda_graph = true;
    options.capture = CaptureMode::Ahead;
    if options.cuda_graph_max_tokens.is_none() {
        let sizes = options.cuda_graph_sizes.get_or_insert_with(|| expand(&PREFILL));
        let largest = sizes.iter().copied().max().unwrap_or(1);
        make_room(&mut options, largest, largest, largest);
        let sizes = options.cuda_graph_decode_sizes.get_or_insert_with(|| expand(&DECODE));
        options.max_running_requests = options.max_running_requests.max(sizes.iter().copied().max().unwrap_or(1));
    }
    let mut bar = LoadBar::show();
    let mut runner = load::load_uncaptured(&options, &mut bar)?;

    let mut report = Report::new(Environment::read(runner.device().name()));
    let model = load::folder_name(&options.model);
    report.note(
        "ms: host time of a size's capture. arena_bytes: arena memory that a replay uses, shared by all sizes. graph_bytes, \
         device_bytes: device memory that is gone after the capture, without and with what the arena grew. with_chain_bytes: \
         graph_bytes, and what the executables take that a chain replay of each prefill size made.",
    );
    let device = runner.device().clone();
    let free = || device.memory_info().map(|memory| memory.free_bytes);
    let mut marks = Vec::new();
    let summary = runner.capture(&mut |done: Progress| {
        marks.push((Instant::now(), free()));
        bar(done);
    })?;
    let marks = marks.into_iter().map(|(at, free)| Ok(Mark { at, free_bytes: free? })).collect::<Result<Vec<_>>>()?;
    let (first, last) = (marks.first().context("no size was captured")?, marks.last().context("no size was captured")?);
    each_size(&runner, &summary, &marks, &mut report);
    let chain_bytes = chain_bytes(&mut runner, &summary)?;
    report.row(
        "capture",
        vec![
            ("model", model.as_str().into()),
            ("prefill_sizes", summary.prefill_sizes.len().into()),
            ("decode_sizes", summary.decode_sizes.len().into()),
            ("segments", summary.segments.into()),
            ("breaks", summary.breaks.into()),
            ("seconds", (last.at - first.at).as_secs_f64().into()),
            ("arena_bytes", summary.arena_bytes.into()),
            ("graph_bytes", summary.graph_bytes.into()),
            ("device_bytes", first.free_bytes.saturating_sub(last.free_bytes).into()),
            ("with_chain_bytes", (summary.graph_bytes + chain_bytes).into()),
        ],
    );
    Ok(report)
}

/// Replays each prefill size as a chain, and returns the device memory that is gone then.
fn chain_bytes(runner: &mut ModelRunner, summary: &CaptureSummary) -> Result<usize> {
    let before = runner.device().memory_info()?.free_bytes;
    for &size in summary.prefill_sizes.iter().filter(|&&size| size > 1) {
        let sequences = Sequences::new(runner, 1, size, 0)?;
        runner.forward_only(&sequences.inputs(), ForwardPath::Chain)?;
    }
    runner.synchronize()?;
    Ok(before.saturating_sub(runner.device().memory_info()?.free_bytes))
}

/// The time and the free memory before a size is captured, or after the last one.
struct Mark {
    at: Instant,
    free_bytes: usize,
}

/// Adds a row for each size. Prefills come first, each phase from the largest size down, with a mark before each size
/// and one at the end.
fn each_size(runner: &ModelRunner, summary: &CaptureSummary, marks: &[Mark], report: &mut Report) {
    let of = |phase, sizes: &[usize]| sizes.iter().rev().map(|&size| (phase, size)).collect::<Vec<_>>();
    let sizes = [of(Phase::Prefill, &summary.prefill_sizes), of(Phase::Decode, &summary.decode_sizes)].concat();
    for ((phase, size), pair) in sizes.into_iter().zip(marks.windows(2)) {
        let description = runner.describe(phase, size).unwrap_or_default();
        report.row(
            "capture of a size",
            vec![
                ("phase", phase.name().into()),
                ("size", size.into()),
                ("ms", ((pair[1].at - pair[0].at).as_secs_f64() * 1e3).into()),
                ("arena_bytes", description.extent_bytes.into()),
                ("device_bytes", pair[0].free_bytes.saturating_sub(pair[1].free_bytes).into()),
            ],
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_sizes_are_58_and_36() {
        let (prefill, decode) = (expand(&PREFILL), expand(&DECODE));
        assert_eq!((prefill.len(), prefill.first(), prefill.last()), (58, Some(&4), Some(&8192)));
        assert_eq!((decode.len(), &decode[..7]), (36, &[1, 2, 4, 8, 12, 16, 24][..]));
    }
}
