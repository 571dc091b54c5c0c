//! `bcg-server`: loads a model and serves it over HTTP.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Instant;

use bcg_server::args::ServerArgs;
use bcg_server::cli::serve;
use bcg_server::error::one_line;
use bcg_server::logging;
use clap::Parser;

fn main() -> ExitCode {
    let began = Instant::now();
    let args = ServerArgs::parse();
    logging::init(args.log_format);
    match serve::run(&args, began) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bcg-server: {}", one_line(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
