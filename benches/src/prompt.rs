//! `bcg bench prompt`: the first token of one long prompt, which the engine computes in chunks.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use bcg_engine::local::LocalEngine;
use bcg_engine::{Engine, EngineEvent, EngineOptions, GenerationRequest, Prompt, load};
use clap::Args;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::progress::LoadBar;
use super::report::{Environment, Report};
use super::timing::Samples;
use super::{make_room, sizes_at_least_one};

const NOTE: &str = "\
first_token_ms: wall time from the submission of one prompt to an idle engine in this process until its first token is \
there, chunk after chunk, nothing cached: median (p10..p90) of the rounds after one that warms up. tokens_per_s: the \
prompt's tokens by the median.";

/// Flags of `bcg bench prompt`.
#[derive(Debug, Args)]
pub struct PromptArgs {
    /// Tokens of the prompt, separated by commas
    #[arg(long, value_name = "T,T,…", value_delimiter = ',', default_value = "32768")]
    pub tokens: Vec<usize>,

    /// Timed rounds, after one that warms up
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub rounds: usize,

    /// Also write the figures to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Asks for one token after each prompt, again and again.
///
/// # Errors
/// What is wrong with the options or the model; that a request failed.
pub fn measure(engine: &EngineOptions, args: &PromptArgs) -> Result<Report> {
    let longest = sizes_at_least_one("--tokens", &args.tokens)?;
    ensure!(args.rounds > 0, "--rounds: 0 rounds time nothing; give at least 1");
    let mut options = engine.clone();
    let chunk = options.chunked_prefill_size;
    // The token after the prompt takes a place too.
    make_room(&mut options, 1, longest + 1, longest + 1);
    options.disable_radix_cache = true;
    options.check()?;
    let engine = load::start(&options, LoadBar::show())?;
    let info = engine.server_info();
    let mut report = Report::new(Environment::read(info["settings"]["device"].as_str().unwrap_or("a device")));
    report.note(format!(
        "model {}, tp {}, pp {}, chunks of up to {chunk} tokens",
        options.model.display(),
        options.tp,
        options.pp
    ));
    report.note(NOTE);
    for &tokens in &args.tokens {
        let times =
            (0..=args.rounds).map(|round| first_token_ms(&engine, tokens, round)).collect::<Result<Vec<_>>>()?;
        let samples = Samples::new(times[1..].to_vec());
        let median = samples.median();
        report.row(
            "prompt",
            vec![
                ("model", load::folder_name(&options.model).as_str().into()),
                ("tp", options.tp.into()),
                ("pp", options.pp.into()),
                ("tokens", tokens.into()),
                ("chunk", chunk.into()),
                ("first_token_ms", samples.into()),
                ("tokens_per_s", (tokens as f64 / median * 1e3).into()),
                ("rounds", args.rounds.into()),
            ],
        );
    }
    Ok(report)
}

fn first_token_ms(engine: &LocalEngine, tokens: usize, round: usize) -> Result<f64> {
    let (vocab, mut random) = (engine.info().vocab_size as u32, SmallRng::seed_from_u64(round as u64));
    let prompt = (0..tokens).map(|_| random.random_range(0..vocab)).collect();
    let mut request = GenerationRequest::greedy(Prompt::Tokens(prompt));
    (request.ignore_eos, request.max_tokens) = (true, Some(1));
    let begun = Instant::now();
    let mut stream = engine.submit(request)?;
    let first = stream.next_blocking().context("no answer")?;
    let ms = begun.elapsed().as_secs_f64() * 1e3;
    match first {
        EngineEvent::Delta(_) => Ok(ms),
        EngineEvent::Failed(message) => bail!("a request failed: {message}"),
        EngineEvent::Finished { .. } => bail!("--tokens {tokens}: the answer has no token; see the engine's log"),
    }
}
