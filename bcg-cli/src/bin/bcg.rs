//! `bcg`: generates, evaluates, inspects and times on the command line.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use bcg_cli::{Cli, exit, logging};
use clap::Parser;

fn main() -> ExitCode {
    let cli = Cli::parse();
    logging::init(cli.log_format);
    exit("bcg", cli.run())
}
