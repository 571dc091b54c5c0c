//! What holds for experts that ranks own, on any device.

use anyhow::{Context as _, Result, ensure};
use bcg_kernels::all_reduce;
use bcg_runtime::{
    BreakableCudaGraph, CommunicatorOptions, Context, DType, DeviceKind, RankThreads, Runner, RunnerOptions, Tensor,
    World,
};
use half::{bf16, f16};

use super::case::{Batch, Case, Inputs, Spread};
use super::layer::{Way, layer};

/// Rows that are compared with plain arithmetic, of each batch.
const ROWS_CHECKED: usize = 4;
/// Replays of one batch, before the next one comes.
const REPLAYS_OF_BATCH: usize = 8;

/// One rank's part.
struct Lane {
    runner: Runner,
    inputs: Vec<Inputs>,
    graph: BreakableCudaGraph<(), Vec<Tensor>>,
}

impl Lane {
    /// What the layer is in every way, summed over the ranks, in f32.
    fn read(&mut self, outputs: &[Tensor]) -> bcg_runtime::Result<Vec<Vec<f32>>> {
        let mut values = Vec::with_capacity(outputs.len());
        for output in outputs {
            values.push(match output.dtype() {
                DType::Bf16 => self.runner.read::<bf16>(output)?.iter().map(|value| value.to_f32()).collect(),
                DType::F16 => self.runner.read::<f16>(output)?.iter().map(|value| value.to_f32()).collect(),
                _ => self.runner.read::<f32>(output)?,
            });
        }
        Ok(values)
    }

    fn upload(&mut self, at: usize, logits: &[f32], valid: usize) -> bcg_runtime::Result<()> {
        self.runner.upload(&self.inputs[at].logits, logits)?;
        self.runner.upload(&self.inputs[at].num_valid, &[valid as i32])
    }
}

/// Layers of every dtype, with and without shared experts, with rows of no whole 16 bytes, and, on GPUs, with more rows than
/// the plane below holds.
fn cases(world: &World) -> Vec<Case> {
    let ranks = world.size();
    let small = Case {
        tokens: ranks,
        columns: 64,
        inner: 32,
        num_experts: 16,
        chosen: 2,
        dtype: DType::Bf16,
        has_shared: false,
    };
    let mut cases = vec![
        small,
        Case {
            tokens: 4 * ranks,
            columns: 100,
            inner: 24,
            num_experts: 8,
            chosen: 3,
            dtype: DType::F32,
            has_shared: true,
        },
        Case { tokens: 8 * ranks, columns: 136, chosen: 4, dtype: DType::F16, has_shared: true, ..small },
    ];
    if world.device(0).kind() == DeviceKind::Cuda {
        cases.push(Case { tokens: 64 * ranks, columns: 2048, inner: 64, chosen: 8, ..small });
        cases.push(Case { tokens: 64 * ranks, columns: 2048, inner: 64, chosen: 8, has_shared: true, ..small });
    }
    cases
}

const PLANE_BYTES: usize = 256 << 10;

/// All rows valid, some, none; experts anywhere, or all of one rank.
fn batches(case: &Case, ranks: usize) -> Vec<Batch> {
    let all = case.tokens;
    [
        (all, Spread::Random),
        (all, Spread::OneRank(0)),
        (all, Spread::OneRank(ranks - 1)),
        (all / 2, Spread::Random),
        (all - 1, Spread::OneRank(0)),
        (1, Spread::OneRank(ranks - 1)),
        (0, Spread::Random),
    ]
    .into_iter()
    .enumerate()
    .map(|(seed, (valid, spread))| Batch { valid, spread, seed })
    .collect()
}

/// What experts make of rows is what plain arithmetic says, eagerly and in graphs, and in every way in which rows come to
/// them; the ways differ in no bit, nor do the ranks. Returns how many layers were checked on each rank.
///
/// # Errors
/// The first that does not, or the first error of a rank.
pub fn experts_match_plain_math(world: &World, replays: usize) -> Result<usize> {
    let (cases, num_ranks) = (cases(world), world.size());
    let inputs = (0..num_ranks).map(|rank| {
        cases
            .iter()
            .map(|case| Inputs::new(world.device(rank), case, rank, num_ranks))
            .collect::<bcg_runtime::Result<_>>()
    });
    let inputs: Vec<Vec<Inputs>> = inputs.collect::<bcg_runtime::Result<_>>()?;
    let mut options = CommunicatorOptions::default();
    (options.plane_bytes, options.first_epoch) = (PLANE_BYTES, u32::MAX - 3);
    let mut lanes = Vec::new();
    for (communicator, inputs) in world.communicators(options)?.into_iter().zip(inputs) {
        let mut options = RunnerOptions::default();
        options.arena_bytes =
            cases.iter().map(|case| 32 * case.tokens * (case.chosen + 8) * case.columns).max().unwrap_or(0);
        options.poison = true;
        lanes.push(Lane {
            runner: Runner::in_world(communicator, options)?,
            inputs,
            graph: BreakableCudaGraph::new("experts"),
        });
    }
    let mut ranks = RankThreads::start(world, lanes)?;
    let mut num_checked = 0;
    for (at, case) in cases.iter().enumerate() {
        num_checked += check_case(&mut ranks, at, case, replays).with_context(|| format!("{case:?}"))?;
    }
    Ok(num_checked)
}

fn check_case(ranks: &mut RankThreads<Lane>, at: usize, case: &Case, replays: usize) -> Result<usize> {
    let (chosen, num_ranks) = (case.chosen, ranks.world().size());
    let batches = batches(case, num_ranks);
    let mut expected = Vec::new();
    for &batch in &batches {
        let logits = case.logits(batch, num_ranks);
        let values = ranks.run(move |lane: &mut Lane| {
            lane.upload(at, &logits, batch.valid)?;
            let inputs = lane.inputs[at].clone();
            let outputs = lane.runner.eager(&(), |cx| all_ways(cx, &inputs, chosen))?;
            lane.read(&outputs)
        })?;
        let values = the_same(&values).with_context(|| format!("{batch:?}"))?;
        check_rows(case, batch, num_ranks, &values).with_context(|| format!("{batch:?}"))?;
        expected.push(values);
    }
    ranks.run(move |lane: &mut Lane| {
        let inputs = lane.inputs[at].clone();
        lane.graph.capture_ahead(&mut lane.runner, &(), move |cx| all_ways(cx, &inputs, chosen))
    })?;
    for turn in 0..replays.div_ceil(REPLAYS_OF_BATCH) {
        let (batch, of_batch) = (batches[turn % batches.len()], &expected[turn % batches.len()]);
        let logits = case.logits(batch, num_ranks);
        let values = ranks.run(move |lane: &mut Lane| {
            lane.upload(at, &logits, batch.valid)?;
            for _ in 1..REPLAYS_OF_BATCH {
                lane.graph.replay(&mut lane.runner, &())?;
            }
            let outputs = lane.graph.replay(&mut lane.runner, &())?;
            lane.read(&outputs)
        })?;
        let values = the_same(&values).with_context(|| format!("replay {turn} of {batch:?}"))?;
        let same = values.iter().zip(of_batch).all(|(got, expected)| got.to_bits() == expected.to_bits());
        ensure!(same, "replay {turn} of {batch:?} has other bits than an eager run");
    }
    Ok(Way::ALL.len() * (batches.len() + replays.next_multiple_of(REPLAYS_OF_BATCH)))
}

fn all_ways(cx: &mut Context<'_, ()>, inputs: &Inputs, chosen: usize) -> bcg_runtime::Result<Vec<Tensor>> {
    let mut outputs = Vec::new();
    for way in Way::ALL {
        let partial = layer(cx, way, inputs, chosen)?;
        outputs.push(all_reduce(cx, &partial)?);
    }
    Ok(outputs)
}

/// What all ranks have in every way.
fn the_same(of_ranks: &[Vec<Vec<f32>>]) -> Result<Vec<f32>> {
    let first = &of_ranks[0][0];
    for (rank, of_ways) in of_ranks.iter().enumerate() {
        for (way, values) in Way::ALL.iter().zip(of_ways) {
            let other = values.iter().zip(first).position(|(got, first)| got.to_bits() != first.to_bits());
            if let Some(at) = other {
                let (got, first) = (values[at], first[at]);
                anyhow::bail!(
                    "element {at} of rank {rank}, {way:?}: {got:?}, and {first:?} of rank 0, {:?}",
                    Way::None
                );
            }
        }
    }
    Ok(first.clone())
}

/// Checks some valid rows, and that padded ones are zeros.
fn check_rows(case: &Case, batch: Batch, num_ranks: usize, values: &[f32]) -> Result<()> {
    let padded = &values[batch.valid * case.columns..];
    ensure!(padded.iter().all(|value| *value == 0.0), "padded rows are not zeros");
    let epsilon = match case.dtype {
        DType::Bf16 => f64::powi(2.0, -8),
        DType::F16 => f64::powi(2.0, -11),
        _ => f64::powi(2.0, -22),
    };
    for t in (0..batch.valid).step_by((batch.valid / ROWS_CHECKED).max(1)) {
        for (c, (sum, size)) in case.expected(batch, num_ranks, t).into_iter().enumerate() {
            let got = f64::from(values[t * case.columns + c]);
            ensure!((got - sum).abs() <= 8.0 * epsilon * size + 1e-5, "[{t}, {c}] is {got}, not {sum}");
        }
    }
    Ok(())
}
