//! How a model runner is set up, and what it reports.

use std::time::Duration;

use bcg_runtime::{CacheOptions, Ladder};

use crate::batch::{BatchLimits, Phase};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::weights::Experts;

/// Whether and when forwards are captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GraphMode {
    /// Every forward runs eagerly.
    #[default]
    Off,
    /// All sizes are captured by [`ModelRunner::capture`](super::ModelRunner::capture), before serving.
    Ahead,
    /// The size of a batch is captured while it serves the first one that has it: without padding, within
    /// [`ModelRunnerOptions::cuda_graph_lazy_max_graphs`] and [`ModelRunnerOptions::cuda_graph_lazy_max_mib`].
    Lazy,
}

/// Where the weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoadFormat {
    /// The checkpoint's safetensors files.
    #[default]
    Auto,
    /// Random numbers made on the device: `config.json` is enough, and the answers mean nothing.
    Dummy,
}

/// An option, or a combination of options, that cannot work. Names of options stand in backticks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{option}`: {problem}; {remedy}")]
pub struct OptionError {
    /// The option to look at.
    pub option: &'static str,
    /// What is wrong with it.
    pub problem: String,
    /// What to do about it.
    pub remedy: &'static str,
}

impl OptionError {
    /// Makes an error about one option.
    pub fn new(option: &'static str, problem: impl Into<String>, remedy: &'static str) -> Self {
        Self { option, problem: problem.into(), remedy }
    }

    /// Refuses a count that is 0 or no positive 32-bit number.
    ///
    /// # Errors
    /// The refusal.
    pub fn positive(option: &'static str, count: usize) -> std::result::Result<(), Self> {
        match count {
            0 => Err(Self::new(option, "is 0", "give a number of at least 1")),
            count if count > i32::MAX as usize => {
                Err(Self::new(option, format!("is {count}"), "give a number of at most 2147483647"))
            }
            _ => Ok(()),
        }
    }

    /// Refuses a time that is no sum with another one any more.
    ///
    /// # Errors
    /// The refusal of more than 2147483647 seconds.
    pub fn seconds(option: &'static str, time: Duration) -> std::result::Result<(), Self> {
        match time.as_secs() {
            seconds if seconds > i32::MAX as u64 => {
                Err(Self::new(option, format!("is {seconds} seconds"), "give at most 2147483647 seconds"))
            }
            _ => Ok(()),
        }
    }
}

/// How a [`ModelRunner`](super::ModelRunner) is set up.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelRunnerOptions {
    /// Where the weights come from.
    pub load_format: LoadFormat,
    /// How several ranks divide the experts of a mixture.
    pub experts: Experts,
    /// Runs without a tokenizer: the model takes and gives token ids, and `tokenizer.json` need not exist.
    pub skip_tokenizer_init: bool,
    /// Tokens of one page of the KV cache.
    pub page_size: usize,
    /// Tokens that the KV cache holds, rounded up to pages; at most these with `mem_fraction_static`.
    pub kv_cache_tokens: usize,
    /// The part of the device's memory, 0.0 to 1.0, that weights, activations, graphs and KV cache may take together: the
    /// cache gets what the others, which are measured before, leave of it. Its tokens are `kv_cache_tokens` whatever is
    /// free if `None`.
    pub mem_fraction_static: Option<f64>,
    /// The most sequences in one step.
    pub max_running_requests: usize,
    /// The most tokens of one sequence, prompt and answer.
    pub context_length: usize,
    /// The most new tokens in one step.
    pub chunked_prefill_size: usize,
    /// Whether and when forwards are captured.
    pub graph: GraphMode,
    /// The capture sizes of prefills, in tokens. If `None`, those up to `cuda_graph_max_tokens`: a ladder of them in
    /// [`GraphMode::Ahead`], every one in [`GraphMode::Lazy`].
    pub cuda_graph_sizes: Option<Vec<usize>>,
    /// The capture sizes of decodes, in sequences. If `None`, those up to `max_running_requests`, as for prefills.
    pub cuda_graph_decode_sizes: Option<Vec<usize>>,
    /// The largest size of a prefill that is captured if `cuda_graph_sizes` is `None`. If this is `None` too, the largest
    /// step that there can be, so that every step of prompts has a graph.
    pub cuda_graph_max_tokens: Option<usize>,
    /// The most graphs of each phase that are held in [`GraphMode::Lazy`]; the least recently used one goes first.
    pub cuda_graph_lazy_max_graphs: usize,
    /// The most device memory that the graphs of each phase may take in [`GraphMode::Lazy`], in MiB; the least recently
    /// used one goes first.
    pub cuda_graph_lazy_max_mib: usize,
    /// A batch that would replay a graph runs eagerly, with the padded rows of that graph, and nothing is captured: to tell a
    /// bug of a graph from a bug of a model.
    pub debug_cuda_graph: bool,
    /// Every Nth replay is compared with an eager run, bit for bit.
    pub verify_graph: Option<u32>,
    /// Dead memory is filled with NaN before each replay.
    pub poison_graph_memory: bool,
}

impl Default for ModelRunnerOptions {
    fn default() -> Self {
        Self {
            load_format: LoadFormat::Auto,
            experts: Experts::default(),
            skip_tokenizer_init: false,
            page_size: 16,
            kv_cache_tokens: 8192,
            mem_fraction_static: None,
            max_running_requests: 16,
            context_length: 2048,
            chunked_prefill_size: 2048,
            graph: GraphMode::Off,
            cuda_graph_sizes: None,
            cuda_graph_decode_sizes: None,
            cuda_graph_max_tokens: None,
            cuda_graph_lazy_max_graphs: 128,
            cuda_graph_lazy_max_mib: 256,
            debug_cuda_graph: false,
            verify_graph: None,
            poison_graph_memory: false,
        }
    }
}

impl ModelRunnerOptions {
    /// Checks the options by themselves.
    ///
    /// # Errors
    /// [`OptionError`] names the first option that cannot be honoured.
    pub fn check(&self) -> std::result::Result<(), OptionError> {
        for (option, value) in [
            ("page_size", self.page_size),
            ("kv_cache_tokens", self.kv_cache_tokens),
            ("max_running_requests", self.max_running_requests),
            ("context_length", self.context_length),
            ("chunked_prefill_size", self.chunked_prefill_size),
            ("cuda_graph_lazy_max_graphs", self.cuda_graph_lazy_max_graphs),
        ] {
            OptionError::positive(option, value)?;
        }
        if let Some(fraction) = self.mem_fraction_static
            && !(fraction > 0.0 && fraction <= 1.0)
        {
            return Err(OptionError::new("mem_fraction_static", format!("is {fraction}"), "give a part such as 0.9"));
        }
        if self.verify_graph == Some(0) {
            let remedy = "give at least 1, which checks every replay";
            return Err(OptionError::new("verify_graph", "every 0th replay is none", remedy));
        }
        if self.chunked_prefill_size < self.max_running_requests {
            return Err(OptionError::new(
                "chunked_prefill_size",
                format!(
                    "a step of {} tokens cannot hold the {} sequences of `max_running_requests`",
                    self.chunked_prefill_size, self.max_running_requests
                ),
                "raise it or lower `max_running_requests`",
            ));
        }
        Ok(())
    }

    /// Checks the options by themselves and against the model.
    ///
    /// # Errors
    /// [`Error::Option`](crate::Error::Option) names the first option that cannot be honoured.
    pub fn validate(&self, config: &ModelConfig) -> Result<()> {
        self.check()?;
        let (longest, asked) = (config.max_position_embeddings, self.context_length);
        if asked > longest {
            let problem = format!("{asked} is above the model's {longest} positions");
            return Err(OptionError::new("context_length", problem, "lower it or drop it").into());
        }
        Ok(())
    }

    /// [`cuda_graph_lazy_max_mib`](Self::cuda_graph_lazy_max_mib) in bytes.
    pub(super) fn lazy_max_bytes(&self) -> usize {
        self.cuda_graph_lazy_max_mib.saturating_mul(1 << 20)
    }

    /// The most new tokens that a step can have.
    pub(super) fn largest_step(&self) -> usize {
        self.chunked_prefill_size.min(self.max_running_requests.saturating_mul(self.context_length))
    }

    /// The capture sizes of a phase, none above its largest step; `None` without graphs.
    ///
    /// # Errors
    /// [`bcg_runtime::Error::Option`] if no size is left.
    pub fn ladder(&self, phase: Phase) -> Result<Option<Ladder>> {
        if self.graph == GraphMode::Off {
            return Ok(None);
        }
        let (sizes, largest, default) = match phase {
            Phase::Prefill => {
                let largest = self.largest_step();
                (&self.cuda_graph_sizes, largest, self.cuda_graph_max_tokens.map_or(largest, |max| max.min(largest)))
            }
            // A decode may be padded beyond the most sequences, but not beyond the rows of a step.
            Phase::Decode => (&self.cuda_graph_decode_sizes, self.chunked_prefill_size, self.max_running_requests),
        };
        let ladder = match sizes {
            Some(sizes) => Ladder::explicit(sizes.clone())?.clamped(largest)?,
            None if self.graph == GraphMode::Lazy => Ladder::exact(default)?,
            None => Ladder::relative(default, 1)?,
        };
        Ok(Some(ladder))
    }

    /// The sizes whose matrix products are tuned: all that are captured ahead, and of each single one a ladder; and the
    /// largest step, which is the usual one under load.
    pub(super) fn tuned_sizes(&self) -> Result<Vec<usize>> {
        let padded = match self.graph {
            GraphMode::Off => return Ok(Vec::new()),
            GraphMode::Ahead | GraphMode::Lazy => Self { graph: GraphMode::Ahead, ..self.clone() },
        };
        let mut sizes = Vec::new();
        for phase in Phase::ALL {
            sizes.extend_from_slice(padded.ladder(phase)?.as_ref().map_or(&[], Ladder::sizes));
        }
        sizes.push(self.largest_step());
        Ok(sizes)
    }

    /// How the graphs of a phase are captured and kept.
    ///
    /// # Errors
    /// As [`ladder`](Self::ladder).
    pub(super) fn graph_cache(&self, phase: Phase) -> Result<CacheOptions> {
        let is_lazy = self.graph == GraphMode::Lazy;
        // Ahead, every size of the ladder stays.
        let or_all = |max| if is_lazy { max } else { usize::MAX };
        let mut options = CacheOptions::default();
        options.ladder = self.ladder(phase)?;
        // Nothing is captured ahead for debugging, and each size of the ladder is still used.
        options.lazy = is_lazy || self.debug_cuda_graph;
        options.graphs_max = or_all(self.cuda_graph_lazy_max_graphs);
        options.bytes_max = or_all(self.lazy_max_bytes());
        options.verify_every = self.verify_graph;
        Ok(options)
    }

    /// The sizes of the input buffers.
    pub(super) fn limits(&self) -> Result<BatchLimits> {
        let padded_decode = self.ladder(Phase::Decode)?.map_or(0, |ladder| ladder.largest());
        Ok(BatchLimits {
            rows: self.chunked_prefill_size,
            sequences: self.max_running_requests.max(padded_decode),
            pages_per_sequence: self.context_length.div_ceil(self.page_size),
        })
    }
}

/// How far a long piece of work is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub stage: Stage,
    /// Bytes or sizes done.
    pub done: usize,
    /// Bytes or sizes in all.
    pub total: usize,
}

/// A long piece of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stage {
    /// Weights go to the device; counted in bytes.
    LoadWeights,
    /// The KV cache is allocated and zeroed; one step.
    KvCache,
    /// Kernels are compiled or loaded and the arena gets its size; one step.
    WarmUp,
    /// Algorithms of matrix products are timed, where no earlier run did; counted in products.
    Tune,
    /// Graphs are captured; counted in sizes.
    Capture,
}

impl Stage {
    /// What is being done, as a progress bar says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::LoadWeights => "loading weights",
            Self::KvCache => "making KV cache",
            Self::WarmUp => "warming up",
            Self::Tune => "tuning matrix products",
            Self::Capture => "capturing graphs",
        }
    }
}

/// What [`ModelRunner::capture`](super::ModelRunner::capture) made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CaptureSummary {
    /// The captured sizes of prefills, in tokens and in rising order.
    pub prefill_sizes: Vec<usize>,
    /// The captured sizes of decodes, in sequences and in rising order.
    pub decode_sizes: Vec<usize>,
    /// Segments of one prefill graph.
    pub segments: usize,
    /// Breaks of one prefill graph, the same for all sizes.
    pub breaks: usize,
    /// Time for all sizes.
    pub capture_time: Duration,
    /// Arena memory that all graphs share: the activations of the largest size, in bytes.
    pub arena_bytes: usize,
    /// Device memory that the graphs took beyond that, in bytes.
    pub graph_bytes: usize,
}

/// A token that a step chose.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    /// The token.
    pub id: u32,
    /// The natural logarithm of its probability before temperature and filters, where log probabilities were asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens and their log probabilities, best first.
    pub top: Vec<(u32, f32)>,
    /// The logits it was chosen from, where they were asked for.
    pub logits: Option<Vec<f32>>,
}

/// What a step returns.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepOutput {
    /// One token for each sequence, in the batch's order.
    pub tokens: Vec<SampledToken>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ladder_ends_at_the_largest_step() {
        let options =
            ModelRunnerOptions { graph: GraphMode::Ahead, chunked_prefill_size: 100, ..ModelRunnerOptions::default() };
        let ladder =
            |options: &ModelRunnerOptions, phase| options.ladder(phase).expect("a ladder").expect("graphs are on");
        assert_eq!(ladder(&options, Phase::Prefill).largest(), 100);
        assert_eq!(ladder(&options, Phase::Decode).largest(), 16);
        let defaults = ModelRunnerOptions { graph: GraphMode::Ahead, ..ModelRunnerOptions::default() };
        assert_eq!(ladder(&defaults, Phase::Prefill).largest(), defaults.chunked_prefill_size, "no step runs eagerly");
        let capped = ModelRunnerOptions { cuda_graph_max_tokens: Some(50), ..options.clone() };
        assert_eq!(ladder(&capped, Phase::Prefill).largest(), 50);
        let sizes = Some(vec![512, 64, 8]);
        let explicit = ModelRunnerOptions { cuda_graph_sizes: sizes, ..options.clone() };
        assert_eq!(ladder(&explicit, Phase::Prefill).sizes(), [8, 64]);
        let none_left = ModelRunnerOptions { cuda_graph_sizes: Some(vec![512]), ..options };
        none_left.ladder(Phase::Prefill).expect_err("no size is left");
        assert!(ModelRunnerOptions::default().ladder(Phase::Prefill).expect("graphs are off").is_none());
    }

    #[test]
    fn lazy_graphs_have_the_exact_sizes_of_their_batches_within_a_budget() {
        let options =
            ModelRunnerOptions { graph: GraphMode::Lazy, chunked_prefill_size: 100, ..ModelRunnerOptions::default() };
        for (phase, largest) in [(Phase::Prefill, 100), (Phase::Decode, 16)] {
            let cache = options.graph_cache(phase).expect("options");
            assert!(cache.ladder.expect("graphs are on").sizes().iter().copied().eq(1..=largest));
            assert_eq!((cache.graphs_max, cache.bytes_max), (128, 256 << 20));
        }
        let tuned = options.tuned_sizes().expect("sizes");
        let ahead = ModelRunnerOptions { graph: GraphMode::Ahead, ..options };
        assert_eq!(tuned, ahead.tuned_sizes().expect("sizes"), "too many to tune each");
        assert_eq!(ahead.graph_cache(Phase::Prefill).expect("options").graphs_max, usize::MAX);
        assert!(ModelRunnerOptions::default().tuned_sizes().expect("graphs are off").is_empty());
    }

    #[test]
    fn an_option_that_cannot_be_honoured_is_named() {
        let config = ModelConfig::load(&crate::testing::tiny_qwen3()).expect("config");
        let good = ModelRunnerOptions::default();
        good.validate(&config).expect("defaults fit the tiny model");
        for (field, options) in [
            ("page_size", ModelRunnerOptions { page_size: 0, ..good.clone() }),
            ("context_length", ModelRunnerOptions { context_length: 5000, ..good.clone() }),
            ("chunked_prefill_size", ModelRunnerOptions { chunked_prefill_size: 8, ..good.clone() }),
            ("cuda_graph_lazy_max_graphs", ModelRunnerOptions { cuda_graph_lazy_max_graphs: 0, ..good.clone() }),
            ("mem_fraction_static", ModelRunnerOptions { mem_fraction_static: Some(1.5), ..good.clone() }),
        ] {
            let error = options.validate(&config).expect_err(field).to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
