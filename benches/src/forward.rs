//! Times of whole forwards: what the benches of prefill and decode share.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use bcg_models::{ForwardPath, ModelRunner};

use super::RoundsArgs;
use super::profile::{self, Profile};
use super::report::{Report, Row};
use super::timing::{Rounds, Samples};
use crate::progress::bar;
use crate::sequences::Sequences;

/// What the times of a forward include; goes with every table.
pub(super) const NOTE: &str = "\
graph_ms, eager_ms: wall time from before the upload of the step's inputs (token ids, positions, slots, lengths, page \
table; from pageable host memory) until the hidden states are there (synchronised), attention and its planning included, \
LM head not. *_host_ms: the part of it until all is enqueued. step_ms: with graphs, plus LM head, greedy choice and \
read-back of the tokens. Median (p10..p90); the three take turns.";

/// The times of one batch, in milliseconds.
#[derive(Debug)]
struct ForwardTimes {
    graph: [Samples; 2],
    eager: [Samples; 2],
    step: Samples,
}

/// Times each batch and, with `profile`, traces each one, all of them after the last one was timed.
pub(super) fn measure(
    runner: &mut ModelRunner,
    model: &str,
    table: &'static str,
    sizes: (&'static str, &[usize]),
    sequences: impl Fn(&ModelRunner, usize) -> Result<Sequences>,
    args: &RoundsArgs,
    report: &mut Report,
) -> Result<()> {
    let (name, sizes) = sizes;
    let rounds = args.rounds()?;
    let bar = bar(sizes.len() as u64, "{msg:>17} [{bar:40}] {pos}/{len}", table);
    let mut medians = Vec::new();
    for &size in sizes {
        let sequences = sequences(runner, size)?;
        let times = time(runner, &sequences, rounds).with_context(|| format!("{size} {name}"))?;
        medians.push(times.graph_ms());
        report.row(table, times.row(model, (name, size)));
        bar.inc(1);
    }
    bar.finish_and_clear();
    if args.profile {
        report.note(profile::NOTE);
    }
    for (&size, median) in sizes.iter().zip(medians).filter(|_| args.profile) {
        let sequences = sequences(runner, size)?;
        let (batch, device) = (sequences.inputs(), runner.device().clone());
        let profile = Profile::trace(&device, || {
            runner.forward_only(&batch, ForwardPath::Graph)?;
            Ok(runner.synchronize()?)
        })?;
        profile.rows(report, model, (name, size), median);
    }
    Ok(())
}

/// Times a batch with graphs, eagerly, and as a whole step, in turns.
fn time(runner: &mut ModelRunner, sequences: &Sequences, rounds: Rounds) -> Result<ForwardTimes> {
    let batch = sequences.inputs();
    let replays = runner.stats().num_replays;
    runner.forward_only(&batch, ForwardPath::Graph)?;
    let rows = sequences.num_tokens();
    ensure!(runner.stats().num_replays > replays, "no graph was replayed for {rows} rows, so there is none to time");
    let times = rounds.run(|| {
        let graph = time_once(runner, |runner| Ok(runner.forward_only(&batch, ForwardPath::Graph)?))?;
        let eager = time_once(runner, |runner| Ok(runner.forward_only(&batch, ForwardPath::Eager)?))?;
        let step = time_once(runner, |runner| Ok(runner.step(&batch).map(drop)?))?;
        sequences.rewind();
        Ok([graph.0, graph.1, eager.0, eager.1, step.1])
    })?;
    let column = |index: usize| Samples::new(times.iter().map(|round| round[index]).collect());
    Ok(ForwardTimes { graph: [column(0), column(1)], eager: [column(2), column(3)], step: column(4) })
}

/// Returns the milliseconds until `run` returned, and until its work was done.
pub(super) fn time_once(
    runner: &mut ModelRunner,
    run: impl FnOnce(&mut ModelRunner) -> Result<()>,
) -> Result<(f64, f64)> {
    let begun = Instant::now();
    run(runner)?;
    let host = begun.elapsed();
    runner.synchronize()?;
    let wall = begun.elapsed();
    Ok((host.as_secs_f64() * 1e3, wall.as_secs_f64() * 1e3))
}

impl ForwardTimes {
    /// Median wall time with graphs, in milliseconds.
    fn graph_ms(&self) -> f64 {
        self.graph[1].median()
    }

    /// Returns the columns of the table.
    fn row(self, model: &str, size: (&'static str, usize)) -> Row {
        let rounds = self.step.len();
        let [graph_host, graph] = self.graph;
        let [eager_host, eager] = self.eager;
        vec![
            ("model", model.into()),
            (size.0, size.1.into()),
            ("graph_ms", graph.into()),
            ("eager_ms", eager.into()),
            ("step_ms", self.step.into()),
            ("graph_host_ms", graph_host.into()),
            ("eager_host_ms", eager_host.into()),
            ("rounds", rounds.into()),
        ]
    }
}
