//! From a checkpoint to ranks that have run every kernel once.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use bcg_kernels::DecodePlan;
use bcg_runtime::{
    Communicator, CommunicatorOptions, Device, GraphCache, RankThreads, Runner, RunnerOptions, SpanOptions, World,
    WorldOptions,
};

use super::choose::Readbacks;
use super::rank::Rank;
use super::{LoadFormat, ModelRunner, ModelRunnerOptions, Progress, Role, Stage, memory, nodes};
use crate::batch::{InputBuffers, Phase};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::registry;
use crate::tokenizer::Tokenizer;
use crate::weights::{Shard, Weights};

/// The bytes of a rank's plane, at most: larger messages go in parts.
const PLANE_BYTES_MAX: usize = 256 << 20;
/// And at least.
const PLANE_BYTES_MIN: usize = 1 << 20;

/// How long ranks wait for one another: longer than one may be behind that compiles kernels which the others have.
const RANK_TIMEOUT: Duration = Duration::from_secs(30);

/// Reports of the ranks' loading that wait to be passed on, at most.
const REPORTS_MAX: usize = 64;

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
        Self::load_ranks(std::slice::from_ref(device), dir, options, progress)
    }

    /// As [`load`](Self::load), for a [`Role`] of a pair: the decode role comes first, then, on the device that it named, the
    /// prefill role.
    ///
    /// # Errors
    /// As [`load`](Self::load); those of [`Device::empty_shared`]; [`bcg_runtime::Error::Shape`] if the pair's caches are not
    /// of one layout.
    pub fn load_role(
        device: &Device,
        dir: &Path,
        options: ModelRunnerOptions,
        role: Role,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self> {
        Self::load_as((std::slice::from_ref(device), None), dir, options, role, progress)
    }

    /// As [`load`](Self::load), with the model divided among a rank on each device, in order. Several ranks may share a GPU
    /// if each has opened it for itself. Every rank has the same pages, as many as the one with the least memory can have.
    ///
    /// # Errors
    /// As [`load`](Self::load); those of [`World::new`] and [`World::communicators`]; [`Error::Config`] if the model cannot
    /// be divided among so many ranks.
    pub fn load_ranks(
        devices: &[Device],
        dir: &Path,
        options: ModelRunnerOptions,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self> {
        Self::load_nodes(devices, None, dir, options, progress)
    }

    /// As [`load_ranks`](Self::load_ranks), with ranks in other processes too, which call this alike; `devices` are those of
    /// this one. Node 0 runs the steps, and the others [`follow`](Self::follow) it.
    ///
    /// # Errors
    /// As [`load_ranks`](Self::load_ranks); those of [`World::spanning`]. What fails on one node fails on all.
    pub fn load_nodes(
        devices: &[Device],
        span: Option<SpanOptions>,
        dir: &Path,
        options: ModelRunnerOptions,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self> {
        Self::load_as((devices, span), dir, options, Role::Alone, progress)
    }

    fn load_as(
        (devices, span): (&[Device], Option<SpanOptions>),
        dir: &Path,
        options: ModelRunnerOptions,
        role: Role,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self> {
        let config = ModelConfig::load(dir)?;
        options.validate(&config)?;
        let num_nodes = span.as_ref().map_or(1, |span| span.num_nodes);
        registry::check_shard(&config, (num_nodes * devices.len()).max(1), options.experts)?;
        let tokenizer = if options.skip_tokenizer_init { None } else { Some(Tokenizer::load(dir)?) };
        if let Some(tokenizer) = &tokenizer {
            tokenizer.check_vocabulary(dir, config.vocab_size)?;
        }
        let mut world_options = WorldOptions::default();
        world_options.timeout = RANK_TIMEOUT;
        let world = match span {
            None => World::new(devices.to_vec(), world_options)?,
            Some(mut span) => {
                nodes::must_be_same(&mut span, dir, &options)?;
                World::spanning(devices.to_vec(), world_options, &span)?
            }
        };
        let loaded = Self::load_in(&world, dir, (config, tokenizer), (options, role), progress);
        loaded.inspect_err(|error| {
            if world.num_nodes() > 1 {
                world.lose(world.first_rank(), &bcg_runtime::Error::other(format!("loading failed: {error}")));
            }
        })
    }

    fn load_in(
        world: &World,
        dir: &Path,
        (config, tokenizer): (ModelConfig, Option<Tokenizer>),
        (options, role): (ModelRunnerOptions, Role),
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self> {
        // Where the device's memory bounds it, the KV cache gets its size when all else has been measured.
        let is_fitted = options.mem_fraction_static.is_some();
        let readbacks = Readbacks::new(world.device(0), options.limits()?.sequences, world.size())?;
        let loading = Loading { world, dir, config: &config, options: &options, role: &role, readbacks: &readbacks };
        let ranks = loading.all(progress)?;
        nodes::loaded(world)?;
        if !is_fitted {
            progress(Progress { stage: Stage::KvCache, done: 1, total: 1 });
        }
        let pages = memory::page_pool(&ranks[0].caches, &options);
        let ranks = RankThreads::start(world, ranks)?;
        let mut runner = Self { ranks, pages, readbacks, tokenizer, config, options, role, num_chosen: 0 };
        progress(Progress { stage: Stage::WarmUp, done: 0, total: 1 });
        runner.warm_up().map_err(|error| runner.options.without_room(error))?;
        progress(Progress { stage: Stage::WarmUp, done: 1, total: 1 });
        runner.tune(progress)?;
        if is_fitted {
            runner.fit_kv_cache(progress)?;
        }
        if runner.num_ranks() > 1 {
            world.seal();
        }
        Ok(runner)
    }

    /// Times the algorithms of the products on rank 0, whose choice all other ranks take: what they compute alike must have
    /// the same bits.
    fn tune(&mut self, progress: &mut dyn FnMut(Progress)) -> Result<()> {
        let sizes = self.options.tuned_sizes()?;
        let mut report = |done, total| progress(Progress { stage: Stage::Tune, done, total });
        if self.world().node() == 0 {
            self.device().tune_matmuls(&sizes, &mut report)?;
        }
        self.take_matmuls_of_first()
    }
}

/// What all ranks are loaded from.
struct Loading<'a> {
    world: &'a World,
    dir: &'a Path,
    config: &'a ModelConfig,
    options: &'a ModelRunnerOptions,
    role: &'a Role,
    readbacks: &'a Readbacks,
}

impl Loading<'_> {
    /// Loads every rank, several at once.
    fn all(&self, progress: &mut dyn FnMut(Progress)) -> Result<Vec<Rank>> {
        let mut report = |done, total| progress(Progress { stage: Stage::LoadWeights, done, total });
        let (size, first) = (self.world.size(), self.world.first_rank());
        if size == 1 {
            return Ok(vec![self.one(self.shard(0), None, &mut report)?]);
        }
        let communicators = self.world.communicators(self.communicators()?)?;
        let (sender, reports) = sync_channel(REPORTS_MAX);
        std::thread::scope(|scope| {
            let load = |communicator: Communicator| {
                let (sender, shard) = (sender.clone(), self.shard(communicator.rank()));
                let mut report = move |done, total| {
                    let _ = sender.send((shard.rank, done, total)); // the receiver outlives the threads
                };
                scope.spawn(move || self.one(shard, Some(communicator), &mut report))
            };
            let threads: Vec<_> = communicators.into_iter().map(load).collect();
            drop(sender);
            // How much there is in all is known once every rank has said what it has.
            let mut known: Vec<Option<(usize, usize)>> = vec![None; self.world.num_local()];
            for (rank, done, total) in reports {
                known[rank - first] = Some((done, total));
                let sums = known.iter().try_fold((0, 0), |sums, known| known.map(|of| (sums.0 + of.0, sums.1 + of.1)));
                if let Some((done, total)) = sums {
                    report(done, total);
                }
            }
            let panicked = |rank| Err(bcg_runtime::Error::other(format!("loading rank {rank} panicked")).into());
            let joined = (first..).zip(threads);
            joined.map(|(rank, thread)| thread.join().unwrap_or_else(|_| panicked(rank))).collect()
        })
    }

    /// What a rank keeps of the model.
    fn shard(&self, rank: usize) -> Shard {
        Shard { experts: self.options.experts, ..Shard::new(rank, self.world.size()) }
    }

    /// Loads one rank, which has a communicator if there are others.
    fn one(
        &self,
        shard: Shard,
        communicator: Option<Communicator>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Rank> {
        let Self { world, dir, config, options, role, readbacks } = *self;
        let device = world.device(shard.rank - world.first_rank());
        let weights = match options.load_format {
            LoadFormat::Auto => Weights::open(dir, device, config.dtype, shard)?,
            LoadFormat::Dummy => Weights::random(device, config.dtype, shard)?,
        };
        let mut weight_bytes = 0;
        let mut report = |done, total| {
            weight_bytes = total;
            progress(done, total);
        };
        let model = registry::load(config, weights.with_progress(&mut report))?;
        let num_pages = if options.mem_fraction_static.is_some() { 1 } else { options.num_pages() };
        let layout = config.cache_layout(shard)?;
        let caches = Arc::new(memory::caches(device, config, options, (role, &layout), num_pages)?);
        // One plan for all ranks: that of the first device.
        let decode_plan = DecodePlan::new(world.device(0), layout.q_heads, layout.k[0]);
        let inputs = InputBuffers::new(device, options.limits()?, options.page_size, decode_plan)?;
        let inputs = role.inputs(inputs, device)?;
        let mut runtime_options = RunnerOptions::default();
        runtime_options.name = "model".to_owned();
        runtime_options.poison = options.poison_graph_memory;
        let graphs = |phase: Phase| {
            let mut kept = options.graph_cache(phase)?;
            kept.ladder = kept.ladder.filter(|_| role.has(phase));
            Ok::<_, Error>(GraphCache::new(phase.name(), kept))
        };
        Ok(Rank {
            prefill_graphs: graphs(Phase::Prefill)?,
            decode_graphs: graphs(Phase::Decode)?,
            inputs,
            caches,
            model,
            weight_bytes,
            readbacks: (shard.rank == 0).then(|| readbacks.clone()),
            runtime: match communicator {
                None => Runner::new(device, runtime_options)?,
                Some(communicator) => Runner::in_world(communicator, runtime_options)?,
            },
        })
    }

    /// Planes with room for the largest message of a step, twice, from every rank: the hidden states of its rows, or the
    /// logits that are gathered from all ranks.
    fn communicators(&self) -> Result<CommunicatorOptions> {
        let (config, size) = (self.config, self.world.size());
        let hidden = self.options.chunked_prefill_size * config.hidden_size * config.dtype.size_bytes();
        let logits = self.options.limits()?.sequences * config.vocab_size.div_ceil(size) * size_of::<f32>();
        let bytes = hidden.max(logits).saturating_mul(2 * size);
        let mut options = CommunicatorOptions::default();
        options.plane_bytes = bytes.clamp(PLANE_BYTES_MIN, PLANE_BYTES_MAX);
        Ok(options)
    }
}
