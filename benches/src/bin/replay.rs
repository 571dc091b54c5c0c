//! Host time of a replay with 0 to 64 breaks, against the same forward run eagerly and, on CUDA, against the same driver
//! calls in a bare loop; all in turns, in one run. Also the time of a capture.

use std::path::PathBuf;

use anyhow::Result;
use bcg_bench::program::{BREAK_KERNELS, Capture, Chain, EagerForward, SEGMENT_KERNELS};
use bcg_bench::raw::RawLoop;
use bcg_bench::turns::{Contestant, in_turns};
use bcg_runtime::{Device, DeviceKind};
use bcg_server::cli::bench::report::{Cell, Environment, Report};
use bcg_server::cli::bench::timing::Samples;
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
    let mut report = Report::new(Environment::read(device.name()));
    report.note(format!(
        "host time in µs, median (p10..p90); segments of {SEGMENT_KERNELS} kernels, {BREAK_KERNELS} launches in a break"
    ));
    compare(&device, &args, &mut report)?;
    capture(&device, &args, &mut report)?;
    report.publish(args.json.as_deref())
}

fn compare(device: &Device, args: &Args, report: &mut Report) -> Result<()> {
    for &num_breaks in &args.breaks {
        let mut chain = Chain::new(device, num_breaks)?;
        let mut eager = EagerForward::new(device, num_breaks)?;
        let mut raw = (device.kind() == DeviceKind::Cuda).then(|| RawLoop::new(num_breaks)).transpose()?;
        let mut contestants: Vec<&mut dyn Contestant> = vec![&mut chain, &mut eager];
        contestants.extend(raw.as_mut().map(|raw| raw as &mut dyn Contestant));
        let times = in_turns(&mut contestants, args.rounds.div_ceil(10), args.rounds)?;
        let against_raw = times.get(2).map(|raw| {
            let pairs: Vec<(f64, f64)> = times[0].iter().copied().zip(raw.iter().copied()).collect();
            (Samples::new(raw.clone()), Samples::ratios(&pairs))
        });
        let (raw, ratio) =
            against_raw.map_or((Cell::Missing, Cell::Missing), |(raw, ratio)| (raw.into(), ratio.into()));
        report.row(
            "replay",
            vec![
                ("breaks", num_breaks.into()),
                ("chain_us", Samples::new(times[0].clone()).into()),
                ("raw_us", raw),
                ("eager_us", Samples::new(times[1].clone()).into()),
                ("chain_by_raw", ratio),
            ],
        );
    }
    Ok(())
}

fn capture(device: &Device, args: &Args, report: &mut Report) -> Result<()> {
    for &num_breaks in &args.breaks {
        let mut capture = Capture(Chain::new(device, num_breaks)?);
        let rounds = args.rounds.div_ceil(10);
        let times = in_turns(&mut [&mut capture], 3, rounds)?;
        let samples = Samples::new(times[0].clone());
        let rate = (num_breaks + 1) as f64 / samples.median() * 1e6;
        report.row(
            "capture, its run included",
            vec![("breaks", num_breaks.into()), ("capture_us", samples.into()), ("segments_per_s", rate.into())],
        );
    }
    Ok(())
}
