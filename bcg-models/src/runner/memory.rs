//! Who gets which part of the device's memory: all that is not the KV cache is measured first, and the cache gets the
//! rest.
//!
//! With [`ModelRunnerOptions::mem_fraction_static`](super::ModelRunnerOptions::mem_fraction_static) a model is loaded in this
//! order: weights → states, and a KV cache of one page → the largest step that there can be, which gives the arena its
//! size and loads the kernels → a few graphs, captured and dropped, which tell what one takes → the KV cache with what
//! is left of the fraction.
//!
//! Every rank of every stage does all of it, and the KV caches have as many pages as fit on every device.

use std::sync::Arc;

use bcg_runtime::{CacheOptions, Device, DeviceKind, GraphCache, MemoryInfo};

use super::options::{GraphMode, ModelRunnerOptions, OptionError};
use super::staged::{Path, StagedStep};
use super::{DUMMY_SEQUENCE_TOKENS, ModelRunner, Progress, Role, Stage, nodes};
use crate::batch::Phase;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::state::{CacheLayout, Caches, PagePool};

/// What a rank takes of its device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RankMemory {
    /// Its share of the weights.
    pub weight_bytes: usize,
    /// Its share of the KV cache and of the states.
    pub cache_bytes: usize,
    /// The activations.
    pub arena_bytes: usize,
    /// The graphs.
    pub graph_bytes: usize,
}

impl RankMemory {
    /// All of it together.
    pub fn total(&self) -> usize {
        self.weight_bytes + self.cache_bytes + self.arena_bytes + self.graph_bytes
    }
}

/// What a device has, and what is taken of it beside weights and KV cache, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Measured {
    /// What the device has.
    pub(super) memory: MemoryInfo,
    /// What the arena of a rank takes, for the activations of the largest step. It is mapped already, so it counts as used.
    pub(super) arena_bytes: usize,
    /// What all graphs of the ranks that share the device will take. None of them is captured yet.
    pub(super) graph_bytes: usize,
    /// The keys and values of one token, of the ranks that share the device.
    pub(super) kv_bytes_per_token: usize,
}

/// Makes a KV cache of some pages, and states for as many sequences as can run.
pub(super) fn caches(
    device: &Device,
    config: &ModelConfig,
    options: &ModelRunnerOptions,
    (role, layout): (&Role, &CacheLayout),
    num_pages: usize,
) -> Result<Caches> {
    let kv = role.kv_cache(device, config.dtype, layout, [num_pages, options.page_size])?;
    let slots = 2 * options.max_running_requests;
    let states = role.states(device, config.dtype, layout, slots).map_err(|error| match error {
        bcg_runtime::Error::OutOfMemory { .. } => {
            let bytes = layout.states.as_ref().map_or(0, |layout| 2 * layout.bytes_per_slot(config.dtype));
            let sequences = options.max_running_requests;
            let problem =
                format!("no room for the states of {sequences} sequences, {} MiB each ({error})", bytes >> 20);
            Error::from(OptionError::new("max_running_requests", problem, "lower it"))
        }
        error => error.into(),
    })?;
    Ok(Caches { kv, states })
}

/// Makes the pool of the pages and states that the caches of all ranks have.
pub(super) fn page_pool<'a>(caches: impl IntoIterator<Item = &'a Caches>, options: &ModelRunnerOptions) -> PagePool {
    let (mut num_pages, mut num_states) = (usize::MAX, 0);
    for caches in caches {
        num_pages = num_pages.min(caches.kv.num_pages());
        if !caches.states.layers().is_empty() {
            num_states = options.max_running_requests;
        }
    }
    PagePool::with_states(num_pages, options.page_size, num_states)
}

impl ModelRunner {
    /// Replaces the KV cache by one that takes what is left of the device's memory.
    ///
    /// # Errors
    /// [`Error::Option`] names the option that leaves too little; the device's.
    pub(super) fn fit_kv_cache(&mut self, progress: &mut dyn FnMut(Progress)) -> Result<()> {
        progress(Progress { stage: Stage::KvCache, done: 0, total: 1 });
        let graph_bytes = self.measure_graphs()?;
        let dtype = self.config.dtype;
        let measured = self.stages.on_each(move |rank| {
            rank.runtime.synchronize()?; // graphs that still ran are gone then
            Ok(Measured {
                memory: rank.device().memory_info()?,
                arena_bytes: rank.runtime.arena_stats().mapped_bytes,
                graph_bytes,
                kv_bytes_per_token: rank.layout.kv_bytes_per_token(dtype),
            })
        })?;
        let mut options = self.options.clone();
        for rank in 0..measured.len() {
            let of_device = self.of_device(&measured, rank);
            options.fit_kv_cache(of_device)?;
            tracing::debug!(rank, ?of_device, tokens = options.kv_cache_tokens, "the KV cache gets what is left");
        }
        options.kv_cache_tokens = nodes::least(self.world(), "the size of the KV cache", options.kv_cache_tokens)?;
        let (num_pages, page_size) = (options.num_pages(), options.page_size);
        let role = self.role.clone();
        self.stages.on_each(move |rank| {
            let kv = role.kv_cache(rank.device(), dtype, &rank.layout, [num_pages, page_size])?;
            rank.caches = Arc::new(Caches { kv, states: rank.caches.states.clone() });
            Ok(())
        })?;
        self.pages = page_pool(self.stages.leaders().map(|rank| &*rank.caches), &options);
        self.options = options;
        progress(Progress { stage: Stage::KvCache, done: 1, total: 1 });
        Ok(())
    }

    /// What was measured of a rank, with what the other ranks take that share its device: GPUs of one name are one GPU, host
    /// devices have memory of their own.
    fn of_device(&self, measured: &[Measured], rank: usize) -> Measured {
        let devices: Vec<&Device> = self.devices().collect();
        let own = devices[rank];
        let shares = |other: usize| own.kind() == DeviceKind::Cuda && devices[other].name() == own.name();
        let others = (0..devices.len()).filter(|&other| other != rank && shares(other));
        others.fold(measured[rank], |sum, other| Measured {
            graph_bytes: sum.graph_bytes + measured[other].graph_bytes,
            kv_bytes_per_token: sum.kv_bytes_per_token + measured[other].kv_bytes_per_token,
            ..sum
        })
    }

    /// What each rank takes of its device, in the order of the devices.
    ///
    /// # Errors
    /// [`bcg_runtime::Error::RankLost`] if a rank is lost.
    pub fn rank_memory(&mut self) -> Result<Vec<RankMemory>> {
        self.stages.on_each(|rank| Ok(rank.memory()))
    }

    /// Returns what all graphs will take, in bytes: what the largest ones take, for each size.
    fn measure_graphs(&mut self) -> Result<usize> {
        let mut total = 0;
        for phase in Phase::ALL {
            let sizes = self.graph_sizes(phase).to_vec();
            let most = sizes.last().map_or(Ok(0), |&largest| self.measure_graph(phase, largest))?;
            let all = most * sizes.len();
            total += match self.options.graph {
                GraphMode::Lazy => self.options.lazy_graph_bytes(all, most)?,
                GraphMode::Off | GraphMode::Ahead => all,
            };
        }
        Ok(total)
    }

    /// Captures the graph of a size, drops it, and returns what it took, in bytes, with what replays of other kinds of
    /// batches add; with several ranks, the most that it took on one of them.
    fn measure_graph(&mut self, phase: Phase, size: usize) -> Result<usize> {
        let options = self.options.graph_cache(phase)?;
        let unbounded = {
            let mut changed = options.clone();
            changed.graphs_max = usize::MAX;
            changed.bytes_max = usize::MAX;
            changed
        };
        self.replace_graphs(phase, unbounded)?;
        let captured = self.capture_size(phase, size).and_then(|()| self.replay_all_kinds(phase, size));
        captured.map_err(|error| self.options.without_room(error))?;
        let bytes = self.replace_graphs(phase, options)?;
        Ok(bytes.into_iter().max().unwrap_or(0))
    }

    /// Replaces the graphs of a phase by none yet, and returns what they took on each rank.
    fn replace_graphs(&mut self, phase: Phase, options: CacheOptions) -> Result<Vec<usize>> {
        self.stages.on_each(move |rank| {
            let (graphs, _) = rank.graphs_and_runtime(phase);
            let before = std::mem::replace(graphs, GraphCache::new(phase.name(), options.clone()));
            Ok(before.graph_bytes())
        })
    }

    /// Replays a graph of prefills with a mixed batch, and both kinds of batches with a padded row if the ladder has such
    /// batches. The breaks of each do other work than those of the capture, which makes an executable of its own.
    fn replay_all_kinds(&mut self, phase: Phase, size: usize) -> Result<()> {
        if phase == Phase::Decode {
            return Ok(());
        }
        let is_padded =
            |rows: usize| self.first().graphs(phase).ladder().and_then(|ladder| ladder.size_for(rows)) == Some(size);
        let fewer = (size >= 2 && is_padded(size - 1)).then(|| size - 1);
        for (rows, decodes) in [size].into_iter().chain(fewer).flat_map(|rows| [(rows, 0), (rows, 1)]) {
            if (rows, decodes) == (size, 0) || (decodes > 0 && !self.can_mix(rows)?) {
                continue;
            }
            self.with_dummy((rows, decodes), DUMMY_SEQUENCE_TOKENS, |runner, dummy| {
                let step = StagedStep { path: Path::Replay, ..runner.stage_dummy(dummy, phase, size) };
                runner.stages.on_ranks(step, |rank, step| rank.run(step).map(drop))
            })?;
        }
        Ok(())
    }
}

impl ModelRunnerOptions {
    /// Pages of the KV cache.
    pub(super) fn num_pages(&self) -> usize {
        self.kv_cache_tokens.div_ceil(self.page_size)
    }

    /// Lowers `kv_cache_tokens` to what fits into memory that holds weights and arena already.
    ///
    /// # Errors
    /// [`Error::Option`] if not even one sequence of `context_length` fits.
    pub(super) fn fit_kv_cache(&mut self, measured: Measured) -> Result<()> {
        let Some(fraction) = self.mem_fraction_static else { return Ok(()) };
        let Measured { memory, arena_bytes, graph_bytes, kv_bytes_per_token } = measured;
        let kept_free = (memory.total_bytes as f64 * (1.0 - fraction)).ceil() as usize;
        let page_bytes = kv_bytes_per_token * self.page_size;
        let taken = kept_free.saturating_add(graph_bytes);
        // A stage of a pipeline without attention keeps nothing.
        let Some(pages) = memory.free_bytes.saturating_sub(taken).checked_div(page_bytes) else { return Ok(()) };
        let fits = pages * self.page_size;
        if fits < self.context_length {
            let problem = format!(
                "{fraction} leaves room for {fits} tokens beside the weights, {} MiB of activations and {} MiB of graphs, \
                 and context_length = {}",
                arena_bytes.div_ceil(1 << 20),
                graph_bytes.div_ceil(1 << 20),
                self.context_length,
            );
            let remedy = "raise it, or lower context_length, chunked_prefill_size or the capture sizes";
            return Err(OptionError::new("mem_fraction_static", problem, remedy).into());
        }
        self.kv_cache_tokens = self.kv_cache_tokens.min(fits);
        Ok(())
    }

    /// Returns what the lazily captured graphs of a phase take at most: of all sizes `all`, of one `most` bytes.
    fn lazy_graph_bytes(&self, all: usize, most: usize) -> Result<usize> {
        let bytes_max = self.lazy_max_bytes();
        if most > bytes_max {
            let problem = format!("{bytes_max} bytes hold no graph, one takes {most}");
            return Err(OptionError::new("cuda_graph_lazy_max_mib", problem, "raise it").into());
        }
        // A new graph is there for a moment before the oldest one goes.
        Ok(all.min(bytes_max).min(self.cuda_graph_lazy_max_graphs.saturating_mul(most)) + most)
    }

    /// Names the option that made a step too large for the device.
    pub(super) fn without_room(&self, error: Error) -> Error {
        match &error {
            Error::Runtime(runtime) if matches!(runtime.root(), bcg_runtime::Error::OutOfMemory { .. }) => {
                let tokens = self.chunked_prefill_size;
                let problem = format!("a step of {tokens} tokens needs more memory than the weights leave ({runtime})");
                OptionError::new("chunked_prefill_size", problem, "lower it").into()
            }
            _ => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::Shard;

    #[test]
    fn the_kv_cache_gets_what_the_others_leave() {
        let config = ModelConfig::load(&crate::testing::tiny_qwen3()).expect("config");
        let page_bytes = config.cache_layout(Shard::WHOLE).expect("a layout").kv_bytes_per_token(config.dtype) * 16;
        // 1,000 pages in all, of which weights and arena took 300, the graphs will take 100, and 200 stay free.
        let memory = MemoryInfo { free_bytes: 700 * page_bytes, total_bytes: 1000 * page_bytes };
        let shared = |num_sharing| Measured {
            memory,
            arena_bytes: 32 << 20,
            graph_bytes: 100 * page_bytes * num_sharing,
            kv_bytes_per_token: page_bytes / 16 * num_sharing,
        };
        let fitted_beside = |options: ModelRunnerOptions, num_sharing| {
            let mut options = ModelRunnerOptions { mem_fraction_static: Some(0.8), ..options };
            options.fit_kv_cache(shared(num_sharing)).map(|()| options.kv_cache_tokens)
        };
        let fitted = |options: ModelRunnerOptions| fitted_beside(options, 1);
        let tokens =
            fitted(ModelRunnerOptions { kv_cache_tokens: 1 << 20, ..ModelRunnerOptions::default() }).expect("fits");
        assert!((399 * 16..=400 * 16).contains(&tokens), "{tokens}");
        let many = ModelRunnerOptions { kv_cache_tokens: 1 << 20, ..ModelRunnerOptions::default() };
        let tokens = fitted_beside(many, 2).expect("fits");
        assert!((149 * 16..=150 * 16).contains(&tokens), "two ranks on one GPU have 300 pages together: {tokens}");
        let few = ModelRunnerOptions { kv_cache_tokens: 4096, ..ModelRunnerOptions::default() };
        assert_eq!(fitted(few).expect("fits"), 4096);
        let error =
            fitted(ModelRunnerOptions { context_length: 9000, ..ModelRunnerOptions::default() }).expect_err("too long");
        assert!(error.to_string().contains("context_length = 9000"), "{error}");
        assert!(error.to_string().contains("32 MiB of activations"), "{error}");
    }

    #[test]
    fn lazy_graphs_are_counted_up_to_their_budget_and_one_more() {
        let options = ModelRunnerOptions {
            cuda_graph_lazy_max_graphs: 10,
            cuda_graph_lazy_max_mib: 1,
            ..ModelRunnerOptions::default()
        };
        assert_eq!(options.lazy_graph_bytes(300, 100).expect("fits"), 400, "all of three sizes");
        assert_eq!(options.lazy_graph_bytes(5000, 50).expect("fits"), 550, "ten graphs");
        assert_eq!(options.lazy_graph_bytes(2 << 20, 200_000).expect("fits"), (1 << 20) + 200_000, "the bytes");
        let error = options.lazy_graph_bytes(2 << 20, 1_048_577).expect_err("not one graph fits").to_string();
        assert!(error.contains("cuda_graph_lazy_max_mib") && error.contains("1048577"), "{error}");
    }
}
