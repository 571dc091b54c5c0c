//! Hostile input, each with its expected end: the status or the exit, the time, the memory, and what another user of the
//! same server saw meanwhile.
//!
//! The server is this executable in a process of its own ([`process`]), so that its memory can be measured, and its end.
//! [`requests`] and [`bodies`] attack over HTTP, [`checkpoints`] with files, [`signals`] with signals and faults of the
//! device, [`nodes`] what runs as two processes. Arguments choose rows by a part of their name.

mod bodies;
mod checkpoints;
mod client;
mod fairness;
mod neighbour;
mod nodes;
mod process;
mod requests;
mod signals;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use bcg_cli::args::ServerArgs;
use bcg_cli::{exit, logging, serve};
use clap::Parser;

/// Counts rows, and prints those that fail.
pub(crate) struct Report {
    filter: Vec<String>,
    passed: usize,
    failed: usize,
    slowest: Vec<(Duration, String)>,
}

impl Report {
    /// Runs a row, if it is chosen; a row that returns a text has failed.
    pub(crate) fn row(&mut self, group: &str, name: &str, row: impl FnOnce() -> Result<(), String>) {
        let name = format!("{group}: {name}");
        if !self.filter.is_empty() && !self.filter.iter().any(|part| name.contains(part.as_str())) {
            return;
        }
        let began = Instant::now();
        match row() {
            Ok(()) => self.passed += 1,
            Err(problem) => {
                self.failed += 1;
                println!("FAILED {name}: {problem}");
            }
        }
        self.slowest.push((began.elapsed(), name));
    }
}

fn main() -> ExitCode {
    let began = Instant::now();
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|first| first == process::SERVE) {
        let args = ServerArgs::parse_from(std::mem::take(&mut args));
        logging::init(args.log_format);
        return exit("bcg-server", serve::run(&args, began));
    }
    args.retain(|arg| !arg.starts_with('-'));
    let mut report = Report { filter: args, passed: 0, failed: 0, slowest: Vec::new() };
    for group in [requests::run, bodies::run, fairness::run, checkpoints::run, signals::run, nodes::run] {
        group(&mut report);
    }
    report.slowest.sort_by_key(|(took, _)| std::cmp::Reverse(*took));
    for (took, name) in report.slowest.iter().take(5) {
        println!("slow: {name} took {:.1} s", took.as_secs_f64());
    }
    println!("{} passed, {} failed in {:.0} s", report.passed, report.failed, began.elapsed().as_secs_f64());
    if report.failed == 0 && report.passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
