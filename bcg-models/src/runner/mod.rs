//! A model on a device, and one step of a batch through it.
//!
//! A step: check the batch → decide (replay, capture or eager) → upload its inputs → forward → gather the last rows, LM
//! head, choose tokens, copy them to the host. The forward is what a graph holds; the rest runs after it, eagerly. All
//! of it is enqueued by [`ModelRunner::launch`]; [`ModelRunner::collect`] waits for the tokens, and another step may be
//! launched in between.
//!
//! Invariants:
//! - captured code reads only what [`InputBuffers`] hold, at addresses that never change;
//! - a failed step leaves the runner usable: KV slots that it wrote belong to the sequences that failed, and their
//!   states are still those before it.
//!
//! Which pages a sequence owns, and which sequences run, is decided by the caller; see [`PagePool`].

mod choose;
mod generate;
mod measure;
mod memory;
mod options;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use bcg_kernels as ops;
use bcg_runtime::{
    Context, Decision, Description, Device, GraphCache, GraphCacheStats, LiveBatch, OpStream, Readback, Runner, Tensor,
};

use crate::batch::{ForwardBatch, InputBuffers, Phase, SequenceInput};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::registry::{self, Model};
use crate::sampling::SamplingParams;
use crate::state::{Caches, KvCache, PagePool, StateCache};
use crate::tokenizer::Tokenizer;
use crate::weights::{Shard, Weights};

pub use choose::{PendingStep, TOP_LOGPROBS_MAX};
pub use generate::{FinishReason, GenerateOptions, Generated};
pub use measure::ForwardPath;
pub use options::{
    CaptureSummary, GraphMode, LoadFormat, ModelRunnerOptions, OptionError, Progress, SampledToken, Stage, StepOutput,
};

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
    // Dropped in this order: graphs before the memory and the stream that they use.
    prefill_graphs: GraphCache<ForwardBatch, Tensor>,
    decode_graphs: GraphCache<ForwardBatch, Tensor>,
    inputs: InputBuffers,
    caches: Arc<Caches>,
    model: Arc<dyn Model>,
    /// The stream and the memory that forwards run with, eagerly or as graphs.
    runtime: Runner,
    pages: PagePool,
    tokenizer: Option<Tokenizer>,
    config: ModelConfig,
    options: ModelRunnerOptions,
    /// Host memory for chosen tokens that no step uses now.
    readbacks: Vec<Readback>,
    /// The number of sequences of the step that was launched last.
    num_chosen: usize,
}

impl ModelRunner {
    /// Loads the checkpoint in `dir` and warms up: kernels are compiled, the arena gets its size, and matrix products
    /// of the sizes to capture are tuned. Where the options name a fraction of the device's memory, the KV cache gets
    /// what is left of it then.
    ///
    /// # Errors
    /// Those of the checkpoint's files, of the options, and of the device; [`Error::Option`] names the option to
    /// change if the device has too little memory.
    pub fn load(
        device: &Device,
        dir: &Path,
        options: ModelRunnerOptions,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self> {
        let config = ModelConfig::load(dir)?;
        options.validate(&config)?;
        let tokenizer = if options.skip_tokenizer_init { None } else { Some(Tokenizer::load(dir)?) };
        if let Some(tokenizer) = &tokenizer {
            tokenizer.check_vocabulary(dir, config.vocab_size)?;
        }
        let mut loaded = |done, total| progress(Progress { stage: Stage::LoadWeights, done, total });
        let weights = match options.load_format {
            LoadFormat::Auto => Weights::open(dir, device, config.dtype, Shard::WHOLE)?,
            LoadFormat::Dummy => Weights::random(device, config.dtype, Shard::WHOLE)?,
        };
        let model = registry::load(&config, weights.with_progress(&mut loaded))?;

        // Where the device's memory bounds it, the KV cache gets its size when all else has been measured.
        let is_fitted = options.mem_fraction_static.is_some();
        let num_pages = if is_fitted { 1 } else { options.num_pages() };
        let caches = Arc::new(memory::caches(device, &config, &options, num_pages)?);
        if !is_fitted {
            progress(Progress { stage: Stage::KvCache, done: 1, total: 1 });
        }
        let layout = config.cache_layout(Shard::WHOLE)?;
        let decode_plan = ops::DecodePlan::new(device, layout.q_heads, layout.k[0]);
        let inputs = InputBuffers::new(device, options.limits()?, options.page_size, decode_plan)?;
        let mut runtime_options = bcg_runtime::RunnerOptions::default();
        runtime_options.name = "model".to_owned();
        runtime_options.poison = options.poison_graph_memory;
        let graphs = |phase: Phase| Ok::<_, Error>(GraphCache::new(phase.name(), options.graph_cache(phase)?));
        let mut runner = Self {
            prefill_graphs: graphs(Phase::Prefill)?,
            decode_graphs: graphs(Phase::Decode)?,
            inputs,
            pages: memory::page_pool(&caches, &options),
            caches,
            model,
            runtime: Runner::new(device, runtime_options)?,
            tokenizer,
            config,
            options,
            readbacks: Vec::new(),
            num_chosen: 0,
        };
        progress(Progress { stage: Stage::WarmUp, done: 0, total: 1 });
        runner.warm_up().map_err(|error| runner.options.without_room(error))?;
        progress(Progress { stage: Stage::WarmUp, done: 1, total: 1 });
        let sizes = runner.options.tuned_sizes()?;
        device.tune_matmuls(&sizes, &mut |done, total| progress(Progress { stage: Stage::Tune, done, total }))?;
        if is_fitted {
            runner.fit_kv_cache(progress)?;
        }
        Ok(runner)
    }

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
        let free_before = self.runtime.device().memory_info()?.free_bytes;
        let arena_before = self.runtime.arena_stats().mapped_bytes;
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
        self.runtime.synchronize()?;
        progress(Progress { stage: Stage::Capture, done: total, total });
        let free_after = self.runtime.device().memory_info()?.free_bytes;
        let arena = self.runtime.arena_stats().mapped_bytes;
        let [prefill_sizes, decode_sizes] = sizes;
        let largest = prefill_sizes.last().and_then(|&size| self.describe(Phase::Prefill, size)).unwrap_or_default();
        Ok(CaptureSummary {
            prefill_sizes,
            decode_sizes,
            segments: largest.segments.len(),
            breaks: largest.breaks.len(),
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
            let batch = runner.inputs.fill(&mut runner.runtime, dummy, phase, size, false)?;
            let forward = runner.forward(phase, size, HiddenRows::Last)?;
            let (graphs, runtime) = runner.graphs_and_runtime(phase);
            graphs.capture_ahead(size, runtime, &batch, forward)
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
    /// one chooses ([`SequenceInput::chosen_row`]), while the device works.
    ///
    /// # Errors
    /// [`Error::Batch`] or [`Error::Sampling`] for a batch that cannot be run, before anything is; the runtime's.
    pub fn launch(&mut self, batch: &[SequenceInput<'_>]) -> Result<PendingStep> {
        self.check(batch)?;
        let (live, hidden) = self.run(batch)?;
        let pending = self.choose_tokens(&live, &hidden, batch)?;
        commit_states(batch);
        Ok(pending)
    }

    /// Waits for a step and returns its tokens. Logits, where they were asked for, are read only if no other step was
    /// launched since.
    ///
    /// # Errors
    /// The first error of the step's work on the device; [`bcg_runtime::Error::Stale`] for logits after another launch.
    pub fn collect(&mut self, step: PendingStep) -> Result<StepOutput> {
        let tokens = step.read(&mut self.runtime)?;
        self.readbacks.push(step.into_readback());
        Ok(StepOutput { tokens })
    }

    /// Enqueues the end of a step: the logits of each sequence's last row, `[B, V]`, its next token, `[B]`, and the
    /// copy of that to the host.
    fn choose_tokens(
        &mut self,
        live: &ForwardBatch,
        hidden: &Tensor,
        batch: &[SequenceInput<'_>],
    ) -> Result<PendingStep> {
        let is_greedy = batch.iter().all(|sequence| sequence.sampling.is_greedy());
        let sampling = if is_greedy { None } else { Some(self.inputs.fill_sampling(&mut self.runtime, batch)?) };
        let model = Arc::clone(&self.model);
        let chosen = self.inputs.chosen().rows(0..batch.len())?;
        let (logits, logprobs) = self.runtime.tail(live, |cx| {
            let last = last_hidden(cx, live, hidden)?; // [B, C]
            let logits = model.logits(cx, &last)?;
            choose::adjust(cx, &logits, batch)?;
            choose::choose(cx, &logits, sampling.as_ref(), &chosen)?;
            let logprobs = choose::logprobs(cx, &logits, &chosen, batch)?;
            Ok((logits, logprobs))
        })?;
        self.num_chosen = batch.len();
        let mut readback = match self.readbacks.pop() {
            Some(readback) => readback,
            None => Readback::new(self.runtime.device(), choose::readback_bytes(self.options.limits()?.sequences))?,
        };
        match &logprobs {
            None => self.runtime.read_back(&[&chosen], &mut readback)?,
            Some((ids, values)) => self.runtime.read_back(&[&chosen, ids, values], &mut readback)?,
        }
        Ok(PendingStep::new(readback, logits, batch))
    }

    /// Runs one sequence and returns the logits of every new token, not only of the last one.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn score(&mut self, sequence: &SequenceInput<'_>) -> Result<Vec<Vec<f32>>> {
        let batch = std::slice::from_ref(sequence);
        self.check(batch)?;
        let rows = sequence.tokens.len();
        let live = self.inputs.fill(&mut self.runtime, batch, Phase::Prefill, rows, true)?;
        let forward = self.forward(Phase::Prefill, rows, HiddenRows::All)?;
        let hidden = self.runtime.eager(&live, forward)?;
        let (model, vocab) = (Arc::clone(&self.model), self.config.vocab_size);
        let logits = self.runtime.tail(&live, |cx| {
            let mut logits = Vec::with_capacity(rows);
            for first in (0..rows).step_by(DUMMY_SEQUENCE_TOKENS) {
                let chunk = hidden.rows(first..(first + DUMMY_SEQUENCE_TOKENS).min(rows))?;
                let chunk = model.logits(cx, &chunk)?;
                logits.extend(cx.read::<f32>(&chunk)?.chunks(vocab).map(<[f32]>::to_vec));
            }
            Ok(logits)
        })?;
        commit_states(batch);
        Ok(logits)
    }

    /// The forward of a batch: its live state and the hidden states of its rows.
    fn run(&mut self, batch: &[SequenceInput<'_>]) -> Result<(ForwardBatch, Tensor)> {
        let (phase, rows) = (Phase::of(batch), batch.iter().map(SequenceInput::num_new).sum());
        match self.graphs_and_runtime(phase).0.decide(rows) {
            Decision::Replay { size } | Decision::Capture { size } if self.options.debug_cuda_graph => {
                self.run_eagerly(batch, phase, size)
            }
            Decision::Replay { size } => {
                let live = self.inputs.fill(&mut self.runtime, batch, phase, size, true)?;
                let (graphs, runtime) = self.graphs_and_runtime(phase);
                let hidden = graphs.replay(size, runtime, &live)?;
                Ok((live, hidden))
            }
            Decision::Capture { size } => {
                let live = self.inputs.fill(&mut self.runtime, batch, phase, size, true)?;
                let forward = self.forward(phase, size, HiddenRows::Last)?;
                let (graphs, runtime) = self.graphs_and_runtime(phase);
                match graphs.capture(size, runtime, &live, forward) {
                    Ok(hidden) => Ok((live, hidden)),
                    // The cache counted it and does not try this size again; the batch is served all the same.
                    Err(_) => self.run_eagerly(batch, phase, rows),
                }
            }
            Decision::Eager(_) => self.run_eagerly(batch, phase, rows),
        }
    }

    fn run_eagerly(
        &mut self,
        batch: &[SequenceInput<'_>],
        phase: Phase,
        rows: usize,
    ) -> Result<(ForwardBatch, Tensor)> {
        let live = self.inputs.fill(&mut self.runtime, batch, phase, rows, true)?;
        let forward = self.forward(phase, rows, HiddenRows::Last)?;
        let hidden = self.runtime.eager(&live, forward)?;
        Ok((live, hidden))
    }

    fn graphs(&self, phase: Phase) -> &GraphCache<ForwardBatch, Tensor> {
        match phase {
            Phase::Prefill => &self.prefill_graphs,
            Phase::Decode => &self.decode_graphs,
        }
    }

    fn graphs_and_runtime(&mut self, phase: Phase) -> (&mut GraphCache<ForwardBatch, Tensor>, &mut Runner) {
        let graphs = match phase {
            Phase::Prefill => &mut self.prefill_graphs,
            Phase::Decode => &mut self.decode_graphs,
        };
        (graphs, &mut self.runtime)
    }

    /// What is captured: the model on the input buffers' first `rows` rows.
    fn forward(
        &self,
        phase: Phase,
        rows: usize,
        wanted: HiddenRows,
    ) -> bcg_runtime::Result<impl Fn(&mut Context<'_, ForwardBatch>) -> bcg_runtime::Result<Tensor> + Send + Sync + use<>>
    {
        let (model, caches) = (Arc::clone(&self.model), Arc::clone(&self.caches));
        let mut inputs = self.inputs.token_inputs(phase, rows)?;
        if wanted == HiddenRows::All {
            inputs.last_rows = None;
        }
        Ok(move |cx: &mut Context<'_, ForwardBatch>| model.forward(cx, &inputs, &caches))
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
                let live = runner.inputs.fill(&mut runner.runtime, dummy, phase, rows, false)?;
                let forward = runner.forward(phase, rows, HiddenRows::Last)?;
                let hidden = runner.runtime.eager(&live, forward)?;
                let sampling = runner.inputs.fill_sampling(&mut runner.runtime, dummy)?;
                let chosen = runner.inputs.chosen().rows(0..dummy.len())?;
                let model = Arc::clone(&runner.model);
                runner.runtime.tail(&live, |cx| {
                    let last = last_hidden(cx, &live, &hidden)?;
                    let logits = model.logits(cx, &last)?;
                    choose::choose(cx, &logits, None, &chosen)?;
                    choose::choose(cx, &logits, Some(&sampling), &chosen)
                })
            })?;
        }
        Ok(self.runtime.synchronize()?)
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
        f: impl FnOnce(&mut Self, &[SequenceInput<'_>]) -> bcg_runtime::Result<R>,
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
        Ok(f(self, &batch)?)
    }

    /// Refuses a batch that does not fit, before any of it runs.
    fn check(&self, batch: &[SequenceInput<'_>]) -> Result<()> {
        let options = &self.options;
        if !(1..=options.max_running_requests).contains(&batch.len()) {
            return Err(Error::batch("sequences", format!("1 to {}", options.max_running_requests), batch.len()));
        }
        let rows: usize = batch.iter().map(SequenceInput::num_new).sum();
        if rows > options.chunked_prefill_size {
            return Err(Error::batch("new tokens", format!("at most {}", options.chunked_prefill_size), rows));
        }
        for sequence in batch {
            sequence.sampling.validate()?;
            if sequence.num_new() == 0 {
                return Err(Error::batch("new tokens of a sequence", "at least 1", 0));
            }
            if let Some(row) = sequence.chosen_row.filter(|&row| row >= self.num_chosen) {
                let expected = format!("one of the {} rows of the step launched last", self.num_chosen);
                return Err(Error::batch("chosen row of a sequence", expected, row));
            }
            if sequence.kv_len() > options.context_length {
                let expected = format!("at most {} tokens", options.context_length);
                return Err(Error::batch("length of a sequence", expected, sequence.kv_len()));
            }
            self.check_choice(sequence)?;
            self.check_state(sequence)?;
            let wanted = self.pages.pages_for(sequence.kv_len());
            if sequence.pages.len() < wanted {
                return Err(Error::batch("pages of a sequence", format!("at least {wanted}"), sequence.pages.len()));
            }
            if let Some(page) = sequence.pages.iter().find(|&&page| page as usize >= self.pages.num_pages()) {
                return Err(Error::batch("page", format!("below {}", self.pages.num_pages()), page));
            }
            if let Some(token) = sequence.tokens.iter().find(|&&token| token as usize >= self.config.vocab_size) {
                return Err(Error::batch("token", format!("below {}", self.config.vocab_size), token));
            }
        }
        Ok(())
    }

    /// Refuses what cannot be asked of the next token.
    fn check_choice(&self, sequence: &SequenceInput<'_>) -> Result<()> {
        let vocab = self.config.vocab_size;
        if let Some(&count) = sequence.top_logprobs.as_ref().filter(|&&count| count > TOP_LOGPROBS_MAX) {
            return Err(Error::batch("top_logprobs of a sequence", format!("at most {TOP_LOGPROBS_MAX}"), count));
        }
        if let Some((token, _)) = sequence.logit_bias.iter().find(|(token, _)| *token as usize >= vocab) {
            return Err(Error::batch("token of a logit bias", format!("below {vocab}"), token));
        }
        let words = vocab.div_ceil(32);
        match sequence.token_mask.filter(|mask| mask.len() != words) {
            Some(mask) => Err(Error::batch("words of a token mask", words.to_string(), mask.len())),
            None => Ok(()),
        }
    }

    /// Refuses a step that a model with states cannot do: they stand for all tokens up to where the last step ended.
    fn check_state(&self, sequence: &SequenceInput<'_>) -> Result<()> {
        if self.caches.states.layers().is_empty() {
            return Ok(());
        }
        let Some(state) = sequence.state else {
            return Err(Error::batch("state of a sequence", "that of its lease, for a model with states", "none"));
        };
        let (past_len, held) = (sequence.past_len, state.num_tokens());
        if past_len != 0 && past_len != held {
            let expected = format!("0, or the {held} tokens that its state stands for, which cannot be turned back");
            return Err(Error::batch("past tokens of a sequence", expected, past_len));
        }
        Ok(())
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

    /// The device it runs on.
    pub fn device(&self) -> &Device {
        self.runtime.device()
    }

    /// The KV cache.
    pub fn kv_cache(&self) -> &KvCache {
        &self.caches.kv
    }

    /// The states of state-space layers.
    pub fn states(&self) -> &StateCache {
        &self.caches.states
    }

    /// What the graphs of both phases did so far.
    pub fn stats(&self) -> GraphStats {
        self.prefill_graphs.stats().merged(self.decode_graphs.stats())
    }

    /// The device memory that the graphs of both phases take, in bytes, their shared activations not counted.
    pub fn graph_bytes(&self) -> usize {
        self.prefill_graphs.graph_bytes() + self.decode_graphs.graph_bytes()
    }

    /// How many launches and copies were enqueued so far.
    pub fn runtime_stats(&self) -> bcg_runtime::RunnerStats {
        self.runtime.stats()
    }

    /// The capture sizes of a phase, in rising order; empty without graphs.
    pub fn graph_sizes(&self, phase: Phase) -> &[usize] {
        self.graphs(phase).ladder().map_or(&[], bcg_runtime::Ladder::sizes)
    }

    /// Describes the graph of a size, if it is captured.
    pub fn describe(&self, phase: Phase, size: usize) -> Option<Description> {
        self.graphs(phase).describe(size)
    }
}

/// The rows whose hidden states a forward returns.
#[derive(Clone, Copy, PartialEq, Eq)]
enum HiddenRows {
    /// Each sequence's last row, if the model can end the others early.
    Last,
    /// Every row of the batch.
    All,
}

/// The hidden states of each sequence's last row, `[B, C]`.
fn last_hidden(cx: &mut OpStream, live: &ForwardBatch, hidden: &Tensor) -> bcg_runtime::Result<Tensor> {
    if live.rows().is_some_and(|rows| rows.padded > hidden.dim(0)) {
        // The model has kept them, in the order of the sequences.
        return hidden.rows(0..live.num_sequences());
    }
    ops::gather_rows(cx, hidden, &live.last_rows)
}

/// Notes that a step succeeded: the states that it wrote count from now on.
fn commit_states(batch: &[SequenceInput<'_>]) {
    for sequence in batch {
        if let Some(state) = sequence.state {
            state.commit(sequence.kv_len());
        }
    }
}
