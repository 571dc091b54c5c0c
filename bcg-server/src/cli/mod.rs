//! The commands of the `bcg` binary, one per file. All but `serve` use the engine without HTTP.

use std::time::Instant;

use clap::{Parser, Subcommand};

use crate::args::{LogFormat, ServerArgs};

pub mod bench;
pub mod eval;
pub mod generate;
pub mod inspect;
mod sequences;
pub mod serve;

/// Flags of `bcg`.
#[derive(Debug, Parser)]
#[command(name = "bcg", version, about = "Run, evaluate, inspect and time models on breakable CUDA graphs")]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,

    /// How log lines are written
    #[arg(long, value_enum, default_value_t = LogFormat::Text, global = true)]
    pub log_format: LogFormat,
}

/// What `bcg` can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve over HTTP, as bcg-server does
    Serve(Box<ServerArgs>),
    /// Answer one prompt on the terminal
    Generate(generate::GenerateArgs),
    /// Answer the problems of a JSONL file and print the accuracy
    Eval(eval::EvalArgs),
    /// Show the segments, the breaks and the timeline of a captured size
    Inspect(inspect::InspectArgs),
    /// Time kernels, forwards and captures
    Bench(bench::BenchArgs),
}

impl Cli {
    /// Runs the command.
    ///
    /// # Errors
    /// What is wrong with the flags, the files or the model.
    pub fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::Serve(args) => serve::run(&args, Instant::now()),
            Command::Generate(args) => generate::run(args),
            Command::Eval(args) => eval::run(&args),
            Command::Inspect(args) => inspect::run(&args),
            Command::Bench(args) => bench::run(&args),
        }
    }
}
