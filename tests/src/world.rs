//! A small forward of several ranks, replayed many times under load: no replay hangs, and every one is right.
//!
//! `gpu world [--devices 0,1] [--replays N] [--layers N] [--mode healed|chain] [--delays] [--steady]` runs it on GPUs and
//! prints what a replay of all ranks costs the host; a test runs it on host devices.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bcg_kernels::{all_reduce, all_reduce_add_rms_norm};
use bcg_runtime::{
    BreakableCudaGraph, CommunicatorOptions, Context, DType, Device, Eager, LiveBatch, RankThreads, ReplayMode, Runner,
    RunnerOptions, Tensor, World, WorldOptions, eager_on_graph,
};

use crate::several;
/// Rows and columns of the stream of activations.
const ROWS: usize = 4;
const COLUMNS: usize = 1024;

/// Keeps rows of zeros zeros; all other sums are too large to change by it.
const EPS: f32 = 1e-6;

/// What one run does.
#[derive(Clone, Debug)]
pub struct Options {
    /// The devices of the ranks, in order.
    pub devices: Vec<usize>,
    /// How often the forward is replayed.
    pub replays: u64,
    /// Layers, each with a break and a sum over the ranks.
    pub layers: usize,
    /// How graphs are replayed.
    pub mode: ReplayMode,
    /// Whether ranks wait for random times before they come to a replay.
    pub delays: bool,
    /// Whether every replay does the same work: there is nothing to patch, as with a model.
    pub steady: bool,
}

impl Options {
    /// Reads the arguments of `gpu world`.
    ///
    /// # Errors
    /// For an argument that is none of them.
    pub fn parse(args: &[String]) -> Result<Self> {
        let mut options = Self {
            devices: vec![0, 1],
            replays: 100_000,
            layers: 4,
            mode: ReplayMode::Healed,
            delays: false,
            steady: false,
        };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--devices" => options.devices = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?,
                "--replays" => options.replays = value()?.parse()?,
                "--layers" => options.layers = value()?.parse()?,
                "--mode" => {
                    options.mode = match value()?.as_str() {
                        "healed" => ReplayMode::Healed,
                        "chain" => ReplayMode::Chain,
                        other => bail!("--mode {other}: expected healed or chain"),
                    }
                }
                "--delays" => options.delays = true,
                "--steady" => options.steady = true,
                other => bail!("unknown option {other}"),
            }
        }
        Ok(options)
    }
}

/// How many rows of this run are kept by the breaks.
struct Batch {
    keep: usize,
}

impl LiveBatch for Batch {}

/// Keeps the first rows of `x`, as many as the batch says, and zeroes the others.
#[eager_on_graph]
fn first_rows(cx: &mut Eager<'_, Batch>, x: &Tensor) -> bcg_runtime::Result<Tensor> {
    let out = cx.empty(x.shape(), x.dtype())?;
    cx.copy(&out, x)?;
    let keep = cx.live().keep.min(ROWS);
    cx.fill_zero(&out.rows(keep..ROWS)?)?;
    Ok(out)
}

/// One rank's part.
struct Lane {
    runner: Runner,
    graph: BreakableCudaGraph<Batch, (Tensor, Tensor)>,
    input: Tensor,
    rng: u64,
}

impl Lane {
    fn random(&mut self, below: u64) -> u64 {
        self.rng = self.rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.rng >> 33) % below
    }

    fn replay(&mut self, keep: usize) -> bcg_runtime::Result<(Tensor, Tensor, Duration)> {
        let begun = Instant::now();
        let (sum, normed) = self.graph.replay(&mut self.runner, &Batch { keep })?;
        Ok((sum, normed, begun.elapsed()))
    }
}

/// What the host spent on a replay, in microseconds.
#[derive(Debug, Default)]
pub struct HostTimes {
    /// From the order to all ranks' threads to the last one's return.
    pub world: Vec<f64>,
    /// Of the rank that was the fastest, which comes last and launches.
    pub rank: Vec<f64>,
}

/// Runs the forward on these devices and checks every result.
///
/// # Errors
/// The first error of a rank, or a result that is wrong.
pub fn run(devices: Vec<Device>, options: &Options) -> Result<HostTimes> {
    run_in(&World::new(devices, WorldOptions::default())?, options)
}

/// As [`run`], in a world that is there: on each of its nodes at once.
///
/// # Errors
/// As [`run`].
pub fn run_in(world: &World, options: &Options) -> Result<HostTimes> {
    let num_ranks = world.size();
    let (first, local) = (world.first_rank(), 0..world.num_local());
    let weights: Vec<_> = local
        .map(|local| world.device(local).tensor(&[COLUMNS], &[1.0f32; COLUMNS]))
        .collect::<bcg_runtime::Result<_>>()?;
    let mut lanes = Vec::new();
    for communicator in world.communicators(CommunicatorOptions::default())? {
        let rank = communicator.rank();
        let value = vec![(rank + 1) as f32; ROWS * COLUMNS];
        let input = world.device(rank - first).tensor(&[ROWS, COLUMNS], &value)?;
        let mut runner_options = RunnerOptions::default();
        runner_options.replay = options.mode;
        let runner = Runner::in_world(communicator, runner_options)?;
        lanes.push(Lane { runner, graph: BreakableCudaGraph::new("world"), input, rng: rank as u64 + 1 });
    }
    let mut ranks = RankThreads::start(world, lanes)?;
    let layers = options.layers;
    ranks.run(move |lane: &mut Lane| {
        let (x, weight) = (lane.input.clone(), weights[lane.runner.rank() - first].clone());
        let forward = move |cx: &mut Context<'_, Batch>| {
            let mut h = all_reduce(cx, &x)?;
            for _ in 0..layers {
                h = first_rows(cx, &h)?;
                h = all_reduce(cx, &h)?;
            }
            let residual = cx.empty(h.shape(), DType::F32)?;
            cx.fill_zero(&residual)?;
            let (normed, _) = all_reduce_add_rms_norm(cx, &h, &residual, &weight, EPS)?;
            Ok((h, normed))
        };
        lane.runner.eager(&Batch { keep: ROWS }, &forward)?; // loads every kernel
        lane.runner.synchronize()?;
        lane.graph.capture(&mut lane.runner, &Batch { keep: ROWS }, forward).map(|_| ())
    })?;
    let sum = (1..=num_ranks).map(|rank| rank as f32).sum::<f32>() * (num_ranks as f32).powi(layers as i32);
    let (delays, mut times) = (options.delays, HostTimes::default());
    for turn in 0..options.replays {
        let keep = 1 + if options.steady { 0 } else { (turn % ROWS as u64) as usize };
        let is_checked = turn % 16 == 0 || turn + 1 == options.replays;
        let begun = Instant::now();
        let took = ranks.run(move |lane: &mut Lane| {
            if delays && lane.random(8) == 0 {
                let until = Instant::now() + Duration::from_micros(lane.random(200));
                while Instant::now() < until {
                    std::hint::spin_loop();
                }
            }
            let (h, normed, took) = lane.replay(keep)?;
            if is_checked {
                check(&lane.runner.read::<f32>(&h)?, keep, sum)?;
                check(&lane.runner.read::<f32>(&normed)?, keep, 1.0)?;
            }
            Ok(took)
        });
        let took = took.with_context(|| format!("replay {turn}"))?;
        if !is_checked && !delays {
            times.world.push(begun.elapsed().as_secs_f64() * 1e6);
            times.rank.push(took.iter().min().map_or(0.0, Duration::as_secs_f64) * 1e6);
        }
    }
    let path = ranks.first().graph.last_replay();
    ensure!(path.is_some(), "no replay was made");
    println!("last replay: {path:?}; {} merged", ranks.first().graph.describe().num_merged);
    Ok(times)
}

/// Checks that the first rows hold `value` and the others zeros.
fn check(values: &[f32], keep: usize, value: f32) -> bcg_runtime::Result<()> {
    let wrong = values.iter().enumerate().find(|(at, got)| {
        let expected = if at / COLUMNS < keep { value } else { 0.0 };
        (**got - expected).abs() > expected * 1e-6
    });
    match wrong {
        None => Ok(()),
        Some((at, got)) => Err(bcg_runtime::Error::other(format!("element {at} is {got}, of {keep} rows of {value}"))),
    }
}

/// `gpu world`.
///
/// # Errors
/// As [`run`].
pub fn main(args: &[String]) -> Result<()> {
    let options = Options::parse(args)?;
    let devices = several::open(&options.devices)?;
    let begun = Instant::now();
    let mut times = run(devices, &options)?;
    println!("{} replays in {:.1} s, all right: {options:?}", options.replays, begun.elapsed().as_secs_f64());
    for (name, times) in [("all ranks", &mut times.world), ("the rank that launches", &mut times.rank)] {
        if times.is_empty() {
            continue;
        }
        times.sort_by(f64::total_cmp);
        let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
        println!("host time, {name}: p10 {:.1} p50 {:.1} p90 {:.1} p99 {:.1} us", at(0.1), at(0.5), at(0.9), at(0.99));
    }
    Ok(())
}
