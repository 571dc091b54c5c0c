//! The command line: the binaries `bcg-server` and `bcg`, whose commands stand in one file each.
//!
//! Flags ([`args`]) become the options of the engine and of the HTTP layer; [`serve`] puts the two together, and every other
//! command uses the engine without HTTP. What `bcg bench` times stands in `bcg_benches`.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, Subcommand};

use crate::args::{LogFormat, ServerArgs};

pub mod args;
pub mod bench;
pub mod eval;
pub mod generate;
pub mod inspect;
pub mod logging;
pub mod serve;
mod shutdown;
mod supervise;

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
    Bench(Box<bench::BenchArgs>),
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

/// Ends a binary: says on one line of standard error what went wrong, with the names of flags.
pub fn exit(program: &str, result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{program}: {}", args::in_flags(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}
