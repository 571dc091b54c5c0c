//! `bcg bench prefill`: the forward of one request, with graphs and eagerly.

use bcg_models::ModelRunner;
use clap::Args;

use super::forward;
use super::report::{Environment, Report};
use super::{RoundsArgs, sizes_at_least_one};
use crate::args::{CaptureArg, EngineArgs};
use crate::cli::sequences::Sequences;
use crate::engine::load;

/// Flags of `bcg bench prefill`.
#[derive(Debug, Args)]
pub struct PrefillArgs {
    /// Flags of the engine; graphs of the sizes are on whatever they say.
    #[command(flatten)]
    pub engine: EngineArgs,

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
/// What is wrong with the flags or the model, or that a forward failed.
pub fn measure(args: &PrefillArgs) -> anyhow::Result<Report> {
    let largest = sizes_at_least_one("--sizes", &args.sizes)?;
    args.rounds.rounds()?;
    let mut flags = args.engine.clone();
    flags.enable_breakable_cuda_graph = true;
    flags.capture = CaptureArg::Ahead;
    flags.cuda_graph_sizes = Some(args.sizes.clone());
    flags.cuda_graph_decode_sizes = Some(vec![1]); // one new token is a decode
    flags.cuda_graph_max_tokens = None;
    flags.chunked_prefill_size = flags.chunked_prefill_size.max(largest);
    flags.context_length = Some(flags.context_length.unwrap_or(0).max(largest));
    flags.kv_cache_tokens = Some(flags.kv_cache_tokens.unwrap_or(0).max(largest.next_multiple_of(flags.page_size)));
    flags.mem_fraction_static = None; // the KV cache has the size that the bench needs
    let mut runner = load::load_runner(&flags.plan()?)?;

    let mut report = Report::new(Environment::read(runner.device().name()));
    report.note(format!("model {}, one request of T new tokens (one token runs as a decode)", flags.model.display()));
    report.note(forward::NOTE);
    let sequences = |runner: &ModelRunner, size| Sequences::new(runner, 1, size, 0);
    let model = load::folder_name(&flags.model);
    forward::measure(&mut runner, &model, "prefill", ("tokens", &args.sizes), sequences, &args.rounds, &mut report)?;
    Ok(report)
}
