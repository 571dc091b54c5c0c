//! A model of a real geometry with random weights, against logits that transformers computed for it in float32.
//!
//! `tests/geometry/reference.py` writes the folder that [`Session::load`] reads. A row of logits is right if its relative
//! error `|out - ref| / |ref|` is within [`RELATIVE`], or not much larger than that of transformers in bf16, and if its best
//! token is one of the reference's best, as far as that tolerance can tell them apart. Rows whose experts are nearly tied in
//! the reference are left out and counted. With graphs, every replay is also compared bit for bit with an eager run at its size.

use std::path::Path;

use bcg_models::state::PageLease;
use bcg_models::{GraphMode, ModelRunner, ModelRunnerOptions, SamplingParams, SequenceInput};
use bcg_runtime::Device;
use serde_json::Value;

/// The largest relative error of a row in bf16.
pub const RELATIVE: f64 = 1e-2;

/// How much larger than the error of transformers in bf16 that of a row may be, where this is more than [`RELATIVE`].
const TO_TRANSFORMERS: f64 = 1.5;

/// Errors of single logits are nearly normal; no token of a vocabulary is further out than this many of them.
const LARGEST_TO_MEAN_ERROR: f64 = 5.0;

/// Sizes between the lengths of the reference's sequences, so that most replays are padded.
const GRAPH_SIZES: [usize; 9] = [1, 4, 8, 24, 72, 144, 320, 800, 1312];

/// One text and the logits of its last rows.
#[derive(Debug)]
struct Sequence {
    tokens: Vec<u32>,
    /// Position of the first row that the reference holds.
    first_row: usize,
    rows: Vec<Vec<f32>>,
    /// Positions at which rounding may choose other experts.
    near_ties: Vec<usize>,
    /// The largest relative error of a row.
    tolerance: f64,
}

impl Sequence {
    /// The row to compare with at a position, if the reference holds it and its experts are far from a tie.
    fn row(&self, position: usize) -> Option<&[f32]> {
        let row = position.checked_sub(self.first_row)?;
        (!self.near_ties.contains(&position)).then(|| self.rows[row].as_slice())
    }
}

/// A loaded model and what it must compute.
#[derive(Debug)]
pub struct Session {
    runner: ModelRunner,
    sequences: Vec<Sequence>,
}

/// A rule and its name.
pub type Rule = (&'static str, fn(&mut Session));

/// Rules of this group, for each graph mode.
pub const RULES: &[Rule] = &[
    ("every_position_of_a_prompt_matches", every_position_of_a_prompt_matches),
    ("a_prefill_matches", a_prefill_matches),
    ("a_prefill_behind_a_prefix_matches", a_prefill_behind_a_prefix_matches),
    ("a_ragged_batch_matches", a_ragged_batch_matches),
    ("a_decode_behind_a_prefill_matches", a_decode_behind_a_prefill_matches),
];

/// The graph modes to check, by name.
pub const MODES: &[(&str, GraphMode)] = &[("eager", GraphMode::Off), ("graphs", GraphMode::Ahead)];

impl Session {
    /// Loads the checkpoint and the reference in `dir`, and captures where graphs are on.
    ///
    /// # Panics
    /// If a file is absent or broken, or the device cannot hold the model.
    pub fn load(device: &Device, dir: &Path, graph: GraphMode) -> Self {
        let options = ModelRunnerOptions {
            skip_tokenizer_init: true,
            kv_cache_tokens: 4096,
            max_running_requests: 8,
            context_length: 1024,
            chunked_prefill_size: 2048,
            graph,
            cuda_graph_sizes: Some(GRAPH_SIZES.to_vec()),
            cuda_graph_decode_sizes: Some(vec![1, 8]),
            verify_graph: (graph == GraphMode::Ahead).then_some(1),
            ..ModelRunnerOptions::default()
        };
        let mut runner = ModelRunner::load(device, dir, options, &mut |_| ()).expect("the checkpoint loads");
        runner.capture(&mut |_| ()).expect("every size is captured");
        let sequences = read(dir, runner.config().vocab_size);
        let left_out: usize = sequences.iter().map(|sequence| sequence.near_ties.len()).sum();
        let tolerance = sequences.iter().map(|sequence| sequence.tolerance).fold(RELATIVE, f64::max);
        println!("  tolerance {tolerance:.2e}; {left_out} positions near a tie of experts are left out");
        Self { runner, sequences }
    }

    /// Runs steps, each a list of sequences and how far they go, and compares the last row of each with the reference,
    /// where that holds it.
    fn run(&mut self, steps: &[Vec<(usize, usize)>]) {
        let pool = self.runner.pages().clone();
        let lease = |sequence: &Sequence| pool.lease(pool.pages_for(sequence.tokens.len())).expect("free pages");
        let leases: Vec<PageLease> = self.sequences.iter().map(lease).collect();
        let greedy = SamplingParams::greedy();
        let mut computed = vec![0; self.sequences.len()];
        let (mut num_compared, mut worst) = (0, 0.0);
        for step in steps {
            let batch: Vec<_> = step
                .iter()
                .map(|&(index, end)| {
                    input(&self.sequences[index].tokens[..end], computed[index], &leases[index], &greedy)
                })
                .collect();
            let output = self.runner.step(&batch).expect("a step");
            for (&(index, end), token) in step.iter().zip(&output.tokens) {
                computed[index] = end;
                let sequence = &self.sequences[index];
                let Some(row) = sequence.row(end - 1) else { continue };
                let what = format!("sequence {index}, position {}", end - 1);
                let out = token.logits.as_deref().expect("logits");
                worst = compare(out, row, sequence.tolerance, &what).max(worst);
                num_compared += 1;
            }
        }
        assert!(num_compared > 0, "the reference holds none of these rows");
        println!("  {num_compared} rows, largest relative error {worst:.2e}");
    }

    /// Index and length of each sequence with more than `least` tokens.
    fn longer_than(&self, least: usize) -> impl Iterator<Item = (usize, usize)> {
        let lengths = self.sequences.iter().map(|sequence| sequence.tokens.len()).enumerate();
        lengths.filter(move |(_, length)| *length > least)
    }
}

fn input<'a>(
    tokens: &'a [u32],
    past_len: usize,
    lease: &'a PageLease,
    sampling: &'a SamplingParams,
) -> SequenceInput<'a> {
    let (pages, state, tokens) = (lease.pages(), lease.state(), &tokens[past_len..]);
    SequenceInput { state, logits: true, ..SequenceInput::new(tokens, past_len, pages, sampling) }
}

fn read(dir: &Path, vocab_size: usize) -> Vec<Sequence> {
    let bytes = std::fs::read(dir.join("reference.json")).expect("reference.json");
    let reference: Value = serde_json::from_slice(&bytes).expect("JSON");
    let logits = std::fs::read(dir.join("logits.f32")).expect("logits.f32");
    let mut rows = logits.chunks_exact(4 * vocab_size).map(|row| {
        let (row, _) = row.as_chunks::<4>();
        row.iter().map(|number| f32::from_le_bytes(*number)).collect::<Vec<f32>>()
    });
    let numbers = |list: &Value| -> Vec<usize> {
        let list = list.as_array().expect("a list").iter();
        list.map(|number| number.as_u64().expect("a token id or a position") as usize).collect()
    };
    let sequences = reference["sequences"].as_array().expect("a list").iter().map(|sequence| {
        let tokens: Vec<u32> = numbers(&sequence["tokens"]).into_iter().map(|token| token as u32).collect();
        let first_row = sequence["first_row"].as_u64().expect("a position") as usize;
        let rows = rows.by_ref().take(tokens.len() - first_row).collect();
        let bf16_error = sequence["bf16_error"].as_f64().expect("an error");
        let tolerance = RELATIVE.max(TO_TRANSFORMERS * bf16_error);
        Sequence { tokens, first_row, rows, near_ties: numbers(&sequence["near_ties"]), tolerance }
    });
    let sequences: Vec<Sequence> = sequences.collect();
    assert!(rows.next().is_none() && !sequences.is_empty(), "logits.f32 holds the rows that reference.json names");
    sequences
}

/// Returns the relative error of a row that matches.
#[track_caller]
fn compare(out: &[f32], reference: &[f32], relative: f64, what: &str) -> f64 {
    assert_eq!(out.len(), reference.len(), "{what}");
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let norm = square(&mut reference.iter().map(|r| f64::from(*r))).sqrt();
    let error = square(&mut out.iter().zip(reference).map(|(o, r)| f64::from(*o) - f64::from(*r))).sqrt() / norm;
    assert!(error <= relative, "{what}: relative error {error:.2e} is above {relative:.1e}");
    let best = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).expect("logits");
    let (chosen, right) = (best(out), best(reference));
    let tolerance = 2.0 * LARGEST_TO_MEAN_ERROR * relative * norm / (reference.len() as f64).sqrt();
    let behind = f64::from(reference[right]) - f64::from(reference[chosen]);
    assert!(behind <= tolerance, "{what}: token {chosen} is {behind} behind {right}, allowed {tolerance}");
    error
}

/// Each row of a short prompt, not only the last one.
fn every_position_of_a_prompt_matches(session: &mut Session) {
    let pool = session.runner.pages().clone();
    let greedy = SamplingParams::greedy();
    let mut num_compared = 0;
    for (index, sequence) in session.sequences.iter().enumerate().filter(|(_, sequence)| sequence.tokens.len() <= 64) {
        let lease = pool.lease(pool.pages_for(sequence.tokens.len())).expect("free pages");
        let rows = session.runner.score(&input(&sequence.tokens, 0, &lease, &greedy)).expect("logits");
        for (position, row) in rows.iter().enumerate() {
            let Some(reference) = sequence.row(position) else { continue };
            let what = format!("sequence {index}, position {position}");
            compare(row, reference, sequence.tolerance, &what);
            num_compared += 1;
        }
    }
    assert!(num_compared > 0, "the reference has short sequences");
}

/// Each sequence alone, at once.
fn a_prefill_matches(session: &mut Session) {
    let steps: Vec<_> = session.longer_than(0).map(|whole| vec![whole]).collect();
    session.run(&steps);
}

/// Each sequence alone, in parts that end inside, at and behind the edge of a page.
fn a_prefill_behind_a_prefix_matches(session: &mut Session) {
    let mut steps = Vec::new();
    for (index, length) in session.longer_than(17) {
        let ends = [5, 16, 17, length / 2, length - 2, length];
        steps.extend(
            ends.into_iter().filter(|end| [5, 16, 17].contains(end) || *end > 17).map(|end| vec![(index, end)]),
        );
    }
    session.run(&steps);
}

/// All sequences in one step, every second one behind a prefix.
fn a_ragged_batch_matches(session: &mut Session) {
    let prefixes = session.longer_than(17).step_by(2).map(|(index, length)| (index, length * 2 / 3)).collect();
    let whole = session.longer_than(0).collect();
    session.run(&[prefixes, whole]);
}

/// All sequences but their last tokens in one step, then those, one of each sequence in a step.
fn a_decode_behind_a_prefill_matches(session: &mut Session) {
    const DECODED: usize = 8;
    let mut steps = Vec::new();
    for left in (0..=DECODED).rev() {
        steps.push(session.longer_than(DECODED).map(|(index, length)| (index, length - left)).collect());
    }
    session.run(&steps);
}
