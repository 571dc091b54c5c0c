//! `bcg generate`: one prompt, streamed to the terminal, then a line of statistics.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::bail;
use bcg_benches::progress::LoadBar;
use bcg_engine::{ChatMessage, Engine, EngineEvent, GenerationRequest, Metrics, Prompt, SamplingParams, replicas};
use clap::Args;

use crate::args::EngineArgs;

/// Flags of `bcg generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// Flags of the engine.
    #[command(flatten)]
    pub engine: EngineArgs,

    /// Text to continue, or to answer with --chat
    #[arg(long)]
    pub prompt: String,

    /// Put the prompt through the model's chat template as a user's message
    #[arg(long)]
    pub chat: bool,

    /// Tokens to generate at most
    #[arg(long, default_value_t = 256)]
    pub max_tokens: usize,

    /// Randomness; 0 takes the most likely token
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,

    /// Choose among the K most likely tokens
    #[arg(long)]
    pub top_k: Option<u32>,

    /// Choose among the most likely tokens that make up this probability
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f32,

    /// Leave out tokens less likely than this part of the most likely one
    #[arg(long, default_value_t = 0.0)]
    pub min_p: f32,

    /// Seed of the random choices
    #[arg(long)]
    pub seed: Option<u64>,

    /// String that ends the answer; may be given up to four times
    #[arg(long)]
    pub stop: Vec<String>,

    /// Go on past the model's end-of-text tokens
    #[arg(long)]
    pub ignore_eos: bool,
}

/// Runs the command.
///
/// # Errors
/// What is wrong with the flags or the model, or that generation failed.
pub fn run(args: GenerateArgs) -> anyhow::Result<()> {
    let GenerateArgs { engine, prompt, chat, max_tokens, temperature, top_k, top_p, min_p, seed, stop, ignore_eos } =
        args;
    let sampling = SamplingParams { temperature, top_k, top_p, min_p, seed: 0 };
    sampling.validate()?;
    let prompt = if chat { Prompt::chat(vec![ChatMessage::new("user", prompt)]) } else { Prompt::Text(prompt) };
    let engine = replicas::start(&engine.text_options("bcg generate")?, LoadBar::show())?;
    let max_tokens = Some(max_tokens);
    let request =
        GenerationRequest { sampling, seed, max_tokens, stop, ignore_eos, ..GenerationRequest::greedy(prompt) };
    let began = Instant::now();
    let mut first = None;
    let mut events = engine.submit(request)?;
    let mut out = std::io::stdout().lock();
    while let Some(event) = events.next_blocking() {
        match event {
            EngineEvent::Delta(delta) => {
                first.get_or_insert_with(|| began.elapsed());
                write!(out, "{}", delta.text)?;
                out.flush()?;
            }
            EngineEvent::Finished { reason, usage } => {
                writeln!(out)?;
                let metrics = engine.replica_metrics();
                let sum = |count: fn(&Metrics) -> u64| metrics.iter().map(|metrics| count(metrics)).sum::<u64>();
                eprintln!(
                    "{} prompt tokens, {} tokens ({}), {:.1} tok/s, TTFT {:.1} ms, {} replays, {} captures, {} eager forwards",
                    usage.prompt_tokens,
                    usage.completion_tokens,
                    reason.as_str(),
                    decode_rate(usage.completion_tokens, began.elapsed(), first),
                    first.unwrap_or_default().as_secs_f64() * 1e3,
                    sum(|metrics| metrics.graph_replays.get()),
                    sum(|metrics| metrics.graph_captures.get()),
                    sum(Metrics::num_eager),
                );
            }
            EngineEvent::Failed(message) => bail!("generation failed: {message}"),
        }
    }
    Ok(())
}

/// Tokens per second after the first one; of the whole answer if it is one token.
fn decode_rate(tokens: usize, total: Duration, first: Option<Duration>) -> f64 {
    let (tokens, time) = match first {
        Some(first) if tokens > 1 => (tokens - 1, total.saturating_sub(first)),
        _ => (tokens, total),
    };
    tokens as f64 / time.as_secs_f64().max(1e-9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_leaves_the_first_token_out() {
        let rate = decode_rate(11, Duration::from_secs(3), Some(Duration::from_secs(1)));
        assert!((rate - 5.0).abs() < 1e-9, "{rate}");
    }
}
