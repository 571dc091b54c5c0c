//! `bcg bench replay`: the host's time for a prefill whose batch differs each time, healed and as a chain.

use std::time::Instant;

use anyhow::{Result, ensure};
use bcg_engine::{EngineOptions, load};
use bcg_models::{ForwardPath, ModelRunner, Phase, SequenceInput};
use clap::Args;

use super::progress::LoadBar;
use super::report::{Environment, Report};
use super::timing::{Rounds, Samples};
use super::{RoundsArgs, make_room, sizes_at_least_one, with_graphs};
use crate::sequences::Sequences;

/// Flags of `bcg bench replay`.
#[derive(Debug, Args)]
pub struct ReplayArgs {
    /// New tokens of a batch, separated by commas
    #[arg(long, value_name = "T,T,…", value_delimiter = ',', default_value = "16,128,256,1024,4096")]
    pub sizes: Vec<usize>,

    /// How often.
    #[command(flatten)]
    pub rounds: RoundsArgs,
}

const NOTE: &str = "\
host time in µs, median (p10..p90), of one round each in turns; four batches take turns: one, two and three sequences of \
different lengths, and one after a prefix. healed_us, chain_us: upload of the step's inputs, planning of attention, and \
the replay, until all is enqueued. mixed_us: the same as healed_us for a batch of four decodes and one prompt. upload_us: \
that upload and planning alone. patched_nodes: by all replays together. step_us: a whole step with LM head, greedy choice \
and read-back, without the time that the host waits for the \
device.";

/// Times replays.
///
/// # Errors
/// What is wrong with the options or the model, or that a forward failed.
pub fn measure(engine: &EngineOptions, args: &ReplayArgs) -> Result<Report> {
    let largest = sizes_at_least_one("--sizes", &args.sizes)?;
    ensure!(!args.sizes.iter().any(|&size| size < 8), "--sizes: a batch of three sequences needs at least 8 tokens");
    let rounds = args.rounds.rounds()?;
    let mut options = with_graphs(engine, &args.sizes, &[1]);
    let context = largest + 2 * PREFIX;
    make_room(&mut options, largest, context, 13 * context);
    let model = load::folder_name(&options.model);
    let mut runner = load::load_runner(&options, &mut LoadBar::show())?;
    let mut report = Report::new(Environment::read(runner.device().name()));
    report.note(NOTE);
    for &size in &args.sizes {
        replay(&mut runner, &model, size, rounds, &mut report)?;
    }
    Ok(report)
}

/// Tokens that the last batch's sequence has in the KV cache already.
const PREFIX: usize = 40;

fn batches(runner: &ModelRunner, size: usize) -> Result<[Sequences; 4]> {
    let (half, third) = (size / 2 + 1, size / 3);
    Ok([
        Sequences::of_lens(runner, vec![size], 0)?,
        Sequences::of_lens(runner, vec![half, size - half], 0)?,
        Sequences::of_lens(runner, vec![third, size - third - 2, 2], 0)?,
        Sequences::of_lens(runner, vec![size], PREFIX)?,
    ])
}

/// Decodes beside the prompt of a mixed batch.
const DECODES: usize = 4;

fn mixed(runner: &ModelRunner, size: usize) -> Result<Sequences> {
    let mut lens = vec![1; DECODES];
    lens.push(size - DECODES);
    Sequences::of_lens(runner, lens, PREFIX)
}

fn replay(runner: &mut ModelRunner, model: &str, size: usize, rounds: Rounds, report: &mut Report) -> Result<()> {
    let sequences = batches(runner, size)?;
    let batches = sequences.each_ref().map(Sequences::inputs);
    let mixed = mixed(runner, size)?;
    let mixed = mixed.inputs();
    let mut turn = 0;
    let times = rounds.run(|| {
        // Four turns a round and four batches: shifted by one each round, each contestant meets each batch.
        let first = turn;
        turn += 1;
        let mut step = 0;
        let mut next = || {
            step += 1;
            &batches[(first + step) % batches.len()]
        };
        let healed = host_us(runner, next(), |runner, batch| Ok(runner.forward_only(batch, ForwardPath::Graph)?))?;
        let chain = host_us(runner, next(), |runner, batch| Ok(runner.forward_only(batch, ForwardPath::Chain)?))?;
        let upload = host_us(runner, next(), |runner, batch| Ok(runner.upload_only(batch).map(drop)?))?;
        let step = runner.step_host_time(next())?.as_secs_f64() * 1e6;
        let mixed = host_us(runner, &mixed, |runner, batch| Ok(runner.forward_only(batch, ForwardPath::Graph)?))?;
        Ok([healed, chain, upload, step, mixed])
    })?;
    let column = |index: usize| times.iter().map(|round| round[index]).collect::<Vec<f64>>();
    let pairs = |f: &dyn Fn(&[f64; 5]) -> (f64, f64)| Samples::ratios(&times.iter().map(f).collect::<Vec<_>>());
    let breaks = runner.describe(Phase::Prefill, size).unwrap_or_default().breaks;
    let patched: u64 = breaks.iter().map(|one| one.num_patched).sum();
    report.row(
        "replay",
        vec![
            ("model", model.into()),
            ("tokens", size.into()),
            ("breaks", breaks.len().into()),
            ("healed_us", Samples::new(column(0)).into()),
            ("mixed_us", Samples::new(column(4)).into()),
            ("upload_us", Samples::new(column(2)).into()),
            ("chain_us", Samples::new(column(1)).into()),
            ("chain_by_healed", pairs(&|round| (round[1], round[0])).into()),
            ("step_us", Samples::new(column(3)).into()),
            ("patched_nodes", (patched as usize).into()),
        ],
    );
    Ok(())
}

/// Returns the microseconds until `run` returned; waits for the device before and after.
fn host_us(
    runner: &mut ModelRunner,
    batch: &[SequenceInput<'_>],
    run: impl FnOnce(&mut ModelRunner, &[SequenceInput<'_>]) -> Result<()>,
) -> Result<f64> {
    let begun = Instant::now();
    run(runner, batch)?;
    let us = begun.elapsed().as_secs_f64() * 1e6;
    runner.synchronize()?;
    Ok(us)
}
