//! Everything that measures: what `bcg bench` times, how it is timed, and how it is reported.
//!
//! - [`capture`], [`decode`], [`engine`], [`kernels`], [`lazy`], [`prefill`], [`prompt`], [`replay`]: one bench of a model each;
//!   [`serve`] alone runs no model: it asks a server.
//! - [`program`], [`raw`]: the mechanism alone, against bare driver calls; the executables in `bin/` time it.
//! - [`timing`], [`turns`], [`report`], [`progress`]: rounds, contestants in turns, tables and JSON, bars.
//!
//! Every bench prints a table and, with `--json`, writes the same rows with the machine, the driver, the commit and the date
//! they belong to. All of them run on the host device too, where a figure says something about the runtime's own bookkeeping
//! and nothing about a GPU.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
use bcg_engine::{CaptureMode, EngineOptions};
use clap::Args;

use crate::timing::Rounds;

pub mod capture;
pub mod decode;
pub mod engine;
mod forward;
mod http_client;
pub mod kernels;
pub mod lazy;
pub mod prefill;
mod profile;
pub mod program;
pub mod progress;
pub mod prompt;
mod random;
pub mod raw;
pub mod replay;
pub mod report;
pub mod sequences;
pub mod serve;
pub mod timing;
pub mod turns;

/// Flags of every bench that repeats something.
#[derive(Debug, Clone, Args)]
pub struct RoundsArgs {
    /// Timed rounds; the tables show their median, p10 and p90
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub rounds: usize,

    /// Seconds after which no further round of a row begins, but three are always made
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    pub seconds: u64,

    /// Also trace the kernels of each row, in runs of their own: their times, and how busy they keep the GPU
    #[arg(long)]
    pub profile: bool,

    /// Also write the figures to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

impl RoundsArgs {
    pub(crate) fn rounds(&self) -> anyhow::Result<Rounds> {
        ensure!(self.rounds > 0, "--rounds: 0 rounds time nothing; give at least 1");
        Ok(Rounds { warm_ups: 3, rounds: self.rounds, budget: Duration::from_secs(self.seconds) })
    }
}

/// Returns the largest of some sizes, all of which are at least 1.
pub(crate) fn sizes_at_least_one(flag: &str, sizes: &[usize]) -> anyhow::Result<usize> {
    ensure!(!sizes.contains(&0), "{flag}: 0 is no size; give sizes of at least 1");
    sizes.iter().copied().max().with_context(|| format!("{flag}: names no size; give at least one"))
}

/// Returns the engine's options, but with graphs of these sizes alone, captured ahead, and a KV cache of the size that
/// `kv_cache_tokens` names.
fn with_graphs(engine: &EngineOptions, prefill_sizes: &[usize], decode_sizes: &[usize]) -> EngineOptions {
    let mut options = engine.clone();
    options.enable_breakable_cuda_graph = true;
    options.capture = CaptureMode::Ahead;
    options.cuda_graph_sizes = Some(prefill_sizes.to_vec());
    options.cuda_graph_decode_sizes = Some(decode_sizes.to_vec());
    options.cuda_graph_max_tokens = None;
    options.mem_fraction_static = None;
    options
}

/// Raises the engine's bounds to steps of `new_tokens`, sequences of `context` tokens and a KV cache of `kv_tokens`.
fn make_room(options: &mut EngineOptions, new_tokens: usize, context: usize, kv_tokens: usize) {
    options.chunked_prefill_size = options.chunked_prefill_size.max(new_tokens);
    options.context_length = Some(options.context_length.unwrap_or(0).max(context));
    let kv_tokens = kv_tokens.next_multiple_of(options.page_size);
    options.kv_cache_tokens = Some(options.kv_cache_tokens.unwrap_or(0).max(kv_tokens));
}
