//! Time of matrix products of bf16, with the algorithm that the heuristics name first and with the tuned one, in turns:
//! replays of a graph of products, each with a weight that is not in the cache. Also the time of tuning. With choices in
//! the cache folder, both are the tuned one: name an empty folder in `BCG_CACHE_DIR`.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result};
use bcg_benches::report::{Environment, Report};
use bcg_benches::timing::Samples;
use bcg_benches::turns::{Contestant, in_turns};
use bcg_runtime::{BreakableCudaGraph, Context, DType, Device, Runner, RunnerOptions, Tensor};
use clap::Parser;
use half::bf16;

/// All weights of one product together take at least this much: three times the cache of an H200.
const COLD_BYTES: usize = 160 << 20;

/// Times matrix products.
#[derive(Debug, Parser)]
struct Args {
    /// Products as outputs x inputs, separated by commas; those of Qwen3 8B unless told
    #[arg(long, value_delimiter = ',', default_value = "6144x4096,4096x4096,24576x4096,4096x12288")]
    shapes: Vec<String>,
    /// Numbers of rows, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "1,16,64,256,1024,4096")]
    rows: Vec<usize>,
    /// Timed rounds of each comparison
    #[arg(long, default_value_t = 20)]
    rounds: usize,
    /// Products in a graph
    #[arg(long, default_value_t = 12)]
    products: usize,
    /// Also write the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let device = Device::cuda(0)?;
    let mut report = Report::new(Environment::read(device.name()));
    report.note("time of one product in µs, median (p10..p90); first: the heuristics' first choice");
    for shape in &args.shapes {
        let (outputs, depth) = shape.split_once('x').context("a shape is outputs x inputs, such as 4096x4096")?;
        let product = Product::new(&device, outputs.parse()?, depth.parse()?, &args)?;
        compare(&device, &product, &args, shape, &mut report)?;
    }
    report.publish(args.json.as_deref())
}

fn compare(device: &Device, product: &Product, args: &Args, shape: &str, report: &mut Report) -> Result<()> {
    // The largest first: a product is tuned up to the most rows that were seen.
    let rows: Vec<usize> = args.rows.iter().rev().copied().collect();
    let capture = |rows| Replay::capture(device, product, rows, args.products);
    let mut first = rows.iter().map(|rows| capture(*rows)).collect::<Result<Vec<_>>>()?;
    let begun = Instant::now();
    let tuning = device.tune_matmuls(&args.rows, &mut |_, _| ())?;
    let took = begun.elapsed();
    for (first, rows) in first.iter_mut().zip(rows).rev() {
        let mut tuned = capture(rows)?;
        let times = in_turns(&mut [first, &mut tuned], 2, args.rounds)?;
        let each = |times: &Vec<f64>| Samples::new(times.iter().map(|us| us / args.products as f64).collect());
        let (first, tuned) = (each(&times[0]), each(&times[1]));
        let (flops, bytes) = product.work(rows);
        let us = tuned.median();
        report.row(
            "matmul",
            vec![
                ("outputs_x_inputs", shape.into()),
                ("rows", rows.into()),
                ("first_us", first.into()),
                ("tuned_us", tuned.into()),
                ("tflops", (flops / us / 1e6).into()),
                ("gbps", (bytes / us / 1e3).into()),
            ],
        );
    }
    let changed = tuning.timed.iter().filter(|timed| timed.best_us < timed.first_us).count();
    report.row(
        "tuning",
        vec![
            ("outputs_x_inputs", shape.into()),
            ("timed", tuning.timed.len().into()),
            ("changed", changed.into()),
            ("known", tuning.num_known.into()),
            ("seconds", took.as_secs_f64().into()),
        ],
    );
    Ok(())
}

/// A product with enough weights to be always cold.
struct Product {
    outputs: usize,
    depth: usize,
    x: Tensor,
    weights: Vec<Tensor>,
}

impl Product {
    fn new(device: &Device, outputs: usize, depth: usize, args: &Args) -> Result<Self> {
        let mut state = 1u32;
        let mut random = |len: usize| -> Vec<bf16> {
            let mut number = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                bf16::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
            };
            (0..len).map(|_| number()).collect()
        };
        let rows = args.rows.iter().copied().max().unwrap_or(1);
        let x = device.tensor(&[rows, depth], &random(rows * depth))?;
        let numbers = random(outputs * depth);
        let num_weights = (COLD_BYTES / (2 * outputs * depth)).clamp(1, args.products - 1) + 1;
        let weights = (0..num_weights).map(|_| device.tensor(&[outputs, depth], &numbers));
        Ok(Self { outputs, depth, x, weights: weights.collect::<bcg_runtime::Result<_>>()? })
    }

    /// Operations and bytes of one product.
    fn work(&self, rows: usize) -> (f64, f64) {
        let elements = self.outputs * self.depth + rows * (self.outputs + self.depth);
        (2.0 * (rows * self.outputs * self.depth) as f64, 2.0 * elements as f64)
    }
}

/// A captured graph of products.
struct Replay {
    runner: Runner,
    graph: BreakableCudaGraph<(), ()>,
}

impl Replay {
    fn capture(device: &Device, product: &Product, rows: usize, num_products: usize) -> Result<Self> {
        let x = product.x.rows(0..rows)?;
        let (weights, outputs) = (product.weights.clone(), product.outputs);
        let forward = move |cx: &mut Context<'_, ()>| {
            let out = cx.empty(&[rows, outputs], DType::Bf16)?;
            let between = cx.empty(&[64], DType::U8)?; // small work stands between products, as in a model
            (0..num_products).try_for_each(|idx| {
                cx.matmul(&out, &x, &weights[idx % weights.len()])?;
                cx.fill_zero(&between)
            })
        };
        let mut runner = Runner::new(device, RunnerOptions::default())?;
        runner.eager(&(), &forward)?; // loads kernels, and makes the arena large enough
        let mut graph = BreakableCudaGraph::new("products");
        graph.capture(&mut runner, &(), forward)?;
        Ok(Self { runner, graph })
    }
}

impl Contestant for Replay {
    fn enqueue(&mut self) -> Result<()> {
        self.graph.replay(&mut self.runner, &())?;
        Ok(self.runner.synchronize()?) // the device's time is what counts here
    }

    fn wait(&mut self) -> Result<()> {
        Ok(())
    }
}
