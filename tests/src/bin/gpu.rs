//! Runs every rule on the first CUDA device. Without one it fails: this is the gate that needs a GPU.
//!
//! `gpu [FILTER] [--random N]`: only rules whose `group::name` contains FILTER; N random programs (200 unless told; 0 for
//! none). `gpu --geometry DIR`: only the rules about the folder that `tests/geometry/reference.py` wrote. `BCG_ROOT` tells
//! where the repository's `models` and `tests` lie, if not where it was built.
//!
//! `gpu collectives FLAGS` checks and times what several ranks sum, `gpu world FLAGS` replays a forward of theirs, `gpu
//! experts FLAGS` checks and times experts that ranks own, `gpu roles FLAGS` checks and times what one GPU prefills and another
//! one decodes, and `gpu nodes FLAGS` runs ranks in several processes. `gpu serve
//! FLAGS` is a `bcg-server` whose device a request can break, and `gpu bcg …` is `bcg`, so that a bundle needs one of the two
//! only.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bcg_runtime::{Device, ReplayMode};
use bcg_tests::conformance::fixture::with_replay;
use bcg_tests::geometry::Session;
use bcg_tests::{
    collectives, conformance, device_faults, experts, geometry, golden, nodes, ops, random, roles, soak, world,
};
use clap::Parser;

struct Options {
    filter: String,
    num_random: u64,
    geometry: Option<PathBuf>,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self { filter: String::new(), num_random: 200, geometry: None };
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--random" => options.num_random = value()?.parse().map_err(|error| format!("--random: {error}"))?,
                "--geometry" => options.geometry = Some(value()?.into()),
                _ if arg.starts_with('-') => return Err(format!("unknown option {arg}")),
                _ => options.filter = arg,
            }
        }
        Ok(options)
    }
}

/// The message of the latest panic and where it was raised.
static PANIC: Mutex<String> = Mutex::new(String::new());

fn keep_panic_messages() {
    std::panic::set_hook(Box::new(|info| {
        let payload = info.payload();
        let text =
            payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        *PANIC.lock().unwrap_or_else(PoisonError::into_inner) = format!("{}, at {place}", text.unwrap_or("a panic"));
    }));
}

/// Results so far.
#[derive(Default)]
struct Report {
    num_passed: u64,
    failed: Vec<String>,
    slowest: Vec<(Duration, String)>,
}

impl Report {
    fn run(&mut self, name: String, rule: impl FnOnce()) {
        let begun = Instant::now();
        let passed = catch_unwind(AssertUnwindSafe(rule)).is_ok();
        self.slowest.push((begun.elapsed(), name.clone()));
        if passed {
            self.num_passed += 1;
            return;
        }
        let message = PANIC.lock().unwrap_or_else(PoisonError::into_inner).replace('\n', " ");
        println!("FAILED {name}: {message}");
        self.failed.push(name);
    }

    fn finish(mut self) -> ExitCode {
        self.slowest.sort_by_key(|(took, _)| std::cmp::Reverse(*took));
        for (took, name) in self.slowest.iter().take(5).filter(|(took, _)| took.as_secs() > 0) {
            println!("slow: {name} took {:.1} s", took.as_secs_f32());
        }
        println!("{} passed, {} failed", self.num_passed, self.failed.len());
        if self.failed.is_empty() && self.num_passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

fn run_all(device: &Device, options: &Options) -> ExitCode {
    let mut report = Report::default();
    for (group, rules) in conformance::GROUPS {
        for (name, rule) in *rules {
            let name = format!("{group}::{name}");
            if name.contains(&options.filter) {
                report.run(format!("{name}, chain"), || with_replay(ReplayMode::Chain, || rule(device)));
                report.run(name, || rule(device));
            }
        }
    }
    for (checkpoint, (name, rule)) in golden::CHECKPOINTS.iter().flat_map(|c| golden::RULES.iter().map(move |r| (c, r)))
    {
        let name = format!("golden::{checkpoint}::{name}");
        if name.contains(&options.filter) {
            report.run(name, || rule(device, checkpoint));
        }
    }
    for (group, rules) in [("ops", ops::RULES), ("soak", soak::RULES)] {
        for (name, rule) in rules {
            let name = if name.contains("::") { (*name).to_owned() } else { format!("{group}::{name}") };
            if name.contains(&options.filter) {
                report.run(name, || rule(device));
            }
        }
    }
    if options.filter.is_empty() || "random".contains(&options.filter) {
        for seed in random::REGRESSIONS.iter().copied().chain(0..options.num_random) {
            report.run(format!("random::{seed}"), || random::check(std::slice::from_ref(device), seed));
        }
    }
    report.finish()
}

fn run_geometry(device: &Device, dir: &Path) -> ExitCode {
    let mut report = Report::default();
    for &(mode_name, mode) in geometry::MODES {
        let mut session = None;
        report.run(format!("geometry::{mode_name}::load"), || session = Some(Session::load(device, dir, mode)));
        for (name, rule) in geometry::RULES {
            let Some(session) = &mut session else { break };
            report.run(format!("geometry::{mode_name}::{name}"), || {
                println!("{mode_name}: {name}");
                rule(session);
            });
        }
    }
    report.finish()
}

fn main() -> ExitCode {
    let began = Instant::now();
    match std::env::args().nth(1).as_deref() {
        Some("serve") => return bcg_cli::exit("gpu serve", device_faults::run(std::env::args().skip(1), began)),
        Some("world") => {
            let args: Vec<String> = std::env::args().skip(2).collect();
            return bcg_cli::exit("gpu world", world::main(&args));
        }
        Some("nodes") => {
            let args: Vec<String> = std::env::args().skip(2).collect();
            return bcg_cli::exit("gpu nodes", nodes::main(&args));
        }
        Some("collectives") => {
            let args: Vec<String> = std::env::args().skip(2).collect();
            return bcg_cli::exit("gpu collectives", collectives::main(&args));
        }
        Some("roles") => {
            let args: Vec<String> = std::env::args().skip(2).collect();
            return bcg_cli::exit("gpu roles", roles::main(&args));
        }
        Some("experts") => {
            let args: Vec<String> = std::env::args().skip(2).collect();
            return bcg_cli::exit("gpu experts", experts::main(&args));
        }
        Some("bcg") => {
            let cli = bcg_cli::Cli::parse_from(std::env::args().skip(1));
            bcg_cli::logging::init(cli.log_format);
            return bcg_cli::exit("bcg", cli.run());
        }
        _ => {}
    }
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(message) => {
            eprintln!("{message}");
            return ExitCode::FAILURE;
        }
    };
    let device = match Device::cuda(0) {
        Ok(device) => device,
        Err(error) => {
            eprintln!("this needs a GPU: {error}");
            return ExitCode::FAILURE;
        }
    };
    println!("{}", device.name());
    keep_panic_messages();
    match &options.geometry {
        Some(dir) => run_geometry(&device, dir),
        None => run_all(&device, &options),
    }
}
