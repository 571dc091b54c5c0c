//! How long sums over the ranks take, one after the other in a graph, as in the layers of a model.

use std::time::{Duration, Instant};

use anyhow::Result;
use bcg_kernels::{add_rms_norm, all_reduce, all_reduce_add_rms_norm};
use bcg_runtime::{
    BreakableCudaGraph, CommunicatorOptions, Context, DType, RankThreads, Runner, RunnerOptions, Tensor, World,
};

/// Sums in a row in one graph.
const SUMS: usize = 40;

/// Bytes of a message.
const BYTES: [usize; 10] =
    [2 << 10, 8 << 10, 64 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20, 8 << 20, 16 << 20];

/// Rows of activations, and their width.
const ROWS: [usize; 6] = [1, 16, 64, 138, 512, 2048];
const COLUMNS: usize = 6144;

/// Measurements of one kind.
const SAMPLES: usize = 40;
/// Beneath this a measurement is of several replays, so that starting and ending it costs little.
const SAMPLE: Duration = Duration::from_millis(3);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Sum,
    Fused,
    Unfused,
}

struct Lane {
    runner: Runner,
    x: Tensor,
    weight: Tensor,
    graph: BreakableCudaGraph<(), Tensor>,
}

impl Lane {
    /// Replays as often, and returns the time of one sum.
    fn time(&mut self, replays: u32) -> bcg_runtime::Result<f64> {
        let begun = Instant::now();
        for _ in 0..replays {
            self.graph.replay(&mut self.runner, &())?;
        }
        self.runner.synchronize()?;
        Ok(begun.elapsed().as_secs_f64() * 1e6 / f64::from(replays) / SUMS as f64)
    }
}

fn forward(cx: &mut Context<'_, ()>, kind: Kind, x: &Tensor, weight: &Tensor) -> bcg_runtime::Result<Tensor> {
    let mut h = x.clone();
    let mut residual = x.clone();
    for _ in 0..SUMS {
        (h, residual) = match kind {
            Kind::Sum => (all_reduce(cx, &h)?, residual),
            Kind::Fused => all_reduce_add_rms_norm(cx, &h, &residual, weight, 1e-6)?,
            Kind::Unfused => {
                let reduced = all_reduce(cx, &h)?;
                add_rms_norm(cx, &reduced, &residual, weight, 1e-6)?
            }
        };
    }
    Ok(h)
}

/// Times the sums, and prints a table.
pub(crate) fn run(world: &World) -> Result<()> {
    let largest = BYTES.iter().copied().max().unwrap_or(0).max(ROWS[ROWS.len() - 1] * COLUMNS * 2);
    let inputs = (0..world.num_local())
        .map(|local| {
            let device = world.device(local);
            Ok((device.zeros(&[largest / 2], DType::Bf16)?, device.zeros(&[COLUMNS], DType::Bf16)?))
        })
        .collect::<bcg_runtime::Result<Vec<_>>>()?;
    let mut lanes = Vec::new();
    for (communicator, (x, weight)) in world.communicators(CommunicatorOptions::default())?.into_iter().zip(inputs) {
        let runner = Runner::in_world(communicator, RunnerOptions::default())?;
        lanes.push(Lane { runner, x, weight, graph: BreakableCudaGraph::new("sums") });
    }
    let mut ranks = RankThreads::start(world, lanes)?;
    let mut lines = Vec::new();
    for bytes in BYTES {
        let times = time(&mut ranks, Kind::Sum, 1, bytes / 2)?;
        lines.push(line(&format!("all_reduce, {} KiB", bytes >> 10), &times));
    }
    for rows in ROWS {
        for (kind, name) in [(Kind::Fused, "all_reduce_add_rms_norm"), (Kind::Unfused, "all_reduce, add_rms_norm")] {
            let times = time(&mut ranks, kind, rows, COLUMNS)?;
            lines.push(line(&format!("{name}, {rows} x {COLUMNS}"), &times));
        }
    }
    if world.node() > 0 {
        return Ok(());
    }
    println!("{} ranks, bf16, us of one of {SUMS} in a row in a graph:", world.size());
    println!("{:<42} {:>8} {:>8} {:>8}", "", "p10", "p50", "p90");
    for line in lines {
        println!("{line}");
    }
    Ok(())
}

fn line(name: &str, times: &[f64]) -> String {
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
    format!("{name:<42} {:>8.2} {:>8.2} {:>8.2}", at(0.1), at(0.5), at(0.9))
}

/// Captures the forward on all ranks, and returns the sorted times of one sum, of the slowest rank.
fn time(ranks: &mut RankThreads<Lane>, kind: Kind, rows: usize, columns: usize) -> Result<Vec<f64>> {
    ranks.run(move |lane: &mut Lane| {
        let x = lane.x.rows(0..rows * columns)?.reshape(&[rows, columns])?;
        let weight = lane.weight.clone();
        lane.runner.eager(&(), |cx| forward(cx, kind, &x, &weight))?; // loads the kernels, and maps the arena
        lane.runner.synchronize()
    })?;
    ranks.run(move |lane: &mut Lane| {
        let x = lane.x.rows(0..rows * columns)?.reshape(&[rows, columns])?;
        let weight = lane.weight.clone();
        lane.graph.capture_ahead(&mut lane.runner, &(), move |cx| forward(cx, kind, &x, &weight))
    })?;
    let slowest = |ranks: &mut RankThreads<Lane>, replays: u32| -> Result<f64> {
        let times = ranks.run(move |lane: &mut Lane| lane.time(replays))?;
        Ok(times.into_iter().fold(0.0, f64::max))
    };
    slowest(ranks, 3)?;
    let one = slowest(ranks, 10)? * SUMS as f64 * 1e-6;
    let replays = (SAMPLE.as_secs_f64() / one).ceil().clamp(1.0, 200.0) as u32;
    // All nodes replay as often, whatever each has measured.
    let world = ranks.world().clone();
    let said = world.exchange("a number of replays", replays.to_le_bytes().to_vec(), world.timeout())?;
    let replays = said[0].as_slice().try_into().map_or(replays, u32::from_le_bytes);
    let mut times = (0..SAMPLES).map(|_| slowest(ranks, replays)).collect::<Result<Vec<_>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times)
}
