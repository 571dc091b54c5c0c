//! How long a layer of experts takes, one after the other in a graph, as in a model: its products alone, and with what brings
//! rows to them and sums.

use std::time::{Duration, Instant};

use anyhow::Result;
use bcg_kernels::{all_reduce_add_rms_norm, fill_random, moe_route};
use bcg_runtime::{
    BreakableCudaGraph, CommunicatorOptions, Context, DType, OpStream, RankThreads, Runner, RunnerOptions, Tensor,
    World,
};

use super::case::Inputs;
use super::layer::{Way, layer, products, scoring};

/// The geometry of Qwen3-30B-A3B's layers.
const COLUMNS: usize = 2048;
const INNER: usize = 768;
const EXPERTS: usize = 128;
const CHOSEN: usize = 8;

const TOKENS: [usize; 5] = [1, 16, 64, 256, 1024];
/// Layers in a row in one graph. Each has other logits, so that a layer finds few weights of the one before in the cache.
const LAYERS: usize = 20;

/// Measurements of one kind.
const SAMPLES: usize = 40;
/// Beneath this a measurement is of several replays, so that starting and ending it costs little.
const SAMPLE: Duration = Duration::from_millis(3);

/// What a layer consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The choice of experts and the two products.
    Products,
    /// The sum of the experts and that over the ranks, with a norm, alone.
    Sums,
    /// The whole layer, with the norm behind it.
    Layer(Way),
}

const KINDS: [(Kind, &str); 5] = [
    (Kind::Products, "choice and products"),
    (Kind::Sums, "all_reduce_add_rms_norm alone"),
    (Kind::Layer(Way::None), "layer, all ranks have all rows"),
    (Kind::Layer(Way::Push), "layer, rows are pushed"),
    (Kind::Layer(Way::AllToAll), "layer, messages of one size"),
];

struct Lane {
    runner: Runner,
    /// Rows of the largest batch, logits of each layer.
    inputs: Inputs,
    weight: Tensor,
    graph: BreakableCudaGraph<(), Tensor>,
}

impl Lane {
    /// The inputs of each layer of a batch of so many rows.
    fn layers(&self, tokens: usize) -> bcg_runtime::Result<Vec<Inputs>> {
        let all = &self.inputs;
        let of_layer = |layer: usize| {
            let logits = all.logits.rows(layer * tokens..(layer + 1) * tokens)?;
            Ok(Inputs { x: all.x.rows(0..tokens)?, logits, ..all.clone() })
        };
        (0..LAYERS).map(of_layer).collect()
    }

    /// Replays as often, and returns the time of one layer.
    fn time(&mut self, replays: u32) -> bcg_runtime::Result<f64> {
        let begun = Instant::now();
        for _ in 0..replays {
            self.graph.replay(&mut self.runner, &())?;
        }
        self.runner.synchronize()?;
        Ok(begun.elapsed().as_secs_f64() * 1e6 / f64::from(replays) / LAYERS as f64)
    }
}

fn forward(cx: &mut Context<'_, ()>, kind: Kind, layers: &[Inputs], weight: &Tensor) -> bcg_runtime::Result<Tensor> {
    let mut h = layers[0].x.clone();
    let mut residual = h.clone();
    for inputs in layers {
        let inputs = Inputs { x: h.clone(), ..inputs.clone() };
        match kind {
            Kind::Products => chosen_products(cx, &inputs)?,
            Kind::Sums => (h, residual) = all_reduce_add_rms_norm(cx, &h, &residual, weight, 1e-6)?,
            Kind::Layer(way) => {
                let partial = layer(cx, way, &inputs, CHOSEN)?;
                (h, residual) = all_reduce_add_rms_norm(cx, &partial, &residual, weight, 1e-6)?;
            }
        }
    }
    Ok(h)
}

fn chosen_products(cx: &mut OpStream, inputs: &Inputs) -> bcg_runtime::Result<()> {
    let of_rank = EXPERTS / cx.world_size();
    let own = cx.rank() * of_rank..(cx.rank() + 1) * of_rank;
    let routing = moe_route(cx, &inputs.logits, &scoring(CHOSEN), &inputs.num_valid, own)?;
    products(cx, &inputs.x, inputs, &routing).map(|_| ())
}

fn inputs(world: &World, rank: usize) -> Result<(Inputs, Tensor)> {
    let (device, own) = (world.device(rank), EXPERTS / world.size());
    let tokens = TOKENS[TOKENS.len() - 1];
    let mut state = 1_u64; // all ranks have the same logits
    let logits: Vec<f32> = (0..LAYERS * tokens * EXPERTS)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect();
    let inputs = Inputs {
        x: device.zeros(&[tokens, COLUMNS], DType::Bf16)?,
        logits: device.tensor(&[LAYERS * tokens, EXPERTS], &logits)?,
        num_valid: device.tensor(&[1], &[tokens as i32])?,
        gate_up: device.zeros(&[own, 2 * INNER, COLUMNS], DType::Bf16)?,
        down: device.zeros(&[own, COLUMNS, INNER], DType::Bf16)?,
        shared: None,
    };
    Ok((inputs, device.zeros(&[COLUMNS], DType::Bf16)?))
}

/// Times layers, and prints a table.
pub(super) fn run(world: &World) -> Result<()> {
    let inputs = (0..world.size()).map(|rank| inputs(world, rank)).collect::<Result<Vec<_>>>()?;
    let mut lanes = Vec::new();
    for (communicator, (inputs, weight)) in world.communicators(CommunicatorOptions::default())?.into_iter().zip(inputs)
    {
        let runner = Runner::in_world(communicator, RunnerOptions::default())?;
        lanes.push(Lane { runner, inputs, weight, graph: BreakableCudaGraph::new("experts") });
    }
    let mut ranks = RankThreads::start(world, lanes)?;
    ranks.run(|lane: &mut Lane| {
        let Lane { runner, inputs, .. } = lane;
        for (seed, tensor) in [&inputs.x, &inputs.gate_up, &inputs.down].into_iter().enumerate() {
            runner.eager(&(), |cx| fill_random(cx, tensor, seed as u64, 0.0, 0.02))?;
        }
        runner.synchronize()
    })?;
    let sizes = format!("C={COLUMNS}, E={EXPERTS}, K={CHOSEN}, I={INNER}");
    println!("{} ranks, bf16, {sizes}, us of one of {LAYERS} layers in a row in a graph:", world.size());
    println!("{:<48} {:>8} {:>8} {:>8} {:>14}", "", "p10", "p50", "p90", "over products");
    for tokens in TOKENS {
        let mut products = 0.0;
        for (kind, name) in KINDS {
            let is_sent = matches!(kind, Kind::Layer(Way::Push | Way::AllToAll));
            if is_sent && !tokens.is_multiple_of(world.size()) {
                continue;
            }
            let times = time(&mut ranks, kind, tokens)?;
            let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
            if kind == Kind::Products {
                products = at(0.5);
            }
            let over =
                if matches!(kind, Kind::Layer(_)) { format!("{:.2}", at(0.5) - products) } else { String::new() };
            let name = format!("T={tokens}, {name}");
            println!("{name:<48} {:>8.2} {:>8.2} {:>8.2} {over:>14}", at(0.1), at(0.5), at(0.9));
        }
    }
    Ok(())
}

/// Captures layers on all ranks, and returns the sorted times of one, of the slowest rank.
fn time(ranks: &mut RankThreads<Lane>, kind: Kind, tokens: usize) -> Result<Vec<f64>> {
    ranks.run(move |lane: &mut Lane| {
        let (layers, weight) = (lane.layers(tokens)?, lane.weight.clone());
        lane.runner.eager(&(), |cx| forward(cx, kind, &layers, &weight))?; // loads the kernels, and maps the arena
        lane.runner.synchronize()
    })?;
    ranks.run(move |lane: &mut Lane| {
        let (layers, weight) = (lane.layers(tokens)?, lane.weight.clone());
        lane.graph.capture_ahead(&mut lane.runner, &(), move |cx| forward(cx, kind, &layers, &weight))
    })?;
    let slowest = |ranks: &mut RankThreads<Lane>, replays: u32| -> Result<f64> {
        let times = ranks.run(move |lane: &mut Lane| lane.time(replays))?;
        Ok(times.into_iter().fold(0.0, f64::max))
    };
    slowest(ranks, 3)?;
    let one = slowest(ranks, 10)? * LAYERS as f64 * 1e-6;
    let replays = (SAMPLE.as_secs_f64() / one).ceil().clamp(1.0, 200.0) as u32;
    let mut times = (0..SAMPLES).map(|_| slowest(ranks, replays)).collect::<Result<Vec<_>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times)
}
