//! `bcg bench decode`: the forward of a batch in which each sequence has one new token, with graphs and eagerly.

use anyhow::ensure;
use bcg_engine::{EngineOptions, load};
use bcg_models::ModelRunner;
use clap::Args;

use super::forward;
use super::progress::LoadBar;
use super::report::{Environment, Report};
use super::{RoundsArgs, sizes_at_least_one, with_graphs};
use crate::sequences::Sequences;

/// Flags of `bcg bench decode`.
#[derive(Debug, Args)]
pub struct DecodeArgs {
    /// Sequences in a batch, separated by commas
    #[arg(long, value_name = "B,B,…", value_delimiter = ',', default_value = "1,8,64,256")]
    pub batches: Vec<usize>,

    /// Tokens that each sequence has after the step
    #[arg(long, value_name = "TOKENS", default_value_t = 1024)]
    pub context: usize,

    /// How often.
    #[command(flatten)]
    pub rounds: RoundsArgs,
}

/// Times the forwards.
///
/// # Errors
/// What is wrong with the options or the model, or that a forward failed.
pub fn measure(engine: &EngineOptions, args: &DecodeArgs) -> anyhow::Result<Report> {
    let largest = sizes_at_least_one("--batches", &args.batches)?;
    ensure!(args.context > 0, "--context: a sequence has at least its new token; give at least 1");
    args.rounds.rounds()?;
    let mut options = with_graphs(engine, &[1], &args.batches); // no prefill is timed
    options.max_running_requests = largest;
    options.chunked_prefill_size = options.chunked_prefill_size.max(largest);
    options.context_length = Some(options.context_length.unwrap_or(0).max(args.context));
    options.kv_cache_tokens = Some(largest * args.context.next_multiple_of(options.page_size));
    let mut runner = load::load_runner(&options, &mut LoadBar::show())?;
    runner.fill_caches()?;

    let mut report = Report::new(Environment::read(runner.device().name()));
    report.note(format!(
        "model {}, one new token for each of B sequences of {} tokens, keys and values random",
        options.model.display(),
        args.context
    ));
    report.note(forward::NOTE);
    let sequences = |runner: &ModelRunner, batch| Sequences::new(runner, batch, 1, args.context - 1);
    let model = load::folder_name(&options.model);
    forward::measure(&mut runner, &model, "decode", ("batch", &args.batches), sequences, &args.rounds, &mut report)?;
    Ok(report)
}
