//! `bcg`: generates, evaluates and inspects on the command line.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use bcg_server::cli::Cli;
use bcg_server::error::one_line;
use bcg_server::logging;
use clap::Parser;

fn main() -> ExitCode {
    let cli = Cli::parse();
    logging::init(cli.log_format);
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bcg: {}", one_line(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
