//! Host time of a replay with 0 to 64 breaks, as a chain and healed, against the same forward run eagerly and, on CUDA,
//! against bare driver calls: those of the chain in a loop, and one graph of everything. Arguments of the launches in breaks
//! differ at each replay, or (`same`) never. All in turns, in one run. Also the time of a capture.

use std::path::PathBuf;

use anyhow::Result;
use bcg_benches::program::{BREAK_KERNELS, BreakArgs, Capture, EagerForward, Replay, SEGMENT_KERNELS};
use bcg_benches::raw::{RawLoop, RawMerged};
use bcg_benches::report::{Cell, Environment, Report};
use bcg_benches::timing::Samples;
use bcg_benches::turns::{Contestant, in_turns};
use bcg_runtime::{Device, DeviceKind, ReplayMode};
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

/// All that run here, by name.
fn contestants(device: &Device, num_breaks: usize) -> Result<Vec<(&'static str, Box<dyn Contestant>)>> {
    let mut contestants: Vec<(_, Box<dyn Contestant>)> = vec![
        ("chain", Box::new(Replay::new(device, num_breaks, ReplayMode::Chain, BreakArgs::Changing)?)),
        ("healed", Box::new(Replay::new(device, num_breaks, ReplayMode::Healed, BreakArgs::Changing)?)),
        ("healed same", Box::new(Replay::new(device, num_breaks, ReplayMode::Healed, BreakArgs::Same)?)),
        ("eager", Box::new(EagerForward::new(device, num_breaks)?)),
    ];
    if device.kind() == DeviceKind::Cuda {
        contestants.push(("raw loop", Box::new(RawLoop::new(num_breaks)?)));
        contestants.push(("raw merged", Box::new(RawMerged::new(num_breaks, BreakArgs::Changing)?)));
        contestants.push(("raw merged same", Box::new(RawMerged::new(num_breaks, BreakArgs::Same)?)));
    }
    Ok(contestants)
}

fn compare(device: &Device, args: &Args, report: &mut Report) -> Result<()> {
    for &num_breaks in &args.breaks {
        let mut contestants = contestants(device, num_breaks)?;
        let mut in_order: Vec<&mut dyn Contestant> = Vec::new();
        contestants.iter_mut().for_each(|(_, contestant)| in_order.push(contestant.as_mut()));
        let times = in_turns(&mut in_order, args.rounds.div_ceil(10), args.rounds)?;
        let of = |wanted| contestants.iter().position(|(name, _)| *name == wanted).map(|index| &times[index]);
        let time = |name| of(name).map_or(Cell::Missing, |times| Samples::new(times.clone()).into());
        let ratio = |name, raw| {
            let (Some(times), Some(raw)) = (of(name), of(raw)) else { return Cell::Missing };
            let pairs: Vec<(f64, f64)> = times.iter().copied().zip(raw.iter().copied()).collect();
            Samples::ratios(&pairs).into()
        };
        report.row(
            "replay",
            vec![
                ("breaks", num_breaks.into()),
                ("chain_us", time("chain")),
                ("raw_us", time("raw loop")),
                ("healed_us", time("healed")),
                ("raw_merged_us", time("raw merged")),
                ("healed_same_us", time("healed same")),
                ("raw_merged_same_us", time("raw merged same")),
                ("eager_us", time("eager")),
                ("chain_by_raw", ratio("chain", "raw loop")),
                ("healed_by_raw", ratio("healed", "raw merged")),
                ("chain_by_healed", ratio("chain", "healed")),
            ],
        );
    }
    Ok(())
}

fn capture(device: &Device, args: &Args, report: &mut Report) -> Result<()> {
    for &num_breaks in &args.breaks {
        let mut capture = Capture(Replay::new(device, num_breaks, ReplayMode::Healed, BreakArgs::Same)?);
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
