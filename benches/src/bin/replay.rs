//! Host time of a replay with 0 to 64 breaks, against the same forward run eagerly and, on CUDA, against the same driver
//! calls in a bare loop; all in turns, in one run. Also the time of a capture.

use std::path::PathBuf;

use anyhow::Result;
use bcg_bench::program::{BREAK_KERNELS, Capture, Chain, EagerForward, SEGMENT_KERNELS};
use bcg_bench::raw::RawLoop;
use bcg_bench::report::{Environment, Report};
use bcg_bench::timing::{Contestant, Samples, in_turns};
use bcg_runtime::{Device, DeviceKind};
use clap::{Parser, ValueEnum};

/// Times replays and captures.
#[derive(Debug, Parser)]
struct Args {
    /// Where to run
    #[arg(long, value_enum, default_value_t = Where::Auto)]
    device: Where,
    /// Numbers of breaks, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "0,1,4,16,36,64")]
    breaks: Vec<usize>,
    /// Timed rounds of each comparison
    #[arg(long, default_value_t = 300)]
    rounds: usize,
    /// Also write the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Where {
    Auto,
    Host,
    Cuda,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let device = match args.device {
        Where::Host => Device::host(),
        Where::Cuda => Device::cuda(0)?,
        Where::Auto => {
            let (device, line) = Device::auto();
            println!("{line}");
            device
        }
    };
    let environment = Environment::read(device.name());
    println!("{}", environment.line());
    println!(
        "host time in µs, p10 / median / p90; segments of {SEGMENT_KERNELS} kernels, {BREAK_KERNELS} launches in a break"
    );
    let mut report = Report::new(environment);
    compare(&device, &args, &mut report)?;
    capture(&device, &args, &mut report)?;
    match &args.json {
        Some(path) => report.write(path),
        None => Ok(()),
    }
}

fn compare(device: &Device, args: &Args, report: &mut Report) -> Result<()> {
    println!(
        "\n{:>6}  {:^26}  {:^26}  {:^26}  {:^20}",
        "breaks", "chain replay", "raw driver calls", "eager", "replay / raw"
    );
    for &num_breaks in &args.breaks {
        let mut chain = Chain::new(device, num_breaks)?;
        let mut eager = EagerForward::new(device, num_breaks)?;
        let mut raw = (device.kind() == DeviceKind::Cuda).then(|| RawLoop::new(num_breaks)).transpose()?;
        let mut contestants: Vec<&mut dyn Contestant> = vec![&mut chain, &mut eager];
        contestants.extend(raw.as_mut().map(|raw| raw as &mut dyn Contestant));
        let times = in_turns(&mut contestants, args.rounds.div_ceil(10), args.rounds)?;
        let (chain, eager) = (Samples::new(times[0].clone()), Samples::new(times[1].clone()));
        let mut columns = vec![("chain_us", &chain), ("eager_us", &eager)];
        let against_raw = times.get(2).map(|raw| {
            let pairs: Vec<(f64, f64)> = times[0].iter().copied().zip(raw.iter().copied()).collect();
            (Samples::new(raw.clone()), Samples::ratios(&pairs))
        });
        let none = || "-".to_owned();
        let raw_cell = against_raw.as_ref().map_or_else(none, |(raw, _)| us(raw));
        let ratio_cell = against_raw.as_ref().map_or_else(none, |(_, ratio)| spread(ratio, 2));
        if let Some((raw, ratio)) = &against_raw {
            columns.extend([("raw_us", raw), ("chain_by_raw", ratio)]);
        }
        println!("{num_breaks:>6}  {:^26}  {raw_cell:^26}  {:^26}  {ratio_cell:^20}", us(&chain), us(&eager));
        report.row("replay", ("breaks", num_breaks), &columns);
    }
    Ok(())
}

fn capture(device: &Device, args: &Args, report: &mut Report) -> Result<()> {
    println!("\n{:>6}  {:^26}  {:>12}", "breaks", "capture, its run included", "segments / s");
    for &num_breaks in &args.breaks {
        let mut capture = Capture(Chain::new(device, num_breaks)?);
        let rounds = args.rounds.div_ceil(10);
        let times = in_turns(&mut [&mut capture], 3, rounds)?;
        let samples = Samples::new(times[0].clone());
        let rate = (num_breaks + 1) as f64 / samples.median() * 1e6;
        println!("{num_breaks:>6}  {:^26}  {rate:>12.0}", us(&samples));
        report.row("capture", ("breaks", num_breaks), &[("capture_us", &samples)]);
    }
    Ok(())
}

fn us(samples: &Samples) -> String {
    spread(samples, 1)
}

fn spread(samples: &Samples, digits: usize) -> String {
    let [p10, p50, p90] = [10, 50, 90].map(|percent| samples.percentile(percent));
    format!("{p10:.digits$} / {p50:.digits$} / {p90:.digits$}")
}
