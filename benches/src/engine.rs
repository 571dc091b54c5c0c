//! `bcg bench engine`: what the GPU does while the engine serves, without HTTP: how busy it is, and how long it waits for the
//! host between steps.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bcg_engine::local::LocalEngine;
use bcg_engine::{Engine, EngineEvent, EngineOptions, EventStream, GenerationRequest, Prompt, load};
use bcg_runtime::KernelRun;
use clap::Args;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::profile::{span_ns, union_ns};
use super::progress::LoadBar;
use super::report::{Environment, Report};

const NOTE: &str = "\
busy_percent is the part of the traced time in which some kernel ran; a gap is a time in which none did, a copy included. \
Between steps are the gaps after the kernel that chooses tokens. Tracing makes launches slower, so gaps are upper bounds.";

/// Kernels that choose the tokens of a step: its last ones.
const LAST_KERNELS: [&str; 2] = ["argmax", "sample"];

/// Gaps above this are counted, in microseconds.
const LONG_GAP_US: f64 = 20.0;

/// Flags of `bcg bench engine`.
#[derive(Debug, Args)]
pub struct EngineBenchArgs {
    /// Requests that decode at the same time while the GPU is watched
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub requests: usize,

    /// Tokens of a prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 1024)]
    pub input_len: usize,

    /// Milliseconds that are traced
    #[arg(long, value_name = "MS", default_value_t = 500)]
    pub trace_ms: u64,

    /// Also write the figures to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Runs the requests, and traces the GPU once while prompts are computed and once while all decode.
///
/// # Errors
/// What is wrong with the flags or the model; that a request failed, or that kernels cannot be traced.
pub fn measure(engine: &EngineOptions, args: &EngineBenchArgs) -> Result<Report> {
    ensure!(args.requests > 0 && args.input_len > 0, "--requests and --input-len: give at least 1");
    let mut options = engine.clone();
    options.let_wait(args.requests);
    options.max_running_requests = options.max_running_requests.max(args.requests);
    options.chunked_prefill_size = options.chunked_prefill_size.max(options.max_running_requests);
    options.check()?;
    let device = load::open_device(options.device)?;
    let mut report = Report::new(Environment::read(device.name()));
    report.note(format!("model {}, {} requests of {} tokens", options.model.display(), args.requests, args.input_len));
    report.note(NOTE);
    let engine = load::start(&options, LoadBar::show())?;
    let mut streams = (0..args.requests).map(|at| submit(&engine, args.input_len, at)).collect::<Result<Vec<_>>>()?;
    let mut trace = |phase: &'static str| -> Result<()> {
        let ((), runs) = device
            .trace_kernels(|| std::thread::sleep(Duration::from_millis(args.trace_ms)))
            .context("bench engine: use a GPU with the CUDA toolkit")?;
        rows(&mut report, phase, &runs);
        Ok(())
    };
    first_token(&mut streams[0])?;
    trace("prefill and mixed")?;
    streams.iter_mut().skip(1).try_for_each(first_token)?;
    trace("decode")?;
    drop(streams);
    Ok(report)
}

/// Asks for an answer to the end of the context, so that all still run when the last prompt is computed.
fn submit(engine: &LocalEngine, input_len: usize, at: usize) -> Result<EventStream> {
    let (vocab, mut random) = (engine.info().vocab_size as u32, SmallRng::seed_from_u64(at as u64));
    let prompt = (0..input_len).map(|_| random.random_range(0..vocab)).collect();
    let mut request = GenerationRequest::greedy(Prompt::Tokens(prompt));
    request.ignore_eos = true;
    Ok(engine.submit(request)?)
}

fn first_token(stream: &mut EventStream) -> Result<()> {
    match stream.next_blocking() {
        Some(EngineEvent::Delta(_)) => Ok(()),
        Some(EngineEvent::Failed(message)) => bail!("a request failed: {message}"),
        Some(EngineEvent::Finished { .. }) | None => bail!("--input-len: leaves no room for an answer; lower it"),
    }
}

/// Times in which no kernel ran, in microseconds, with the kernels before and after.
fn gaps(runs: &[KernelRun]) -> Vec<(f64, &str, &str)> {
    let Some(first) = runs.first() else { return Vec::new() };
    let (mut last, mut gaps) = (first, Vec::new());
    for run in &runs[1..] {
        if run.start_ns > last.end_ns {
            gaps.push(((run.start_ns - last.end_ns) as f64 / 1e3, last.name.as_str(), run.name.as_str()));
        }
        if run.end_ns > last.end_ns {
            last = run;
        }
    }
    gaps
}

fn rows(report: &mut Report, phase: &'static str, runs: &[KernelRun]) {
    let (span_us, busy_us) = (span_ns(runs) as f64 / 1e3, union_ns(runs) as f64 / 1e3);
    let gaps = gaps(runs);
    let is_last = |name: &str| LAST_KERNELS.iter().any(|last| name.starts_with(last));
    let mut between: Vec<f64> = gaps.iter().filter(|(_, before, _)| is_last(before)).map(|(us, _, _)| *us).collect();
    between.sort_by(f64::total_cmp);
    let at = |part: usize| between.get((between.len() * part / 100).min(between.len().max(1) - 1)).copied();
    let steps = runs.iter().filter(|run| is_last(&run.name)).count();
    report.row(
        "engine",
        vec![
            ("phase", phase.into()),
            ("steps", steps.into()),
            ("step_ms", (span_us / 1e3 / steps.max(1) as f64).into()),
            ("busy_percent", (100.0 * busy_us / span_us.max(1e-9)).into()),
            ("between_steps_us_p50", at(50).unwrap_or(0.0).into()),
            ("between_steps_us_p99", at(99).unwrap_or(0.0).into()),
            ("between_steps_us_max", between.last().copied().unwrap_or(0.0).into()),
            ("gaps_over_20_us", gaps.iter().filter(|(us, _, _)| *us > LONG_GAP_US).count().into()),
        ],
    );
    let mut by_kernels = BTreeMap::<(&str, &str), (usize, f64)>::new();
    for (us, before, after) in &gaps {
        let (count, sum) = by_kernels.entry((before, after)).or_default();
        (*count, *sum) = (*count + 1, *sum + us);
    }
    let mut by_kernels: Vec<_> = by_kernels.into_iter().collect();
    by_kernels.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
    for ((before, after), (count, sum)) in by_kernels.into_iter().take(5) {
        report.row(
            "largest gaps",
            vec![
                ("phase", phase.into()),
                ("before", before.into()),
                ("after", after.into()),
                ("count", count.into()),
                ("mean_us", (sum / count as f64).into()),
                ("idle_percent", (100.0 * sum / span_us.max(1e-9)).into()),
            ],
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(name: &str, start_ns: u64, end_ns: u64) -> KernelRun {
        KernelRun { name: name.to_owned(), start_ns, end_ns, stream_id: 0, device_id: 0, launch_ns: None }
    }

    #[test]
    fn gaps_are_times_without_any_kernel() {
        let runs = [run("a", 0, 4000), run("b", 1000, 2000), run("argmax", 4000, 5000), run("a", 30_000, 40_000)];
        assert_eq!(gaps(&runs), [(25.0, "argmax", "a")]);
        let mut report = Report::new(Environment::read("test"));
        rows(&mut report, "decode", &runs);
        let json = report.json();
        let row = &json["rows"][0];
        assert_eq!(
            (&row["steps"], &row["gaps_over_20_us"], &row["busy_percent"]),
            (&1.into(), &1.into(), &37.5.into())
        );
        assert_eq!(row["between_steps_us_max"], 25.0);
    }
}
