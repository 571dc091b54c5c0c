//! `bcg bench prefill`: the forward of one request, with graphs and eagerly.

use bcg_engine::{EngineOptions, load};
use bcg_models::ModelRunner;
use clap::Args;

use super::forward;
use super::progress::LoadBar;
use super::report::{Environment, Report};
use super::{RoundsArgs, make_room, sizes_at_least_one, with_graphs};
use crate::sequences::Sequences;

/// Flags of `bcg bench prefill`.
#[derive(Debug, Args)]
pub struct PrefillArgs {
    /// Prompt lengths, separated by commas
    #[arg(long, value_name = "T,T,…", value_delimiter = ',', default_value = "1,16,128,256,512,1024,2048,4096,8192")]
    pub sizes: Vec<usize>,

    /// How often.
    #[command(flatten)]
    pub rounds: RoundsArgs,
}

/// Times the forwards.
///
/// # Errors
/// What is wrong with the options or the model, or that a forward failed.
pub fn measure(engine: &EngineOptions, args: &PrefillArgs) -> anyhow::Result<Report> {
    let largest = sizes_at_least_one("--sizes", &args.sizes)?;
    args.rounds.rounds()?;
    let mut options = with_graphs(engine, &args.sizes, &[1]); // one new token is a decode
    make_room(&mut options, largest, largest, largest);
    let mut runner = load::load_runner(&options, &mut LoadBar::show())?;

    let mut report = Report::new(Environment::read(runner.device().name()));
    report.note(format!("model {}, one request of T new tokens (one token runs as a decode)", options.model.display()));
    report.note(forward::NOTE);
    let sequences = |runner: &ModelRunner, size| Sequences::new(runner, 1, size, 0);
    let model = load::folder_name(&options.model);
    forward::measure(&mut runner, &model, "prefill", ("tokens", &args.sizes), sequences, &args.rounds, &mut report)?;
    Ok(report)
}
