//! Two devices of which one prefills what the other one decodes: rows that arrive, models in two roles, and times.
//!
//! `gpu roles [--devices 0,1] [--only checks|timing]` runs the rules on GPUs, both roles on one if it is named twice, and then
//! prints how long the rows of a prompt take to get from the first GPU to the second one; a test runs the rules on host
//! devices.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bcg_kernels::{PushRows, push_rows};
use bcg_runtime::{BreakableCudaGraph, Context, DType, Device, Eager, Runner, RunnerOptions, Tensor, eager_on_graph};

use super::golden;
use super::several::SeveralArgs;

/// What the keys, and the values, of Qwen3-8B have in a layer: 8 heads of 128 dimensions. And its layers.
const COLUMNS: usize = 1024;
const LAYERS: usize = 36;
/// Tokens of a page.
const PAGE: usize = 16;
/// Tokens of a prompt.
const TOKENS: [usize; 4] = [16, 256, 1024, 4096];
/// Measurements of one kind.
const SAMPLES: usize = 40;

/// `gpu roles`.
///
/// # Errors
/// For an argument that is none of its own, a rule that is broken, or an error of a device.
pub fn main(args: &[String]) -> Result<()> {
    let options = SeveralArgs::parse(args, None)?;
    let devices = options.open()?;
    let devices: [Device; 2] = devices
        .try_into()
        .ok()
        .with_context(|| format!("--devices {:?}: expected one for each of two roles", options.devices))?;
    if options.checks {
        let begun = Instant::now();
        rows_arrive(&devices, 2000)?;
        println!("rows arrive, {:.1} s", begun.elapsed().as_secs_f64());
        for checkpoint in golden::CHECKPOINTS {
            for (name, rule) in golden::ROLES_RULES {
                rule(&devices, checkpoint);
                println!("{checkpoint}: {name}");
            }
        }
    }
    if options.timing { time(&devices) } else { Ok(()) }
}

/// Rows of two tensors, and where they go.
#[derive(Clone)]
struct Rows {
    sources: [Tensor; 2],
    targets: [Tensor; 2],
    runs: Tensor,
    count: Tensor,
}

#[eager_on_graph]
fn push(
    cx: &mut Eager<'_, ()>,
    sources: &[Tensor; 2],
    targets: &[Tensor; 2],
    list: &[Tensor; 2],
) -> bcg_runtime::Result<()> {
    let ([a, b], [far_a, far_b], [runs, count]) = (sources, targets, list);
    push_rows(cx, &PushRows { sources: [a, b], targets: [far_a, far_b], runs, count, rows_max: PAGE })
}

fn forward(cx: &mut Context<'_, ()>, layers: &[Rows]) -> bcg_runtime::Result<()> {
    layers.iter().try_for_each(|rows| push(cx, &rows.sources, &rows.targets, &[rows.runs.clone(), rows.count.clone()]))
}

/// One graph pushes other rows at each of `replays` replays, by lists in device memory: once the host has waited for the
/// first device, the second one reads them, and nothing beside them.
///
/// # Errors
/// The first row that is wrong; a device's.
pub fn rows_arrive([near, far]: &[Device; 2], replays: usize) -> Result<()> {
    const ROWS: usize = 512;
    const WIDTHS: [usize; 2] = [24, 5];
    let mut runner = Runner::new(near, RunnerOptions::default())?;
    let values = WIDTHS.map(|width| (0..(ROWS * width) as i32).collect::<Vec<_>>());
    let runs_max = ROWS / PAGE;
    let rows = Rows {
        sources: [near.tensor(&[ROWS, WIDTHS[0]], &values[0])?, near.tensor(&[ROWS, WIDTHS[1]], &values[1])?],
        targets: {
            let zeros = |width| far.zeros_shared(std::slice::from_ref(near), &[ROWS, width], DType::I32);
            [zeros(WIDTHS[0])?, zeros(WIDTHS[1])?]
        },
        runs: near.zeros(&[runs_max, 4], DType::I32)?,
        count: near.zeros(&[1], DType::I32)?,
    };
    let mut graph = BreakableCudaGraph::new("push");
    let layers = vec![rows.clone()];
    graph.capture_ahead(&mut runner, &(), move |cx| forward(cx, &layers))?;
    let mut expected = WIDTHS.map(|width| vec![0; ROWS * width]);
    let mut state = 7_u64;
    for replay in 0..replays {
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        // Each target page once, from any row.
        let (count, shift) = (random(runs_max + 1), random(runs_max));
        let mut list = Vec::new();
        for page in 0..count {
            let rows = random(PAGE) + 1;
            let (source, target) = (random(ROWS - rows + 1), (page + shift) % runs_max * PAGE);
            list.extend([source, target, rows, 0].map(|number| number as i32));
            for (expected, (values, width)) in expected.iter_mut().zip(values.iter().zip(WIDTHS)) {
                expected[target * width..][..rows * width].copy_from_slice(&values[source * width..][..rows * width]);
            }
        }
        list.resize(4 * runs_max, -1);
        let (runs, count) = (near.tensor(&[runs_max, 4], &list)?, near.tensor(&[1], &[count as i32])?);
        runner.eager(&(), |cx| {
            cx.copy(&rows.runs, &runs)?;
            cx.copy(&rows.count, &count)
        })?;
        graph.replay(&mut runner, &())?;
        runner.synchronize()?;
        for (target, expected) in rows.targets.iter().zip(&expected) {
            ensure!(far.read::<i32>(target)? == *expected, "replay {replay}: not the rows of its list");
        }
    }
    Ok(())
}

/// Times the keys and values of a prompt in all layers of Qwen3-8B, one layer after the other in a healed graph.
fn time([near, far]: &[Device; 2]) -> Result<()> {
    let mut runner = Runner::new(near, RunnerOptions::default())?;
    let most = TOKENS.iter().copied().max().unwrap_or(0);
    let source = || near.zeros(&[most, COLUMNS], DType::Bf16);
    let target = || far.zeros_shared(std::slice::from_ref(near), &[most, COLUMNS], DType::Bf16);
    // The pages there lie in another order.
    let pages = (most / PAGE) as i32;
    let list: Vec<i32> =
        (0..pages).flat_map(|page| [page * PAGE as i32, (page * 37 % pages) * PAGE as i32, PAGE as i32, 0]).collect();
    let (runs, count) = (near.tensor(&[pages as usize, 4], &list)?, near.zeros(&[1], DType::I32)?);
    let layers = (0..LAYERS).map(|_| {
        let (runs, count) = (runs.clone(), count.clone());
        Ok(Rows { sources: [source()?, source()?], targets: [target()?, target()?], runs, count })
    });
    let layers = layers.collect::<bcg_runtime::Result<Vec<_>>>()?;
    let mut graph = BreakableCudaGraph::new("push");
    graph.capture_ahead(&mut runner, &(), move |cx| forward(cx, &layers))?;
    println!("{LAYERS} layers of {COLUMNS} keys and values, bf16, in one graph; us of a layer:");
    println!("{:>8} {:>8} {:>8} {:>8} {:>8}", "tokens", "p10", "p50", "p90", "GB/s");
    for tokens in TOKENS {
        let counted = near.tensor(&[1], &[(tokens / PAGE) as i32])?;
        runner.eager(&(), |cx| cx.copy(&count, &counted))?;
        let mut sample = |replays: u32| -> Result<f64> {
            runner.synchronize()?;
            let begun = Instant::now();
            for _ in 0..replays {
                graph.replay(&mut runner, &())?;
            }
            runner.synchronize()?;
            Ok(begun.elapsed().as_secs_f64() * 1e6 / f64::from(replays) / LAYERS as f64)
        };
        sample(3)?;
        let one = Duration::from_secs_f64(sample(10)? * LAYERS as f64 * 1e-6);
        let replays = (Duration::from_millis(5).as_secs_f64() / one.as_secs_f64()).ceil().clamp(1.0, 200.0) as u32;
        let mut times = (0..SAMPLES).map(|_| sample(replays)).collect::<Result<Vec<_>>>()?;
        times.sort_by(f64::total_cmp);
        let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
        let bytes = 2 * tokens * COLUMNS * DType::Bf16.size_bytes();
        println!(
            "{tokens:>8} {:>8.2} {:>8.2} {:>8.2} {:>8.1}",
            at(0.1),
            at(0.5),
            at(0.9),
            bytes as f64 / at(0.5) / 1e3
        );
    }
    Ok(())
}
