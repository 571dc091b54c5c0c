//! Who gets which part of the device's memory: all that is not the KV cache is measured first, and the cache gets the
//! rest.
//!
//! With [`ModelRunnerOptions::mem_fraction_static`](super::ModelRunnerOptions::mem_fraction_static) a model is loaded in this
//! order: weights → states, and a KV cache of one page → the largest step that there can be, which gives the arena its
//! size and loads the kernels → a few graphs, captured and dropped, which tell what one takes → the KV cache with what
//! is left of the fraction.

use std::sync::Arc;

use bcg_runtime::{Device, GraphCache};

use super::options::{GraphMode, ModelRunnerOptions, OptionError};
use super::{DUMMY_SEQUENCE_TOKENS, ModelRunner, Progress, Stage};
use crate::batch::Phase;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::state::{Caches, KvCache, PagePool, StateCache};
use crate::weights::Shard;

/// What is taken beside weights and KV cache, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Measured {
    /// What the arena takes, for the activations of the largest step. It is mapped already, so it counts as used.
    pub(super) arena_bytes: usize,
    /// What all graphs will take. None of them is captured yet.
    pub(super) graph_bytes: usize,
}

/// Makes a KV cache of some pages, and states for as many sequences as can run.
pub(super) fn caches(
    device: &Device,
    config: &ModelConfig,
    options: &ModelRunnerOptions,
    num_pages: usize,
) -> Result<Caches> {
    let layout = config.cache_layout(Shard::WHOLE)?;
    let kv = KvCache::new(device, config.dtype, &layout, [num_pages, options.page_size])?;
    let slots = 2 * options.max_running_requests;
    let states = StateCache::new(device, config.dtype, layout.states.as_ref(), slots).map_err(|error| match error {
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

/// Makes the pool of a cache's pages and states.
pub(super) fn page_pool(caches: &Caches, options: &ModelRunnerOptions) -> PagePool {
    let num_states = if caches.states.layers().is_empty() { 0 } else { options.max_running_requests };
    PagePool::with_states(caches.kv.num_pages(), options.page_size, num_states)
}

impl ModelRunner {
    /// Replaces the KV cache by one that takes what is left of the device's memory.
    ///
    /// # Errors
    /// [`Error::Option`] names the option that leaves too little; the device's.
    pub(super) fn fit_kv_cache(&mut self, progress: &mut dyn FnMut(Progress)) -> Result<()> {
        progress(Progress { stage: Stage::KvCache, done: 0, total: 1 });
        let measured =
            Measured { graph_bytes: self.measure_graphs()?, arena_bytes: self.runtime.arena_stats().mapped_bytes };
        self.runtime.synchronize()?; // graphs that still ran are gone then
        let device = self.device().clone();
        self.options.fit_kv_cache(&self.config, device.memory_info()?, measured)?;
        let num_pages = self.options.num_pages();
        let layout = self.config.cache_layout(Shard::WHOLE)?;
        let kv = KvCache::new(&device, self.config.dtype, &layout, [num_pages, self.options.page_size])?;
        self.caches = Arc::new(Caches { kv, states: self.caches.states.clone() });
        self.pages = page_pool(&self.caches, &self.options);
        tracing::debug!(?measured, num_pages, "the KV cache has what is left");
        progress(Progress { stage: Stage::KvCache, done: 1, total: 1 });
        Ok(())
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
    /// batches add.
    fn measure_graph(&mut self, phase: Phase, size: usize) -> Result<usize> {
        let unbounded = {
            let mut changed = self.options.graph_cache(phase)?;
            changed.graphs_max = usize::MAX;
            changed.bytes_max = usize::MAX;
            changed
        };
        let cache = GraphCache::new(phase.name(), unbounded);
        let kept = std::mem::replace(self.graphs_and_runtime(phase).0, cache);
        let captured = self.capture_size(phase, size).and_then(|()| self.replay_all_kinds(phase, size));
        let measured = std::mem::replace(self.graphs_and_runtime(phase).0, kept);
        captured.map_err(|error| self.options.without_room(error))?;
        Ok(measured.graph_bytes())
    }

    /// Replays a graph of prefills with a mixed batch, and both kinds of batches with a padded row if the ladder has such
    /// batches. The breaks of each do other work than those of the capture, which makes an executable of its own.
    fn replay_all_kinds(&mut self, phase: Phase, size: usize) -> Result<()> {
        if phase == Phase::Decode {
            return Ok(());
        }
        let is_padded =
            |rows: usize| self.graphs(phase).ladder().and_then(|ladder| ladder.size_for(rows)) == Some(size);
        let fewer = (size >= 2 && is_padded(size - 1)).then(|| size - 1);
        for (rows, decodes) in [size].into_iter().chain(fewer).flat_map(|rows| [(rows, 0), (rows, 1)]) {
            if (rows, decodes) == (size, 0) || (decodes > 0 && !self.can_mix(rows)?) {
                continue;
            }
            self.with_dummy((rows, decodes), DUMMY_SEQUENCE_TOKENS, |runner, dummy| {
                let live = runner.inputs.fill(&mut runner.runtime, dummy, phase, size, false)?;
                let (graphs, runtime) = runner.graphs_and_runtime(phase);
                graphs.replay(size, runtime, &live).map(drop)
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
    pub(super) fn fit_kv_cache(
        &mut self,
        config: &ModelConfig,
        memory: bcg_runtime::MemoryInfo,
        measured: Measured,
    ) -> Result<()> {
        let Some(fraction) = self.mem_fraction_static else { return Ok(()) };
        let Measured { arena_bytes, graph_bytes } = measured;
        let kept_free = (memory.total_bytes as f64 * (1.0 - fraction)).ceil() as usize;
        let page_bytes = config.cache_layout(Shard::WHOLE)?.kv_bytes_per_token(config.dtype) * self.page_size;
        let fits =
            memory.free_bytes.saturating_sub(kept_free.saturating_add(graph_bytes)) / page_bytes * self.page_size;
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
    use bcg_runtime::MemoryInfo;

    use super::*;

    #[test]
    fn the_kv_cache_gets_what_the_others_leave() {
        let config = ModelConfig::load(&crate::testing::tiny_qwen3()).expect("config");
        let page_bytes = config.cache_layout(Shard::WHOLE).expect("a layout").kv_bytes_per_token(config.dtype) * 16;
        // 1,000 pages in all, of which weights and arena took 300, the graphs will take 100, and 200 stay free.
        let memory = MemoryInfo { free_bytes: 700 * page_bytes, total_bytes: 1000 * page_bytes };
        let measured = Measured { arena_bytes: 32 << 20, graph_bytes: 100 * page_bytes };
        let fitted = |options: ModelRunnerOptions| {
            let mut options = ModelRunnerOptions { mem_fraction_static: Some(0.8), ..options };
            options.fit_kv_cache(&config, memory, measured).map(|()| options.kv_cache_tokens)
        };
        let tokens =
            fitted(ModelRunnerOptions { kv_cache_tokens: 1 << 20, ..ModelRunnerOptions::default() }).expect("fits");
        assert!((399 * 16..=400 * 16).contains(&tokens), "{tokens}");
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
