//! `bcg-server`: loads a model and serves it over HTTP.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Instant;

use bcg_cli::args::ServerArgs;
use bcg_cli::{exit, logging, serve};
use clap::Parser;

fn main() -> ExitCode {
    let began = Instant::now();
    let args = ServerArgs::parse();
    logging::init(args.log_format);
    exit("bcg-server", serve::run(&args, began))
}
