//! `bcg bench lazy`: what it costs to capture the size of a batch while the batch is served.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use bcg_engine::{CaptureMode, EngineOptions, load};
use bcg_models::{ForwardPath, ModelRunner};
use clap::Args;

use super::forward::time_once;
use super::progress::LoadBar;
use super::report::{Environment, Report};
use super::timing::Samples;
use super::{make_room, sizes_at_least_one};
use crate::sequences::Sequences;

/// Flags of `bcg bench lazy`.
#[derive(Debug, Args)]
pub struct LazyArgs {
    /// Prompt lengths, separated by commas; each is timed with those just below it, which are new sizes too
    #[arg(long, value_name = "T,T,…", value_delimiter = ',', default_value = "16,128,256,512")]
    pub sizes: Vec<usize>,

    /// New sizes for each row of the table, which shows their median, p10 and p90
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub rounds: usize,

    /// Also write the figures to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Captures and times.
///
/// # Errors
/// What is wrong with the options or the model, or that a forward failed.
pub fn measure(engine: &EngineOptions, args: &LazyArgs) -> Result<Report> {
    let largest = sizes_at_least_one("--sizes", &args.sizes)?;
    ensure!(args.rounds > 0, "--rounds: 0 rounds time nothing; give at least 1");
    let mut options = engine.clone();
    options.enable_breakable_cuda_graph = true;
    options.capture = CaptureMode::Lazy;
    options.cuda_graph_max_tokens = Some(largest);
    make_room(&mut options, largest, largest, largest);
    options.mem_fraction_static = None; // the KV cache has the size that the bench needs
    let mut runner = load::load_runner(&options, &mut LoadBar::show())?;

    let mut report = Report::new(Environment::read(runner.device().name()));
    report.note(
        "one request of T new tokens, T..T - rounds + 1, each size new. capture_ms: wall time of its first forward, which \
         is also its capture, until the hidden states are there. eager_ms, graph_ms: the same forward again, eagerly and \
         replayed. beyond_ms: capture_ms - eager_ms of each size. capture_host_ms: until all is enqueued.",
    );
    let model = load::folder_name(&options.model);
    for &tokens in &args.sizes {
        let sizes = (2..=tokens).rev().take(args.rounds); // one new token is a decode
        let times = sizes.map(|size| time(&mut runner, size)).collect::<Result<Vec<_>>>()?;
        ensure!(!times.is_empty(), "--sizes: {tokens} token is a decode; give at least 2");
        let column = |of: fn(&Times) -> f64| Samples::new(times.iter().map(of).collect());
        report.row(
            "lazy",
            vec![
                ("model", model.as_str().into()),
                ("tokens", tokens.into()),
                ("capture_ms", column(|times| times.capture.1).into()),
                ("eager_ms", column(|times| times.eager_ms).into()),
                ("graph_ms", column(|times| times.graph_ms).into()),
                ("beyond_ms", column(|times| times.capture.1 - times.eager_ms).into()),
                ("capture_host_ms", column(|times| times.capture.0).into()),
                ("rounds", times.len().into()),
            ],
        );
    }
    let stats = runner.stats();
    report.row(
        "graphs",
        vec![
            ("captures", (stats.num_captures as usize).into()),
            ("evictions", (stats.num_evictions as usize).into()),
            ("graph_bytes", runner.graph_bytes().into()),
        ],
    );
    Ok(report)
}

/// The times of one size, in milliseconds.
struct Times {
    /// Until the host was done, and until the device was.
    capture: (f64, f64),
    eager_ms: f64,
    graph_ms: f64,
}

fn time(runner: &mut ModelRunner, size: usize) -> Result<Times> {
    let sequences = Sequences::new(runner, 1, size, 0)?;
    let batch = sequences.inputs();
    let captures = runner.stats().num_captures;
    let mut run = |path| time_once(runner, |runner| Ok(runner.forward_only(&batch, path)?));
    let (capture, eager, graph) = (run(ForwardPath::Graph)?, run(ForwardPath::Eager)?, run(ForwardPath::Graph)?);
    ensure!(
        runner.stats().num_captures == captures + 1,
        "{size} tokens were captured before; let --sizes lie further apart"
    );
    Ok(Times { capture, eager_ms: eager.1, graph_ms: graph.1 })
}
