//! A model on a device, or on several, and one step of a batch through it.
//!
//! A step: check the batch → decide (replay, capture or eager) → put its inputs together → on every rank: upload them, run
//! the forward, gather the last rows, LM head, choose tokens → copy those of rank 0 to the host. The forward is what a graph
//! holds; the rest runs after it, eagerly. All of it is enqueued by [`ModelRunner::launch`]; [`ModelRunner::collect`] waits
//! for the tokens, and another step may be launched in between.
//!
//! Invariants:
//! - captured code reads only what [`InputBuffers`](crate::batch::InputBuffers) hold, at addresses that never change;
//! - a failed step leaves the runner usable: KV slots that it wrote belong to the sequences that failed, and their
//!   states are still those before it. Only with several ranks a step that fails on one of them ends the world: the
//!   others cannot go on without it, and the model has to be loaded anew;
//! - the host does its part of a step once, whatever the number of ranks, and every rank gets the same (law L13). All
//!   ranks choose the same tokens: they have the same logits, bit for bit, and the same seeds.
//!
//! Which pages a sequence owns, and which sequences run, is decided by the caller; see [`PagePool`]. A page has the same
//! number on each rank.

mod check;
mod choose;
mod generate;
mod links;
mod load;
mod measure;
mod memory;
mod nodes;
mod options;
mod rank;
mod role;
mod staged;
mod stages;

use std::sync::Arc;
use std::time::Instant;

use bcg_runtime::{Decision, Description, Device, GraphCacheStats, World};

use crate::batch::{Phase, SequenceInput, StagedSampling};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::sampling::SamplingParams;
use crate::state::{Caches, KvCache, PagePool, StateCache};
use crate::tokenizer::Tokenizer;
use choose::Readbacks;
use nodes::Work;
use rank::Rank;
use staged::{Path, StagedChoice, StagedStep};
use stages::Stages;

pub use choose::{PendingStep, TOP_LOGPROBS_MAX};
pub use generate::{FinishReason, GenerateOptions, Generated};
pub use measure::ForwardPath;
pub use memory::RankMemory;
pub use options::{
    CaptureSummary, GraphMode, LoadFormat, ModelRunnerOptions, OptionError, Progress, SampledToken, Stage, StepOutput,
};
pub use role::Role;

/// What a runner's graphs did: replays, captures, and eager forwards by reason.
pub type GraphStats = GraphCacheStats;

/// New tokens of one sequence of a dummy batch: attention costs little then.
const DUMMY_SEQUENCE_TOKENS: usize = 128;

/// A loaded model with its KV cache, its graphs and the stream they run on.
///
/// # Example
/// ```no_run
/// use bcg_models::{ModelRunner, ModelRunnerOptions, SamplingParams, SequenceInput};
/// use bcg_runtime::Device;
///
/// let dir = std::path::Path::new("models/tiny-qwen3");
/// let mut runner = ModelRunner::load(&Device::host(), dir, ModelRunnerOptions::default(), &mut |_| ())?;
/// let prompt = runner.tokenizer()?.encode("Question: ")?;
/// let lease = runner.pages().lease(runner.pages().pages_for(prompt.len()))?;
/// let sampling = SamplingParams::greedy();
/// let new = SequenceInput::new(&prompt, 0, lease.pages(), &sampling);
/// let output = runner.step(&[SequenceInput { state: lease.state(), ..new }])?;
/// println!("{:?}", runner.tokenizer()?.decode(&[output.tokens[0].id], true)?);
/// # Ok::<(), bcg_models::Error>(())
/// ```
#[derive(Debug)]
pub struct ModelRunner {
    stages: Stages,
    pages: PagePool,
    readbacks: Readbacks,
    tokenizer: Option<Tokenizer>,
    config: ModelConfig,
    options: ModelRunnerOptions,
    role: Role,
}

impl ModelRunner {
    /// Captures all sizes of both phases, the largest first, without running them. Does nothing but in
    /// [`GraphMode::Ahead`], and nothing with [`ModelRunnerOptions::debug_cuda_graph`].
    ///
    /// # Errors
    /// The first capture that fails.
    pub fn capture(&mut self, progress: &mut dyn FnMut(Progress)) -> Result<CaptureSummary> {
        if self.options.graph != GraphMode::Ahead || self.options.debug_cuda_graph {
            return Ok(CaptureSummary::default());
        }
        let begun = Instant::now();
        let free_before = self.device().memory_info()?.free_bytes;
        let arena_before = self.first().runtime.arena_stats().mapped_bytes;
        let sizes = Phase::ALL.map(|phase| self.graph_sizes(phase).to_vec());
        let total = sizes.iter().map(Vec::len).sum();
        let mut done = 0;
        for (phase, sizes) in Phase::ALL.into_iter().zip(&sizes) {
            for &size in sizes.iter().rev() {
                progress(Progress { stage: Stage::Capture, done, total });
                self.capture_size(phase, size)?;
                done += 1;
            }
        }
        self.synchronize()?;
        progress(Progress { stage: Stage::Capture, done: total, total });
        let free_after = self.device().memory_info()?.free_bytes;
        let arena = self.first().runtime.arena_stats().mapped_bytes;
        let [prefill_sizes, decode_sizes] = sizes;
        let of_stage = |rank: &Rank| {
            let largest = prefill_sizes.last().and_then(|&size| rank.graphs(Phase::Prefill).describe(size));
            largest.map_or((0, 0), |graph| (graph.segments.len(), graph.breaks.len()))
        };
        let (segments, breaks) = self.stages.leaders().map(of_stage).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
        let largest = prefill_sizes.last().and_then(|&size| self.describe(Phase::Prefill, size)).unwrap_or_default();
        Ok(CaptureSummary {
            prefill_sizes,
            decode_sizes,
            segments,
            breaks,
            capture_time: begun.elapsed(),
            arena_bytes: largest.extent_bytes,
            graph_bytes: (free_before.saturating_sub(free_after)).saturating_sub(arena - arena_before),
        })
    }

    fn capture_size(&mut self, phase: Phase, size: usize) -> Result<()> {
        let longest = match phase {
            Phase::Prefill => DUMMY_SEQUENCE_TOKENS.min(size),
            Phase::Decode => 1,
        };
        self.with_dummy((size, 0), longest, |runner, dummy| {
            let step = runner.stage_dummy(dummy, phase, size);
            runner.stages.on_ranks(step, Rank::capture_ahead)
        })
    }

    /// Runs the new tokens of a batch and chooses the next token of each sequence.
    ///
    /// # Errors
    /// Those of [`launch`](Self::launch) and [`collect`](Self::collect).
    pub fn step(&mut self, batch: &[SequenceInput<'_>]) -> Result<StepOutput> {
        let step = self.launch(batch)?;
        self.collect(step)
    }

    /// Enqueues a step and does not wait for it: the host can prepare the next one, which may take the tokens that this
    /// one chooses ([`SequenceInput::chosen`]), while the device works. With a pipeline of S stages, S + 1 steps may be under
    /// way, so that every stage has work.
    ///
    /// # Errors
    /// [`Error::Batch`] or [`Error::Sampling`] for a batch that cannot be run, before anything is, and, with several ranks
    /// or stages, for a step too many before one is collected; the runtime's.
    pub fn launch(&mut self, batch: &[SequenceInput<'_>]) -> Result<PendingStep> {
        let pending = self.enqueue(batch)?;
        commit_states(batch);
        Ok(pending)
    }

    /// As [`launch`](Self::launch), but the states of the sequences stay where they were.
    fn enqueue(&mut self, batch: &[SequenceInput<'_>]) -> Result<PendingStep> {
        self.check(batch)?;
        self.readbacks.check_room()?;
        let step = self.stage_chosen(batch);
        let launched = self.command(Work::Launch, &step).and_then(|()| self.stages.on_ranks(step, Rank::launch));
        let launched = launched.map_err(|error| self.stages.ended(error))?;
        let launched = launched.ok_or_else(|| bcg_runtime::Error::other("the last stage chooses tokens"))?;
        self.stages.first_mut().inputs.launched(batch.len());
        Ok(PendingStep::new(launched, self.readbacks.clone(), batch))
    }

    /// Waits for a step and returns its tokens. Logits, where they were asked for, are read only if no other step was
    /// launched since.
    ///
    /// # Errors
    /// The first error of the step's work on the device; [`bcg_runtime::Error::Stale`] for logits after another launch.
    pub fn collect(&mut self, step: PendingStep) -> Result<StepOutput> {
        let tokens = step.read(&mut self.stages.last_mut().runtime);
        drop(step); // its host memory serves the next one
        let tokens = tokens.map_err(Error::from).and_then(|tokens| self.stages.check().map(|()| tokens));
        Ok(StepOutput { tokens: tokens.map_err(|error| self.stages.ended(error))? })
    }

    /// Runs one sequence and returns the logits of every new token, not only of the last one.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn score(&mut self, sequence: &SequenceInput<'_>) -> Result<Vec<Vec<f32>>> {
        let batch = std::slice::from_ref(sequence);
        self.check(batch)?;
        let step = self.stage_as(batch, Phase::Prefill, (sequence.num_new(), Path::Eager), true);
        let logits = self.command(Work::Score, &step).and_then(|()| self.stages.on_ranks(step, Rank::score));
        let logits = logits.map_err(|error| self.stages.ended(error))?;
        commit_states(batch);
        Ok(logits)
    }

    /// Decides how a batch runs, and puts it together. The graphs of rank 0 decide for all ranks of a stage, those of the first
    /// stage for the rows of all stages.
    fn stage(&mut self, batch: &[SequenceInput<'_>]) -> StagedStep {
        let (phase, rows) = (self.role.phase_of(batch), num_rows(batch));
        let is_debugged = self.options.debug_cuda_graph;
        let mut runs = self.stages.leaders_mut().map(|rank| match rank.graphs_and_runtime(phase).0.decide(rows) {
            Decision::Replay { size } | Decision::Capture { size } if is_debugged => (size, Path::Eager),
            Decision::Replay { size } => (size, Path::Replay),
            Decision::Capture { size } => (size, Path::Capture),
            Decision::Eager(_) => (rows, Path::Eager),
        });
        let first = runs.next().unwrap_or((rows, Path::Eager));
        // A stage without a graph of these rows, which a failed capture or a full budget explains, runs them eagerly.
        let later_paths = runs.map(|(size, path)| if size == first.0 { path } else { Path::Eager }).collect();
        StagedStep { later_paths, ..self.stage_as(batch, phase, first, true) }
    }

    /// As [`stage`](Self::stage), with what is asked of the next tokens.
    fn stage_chosen(&mut self, batch: &[SequenceInput<'_>]) -> StagedStep {
        let is_greedy = batch.iter().all(|sequence| sequence.sampling.is_greedy());
        let sampling = (!is_greedy).then(|| StagedSampling::new(batch));
        StagedStep { sampling, asked: StagedChoice::new(batch), ..self.stage(batch) }
    }

    /// Puts together a batch that keeps no key, value or state, to be run eagerly or captured.
    fn stage_dummy(&mut self, batch: &[SequenceInput<'_>], phase: Phase, rows: usize) -> StagedStep {
        self.stage_as(batch, phase, (rows, Path::Eager), false)
    }

    fn stage_as(
        &mut self,
        batch: &[SequenceInput<'_>],
        phase: Phase,
        (rows, path): (usize, Path),
        write_kv: bool,
    ) -> StagedStep {
        let inputs = &mut self.stages.first_mut().inputs;
        let newest = batch.iter().filter_map(|sequence| sequence.chosen).min_by_key(|chosen| chosen.steps_since);
        let (slot, awaited) =
            (inputs.chosen_slots().next(), newest.and_then(|chosen| inputs.chosen_slots().slot_of(chosen)));
        let batch = inputs.stage(batch, phase, rows, write_kv);
        StagedStep {
            path,
            later_paths: Vec::new(),
            batch,
            slot,
            awaited,
            sampling: None,
            asked: StagedChoice::default(),
        }
    }

    /// Runs every kernel of a step once, at the largest captured size, so that no later capture has to grow the arena;
    /// and where the KV cache gets what is left of the memory, at the largest size that a step can have, so that none
    /// grows it. A mixed batch needs more than one of prompts alone, and runs all of its kernels.
    fn warm_up(&mut self) -> Result<()> {
        let options = &self.options;
        let largest = |phase| self.graph_sizes(phase).last().copied();
        let (prefill, longest) = match options.mem_fraction_static {
            None => {
                let captured = largest(Phase::Prefill).unwrap_or(DUMMY_SEQUENCE_TOKENS);
                (captured.min(options.chunked_prefill_size), DUMMY_SEQUENCE_TOKENS)
            }
            // As many sequences as there can be have the most logits.
            Some(_) => (options.largest_step(), options.largest_step().div_ceil(options.max_running_requests)),
        };
        let decode = largest(Phase::Decode).unwrap_or(0).max(options.max_running_requests);
        let decodes = usize::from(self.can_mix(prefill)?);
        for (phase, (rows, decodes), longest) in
            [(Phase::Prefill, (prefill, decodes), longest), (Phase::Decode, (decode, 0), 1)]
        {
            self.with_dummy((rows, decodes), longest, |runner, dummy| {
                let step = runner.stage_dummy(dummy, phase, rows);
                runner.stages.on_ranks(StagedStep { sampling: Some(StagedSampling::new(dummy)), ..step }, Rank::warm_up)
            })?;
        }
        self.synchronize()
    }

    /// Tells whether a step of this many rows can be a mixed batch.
    fn can_mix(&self, rows: usize) -> Result<bool> {
        let prompts = self.options.limits()?.sequences - 1;
        Ok(rows >= 3 && rows - 1 <= prompts.saturating_mul(self.options.context_length))
    }

    /// Calls `f` with a batch of `rows` tokens: as many sequences of one token as `decodes` says, fewer than can run
    /// together, then sequences of `longest` tokens where that is few enough sequences. They read page 0 and write no page.
    fn with_dummy<R>(
        &mut self,
        (rows, decodes): (usize, usize),
        longest: usize,
        f: impl FnOnce(&mut Self, &[SequenceInput<'_>]) -> Result<R>,
    ) -> Result<R> {
        let (rows, sequences) = (rows - decodes, self.options.limits()?.sequences - decodes);
        let longest = longest.min(self.options.context_length).max(rows.div_ceil(sequences));
        let tokens = vec![0; longest];
        let pages = vec![0; longest.div_ceil(self.options.page_size)];
        let sampling = SamplingParams::default();
        let prompts = (0..rows).step_by(longest).map(|first| longest.min(rows - first));
        let batch: Vec<_> = std::iter::repeat_n(1, decodes)
            .chain(prompts)
            .map(|len| SequenceInput::new(&tokens[..len], 0, &pages, &sampling))
            .collect();
        f(self, &batch)
    }

    /// The pages of the KV cache, and the states of sequences.
    pub fn pages(&self) -> &PagePool {
        &self.pages
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The options it was loaded with.
    pub fn options(&self) -> &ModelRunnerOptions {
        &self.options
    }

    /// The checkpoint's tokenizer.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`] if it was skipped.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or(Error::NoTokenizer)
    }

    /// The ranks and their devices; with several stages, those of the first one.
    pub fn world(&self) -> &World {
        self.stages.first_world()
    }

    /// The number of ranks of each stage, of all processes together.
    pub fn num_ranks(&self) -> usize {
        self.world().size()
    }

    /// The number of stages of the pipeline: 1 if there is none.
    pub fn num_stages(&self) -> usize {
        self.stages.len()
    }

    /// The devices of all ranks of all stages: that of rank r of stage s is number `s * num_ranks + r`.
    pub fn devices(&self) -> impl Iterator<Item = &Device> {
        self.stages.devices()
    }

    /// The device it runs on; with several, the first one.
    pub fn device(&self) -> &Device {
        self.first().device()
    }

    /// Tells whether sequences have states, which state-space layers keep, in some stage.
    pub fn has_states(&self) -> bool {
        self.stages.leaders().any(|rank| !rank.caches.states.layers().is_empty())
    }

    /// The KV cache; with several ranks or stages, the share of the first one.
    pub fn kv_cache(&self) -> &KvCache {
        &self.first().caches.kv
    }

    /// The KV cache and the states, for the [`Role`] that pushes to them; with several ranks or stages, the share of the
    /// first one.
    pub fn caches(&self) -> &Arc<Caches> {
        &self.first().caches
    }

    /// The states of state-space layers; with several ranks or stages, the share of the first one.
    pub fn states(&self) -> &StateCache {
        &self.first().caches.states
    }

    /// What the graphs of both phases did so far; all ranks of a stage do the same, and this is the first stage.
    pub fn stats(&self) -> GraphStats {
        let rank = self.first();
        rank.prefill_graphs.stats().merged(rank.decode_graphs.stats())
    }

    /// The device memory that the graphs of both phases take, in bytes, their shared activations not counted; with several
    /// ranks or stages, on the first device.
    pub fn graph_bytes(&self) -> usize {
        self.first().memory().graph_bytes
    }

    /// How many launches and copies were enqueued so far; with several ranks or stages, on the first one.
    pub fn runtime_stats(&self) -> bcg_runtime::RunnerStats {
        self.first().runtime.stats()
    }

    /// The capture sizes of a phase, in rising order; empty without graphs.
    pub fn graph_sizes(&self, phase: Phase) -> &[usize] {
        self.first().graphs(phase).ladder().map_or(&[], bcg_runtime::Ladder::sizes)
    }

    /// Describes the graph of a size, if it is captured; with several ranks or stages, that of the first one.
    pub fn describe(&self, phase: Phase, size: usize) -> Option<Description> {
        self.first().graphs(phase).describe(size)
    }

    /// Rank 0 of the first stage.
    fn first(&self) -> &Rank {
        self.stages.first()
    }
}

/// The new tokens of a batch.
fn num_rows(batch: &[SequenceInput<'_>]) -> usize {
    batch.iter().map(SequenceInput::num_new).sum()
}

/// Notes that a step succeeded: the states that it wrote count from now on.
fn commit_states(batch: &[SequenceInput<'_>]) {
    for sequence in batch {
        if let Some(state) = sequence.state {
            state.commit(sequence.kv_len());
        }
    }
}
