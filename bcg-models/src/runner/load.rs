//! From a checkpoint to ranks that have run every kernel once.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use bcg_kernels::DecodePlan;
use bcg_runtime::{
    Communicator, CommunicatorOptions, DType, Device, GraphCache, RankThreads, Runner, RunnerOptions, SpanOptions,
    World, WorldOptions,
};

use super::choose::Readbacks;
use super::links::Links;
use super::rank::Rank;
use super::stages::Stages;
use super::{LoadFormat, ModelRunner, ModelRunnerOptions, OptionError, Progress, Role, Stage, memory, nodes};
use crate::batch::{InputBuffers, Phase};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::registry;
use crate::tokenizer::Tokenizer;
use crate::weights::{Shard, Weights, divide_layers};

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
        Self::load_as(Placement::new(std::slice::from_ref(device)), dir, options, role, progress)
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
        Self::load_as(Placement { span, ..Placement::new(devices) }, dir, options, Role::Alone, progress)
    }

    /// As [`load_ranks`](Self::load_ranks), with the layers divided among so many stages, each of which has equally many of
    /// the devices, in order: [`divide_layers`] says how, by the bytes of the weights.
    ///
    /// # Errors
    /// As [`load_ranks`](Self::load_ranks); [`Error::Option`] names `pp` if there are fewer layers than stages, or if the
    /// devices are not equally many for each stage.
    pub fn load_pipeline(
        devices: &[Device],
        num_stages: usize,
        dir: &Path,
        options: ModelRunnerOptions,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self> {
        Self::load_as(Placement { num_stages, ..Placement::new(devices) }, dir, options, Role::Alone, progress)
    }

    fn load_as(
        placement: Placement<'_>,
        dir: &Path,
        options: ModelRunnerOptions,
        role: Role,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self> {
        let config = ModelConfig::load(dir)?;
        options.validate(&config)?;
        registry::check_shard(&config, placement.num_ranks()?, options.experts)?;
        let layers = stage_layers(&config, placement.num_stages)?;
        let tokenizer = if options.skip_tokenizer_init { None } else { Some(Tokenizer::load(dir)?) };
        if let Some(tokenizer) = &tokenizer {
            tokenizer.check_vocabulary(dir, config.vocab_size)?;
        }
        let worlds = placement.worlds(dir, &options)?;
        let loaded = Self::load_in((&worlds, &layers), dir, (config, tokenizer), (options, role), progress);
        loaded.inspect_err(|error| {
            for world in worlds.iter().filter(|world| world.num_nodes() > 1) {
                world.lose(world.first_rank(), &bcg_runtime::Error::other(format!("loading failed: {error}")));
            }
        })
    }

    fn load_in(
        (worlds, layers): (&[World], &[Option<Range<usize>>]),
        dir: &Path,
        (config, tokenizer): (ModelConfig, Option<Tokenizer>),
        (options, role): (ModelRunnerOptions, Role),
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self> {
        // Where the device's memory bounds it, the KV cache gets its size when all else has been measured.
        let is_fitted = options.mem_fraction_static.is_some();
        let last = &worlds[worlds.len() - 1];
        let readbacks = Readbacks::new(last.device(0), options.limits()?.sequences, [worlds.len(), last.size()])?;
        let loading =
            Loading { worlds, layers, dir, config: &config, options: &options, role: &role, readbacks: &readbacks };
        let ranks = loading.all(progress)?;
        worlds.iter().try_for_each(nodes::loaded)?;
        if !is_fitted {
            progress(Progress { stage: Stage::KvCache, done: 1, total: 1 });
        }
        let pages = memory::page_pool(ranks.iter().flatten().map(|rank| &*rank.caches), &options);
        let stages = worlds.iter().zip(ranks).map(|(world, ranks)| RankThreads::start(world, ranks));
        let stages = Stages::new(stages.collect::<bcg_runtime::Result<_>>()?)?;
        let mut runner = Self { stages, pages, readbacks, tokenizer, config, options, role };
        progress(Progress { stage: Stage::WarmUp, done: 0, total: 1 });
        runner.warm_up().map_err(|error| runner.options.without_room(error))?;
        progress(Progress { stage: Stage::WarmUp, done: 1, total: 1 });
        runner.tune(progress)?;
        if is_fitted {
            runner.fit_kv_cache(progress)?;
        }
        if runner.num_ranks() > 1 {
            worlds.iter().for_each(World::seal);
        }
        Ok(runner)
    }

    /// Times the algorithms of the products on rank 0 of each stage, whose choice all other ranks take: what they compute
    /// alike must have the same bits. A stage takes what those before it chose, so that the layers of all stages are
    /// computed alike.
    fn tune(&mut self, progress: &mut dyn FnMut(Progress)) -> Result<()> {
        let sizes = self.options.tuned_sizes()?;
        let mut report = |done, total| progress(Progress { stage: Stage::Tune, done, total });
        if self.num_stages() == 1 {
            if self.world().node() == 0 {
                self.device().tune_matmuls(&sizes, &mut report)?;
            }
            return self.take_matmuls_of_first();
        }
        let mut choices: Vec<Vec<u8>> = Vec::new();
        for leader in self.stages.leaders() {
            if let Some(before) = choices.last() {
                leader.device().take_matmul_choices(before)?;
            }
            leader.device().tune_matmuls(&sizes, &mut report)?;
            choices.push(leader.device().matmul_choices());
        }
        self.stages.on_each(move |rank| match rank.runtime.rank() {
            0 => Ok(()),
            _ => rank.device().take_matmul_choices(&choices[rank.stage]),
        })?;
        Ok(())
    }
}

/// Where a model is put.
struct Placement<'a> {
    /// Those of this process.
    devices: &'a [Device],
    num_stages: usize,
    /// The other processes, of a model of one stage.
    span: Option<SpanOptions>,
}

impl<'a> Placement<'a> {
    fn new(devices: &'a [Device]) -> Self {
        Self { devices, num_stages: 1, span: None }
    }

    /// How many ranks each stage has, in all processes.
    fn num_ranks(&self) -> Result<usize> {
        let (devices, num_stages) = (self.devices.len(), self.num_stages);
        if num_stages != 1 && (num_stages == 0 || devices == 0 || !devices.is_multiple_of(num_stages)) {
            let problem = format!("{num_stages} stages cannot have equally many of {devices} devices");
            return Err(OptionError::new("pp", problem, "give as many devices as stages times ranks").into());
        }
        let num_nodes = self.span.as_ref().map_or(1, |span| span.num_nodes);
        Ok((num_nodes * (devices / num_stages)).max(1))
    }

    /// Makes the world of each stage.
    fn worlds(self, dir: &Path, options: &ModelRunnerOptions) -> Result<Vec<World>> {
        let mut world_options = WorldOptions::default();
        world_options.timeout = RANK_TIMEOUT;
        match self.span {
            None => {
                let devices = (0..self.num_stages).map(|stage| {
                    let num_ranks = self.devices.len() / self.num_stages;
                    self.devices[stage * num_ranks..(stage + 1) * num_ranks].to_vec()
                });
                let worlds = devices.map(|devices| World::new(devices, world_options.clone()));
                Ok(worlds.collect::<bcg_runtime::Result<_>>()?)
            }
            Some(mut span) => {
                nodes::must_be_same(&mut span, dir, options)?;
                Ok(vec![World::spanning(self.devices.to_vec(), world_options, &span)?])
            }
        }
    }
}

/// The layers of each stage; `None` for all layers, of the only stage.
fn stage_layers(config: &ModelConfig, num_stages: usize) -> Result<Vec<Option<Range<usize>>>> {
    if num_stages == 1 {
        return Ok(vec![None]);
    }
    let layer_bytes = registry::layer_bytes(config)?;
    let Some(layers) = divide_layers(&layer_bytes, num_stages) else {
        let problem = format!("the model has {} layers for {num_stages} stages", layer_bytes.len());
        return Err(OptionError::new("pp", problem, "give at most as many stages as layers").into());
    };
    tracing::debug!(?layers, "the layers of each stage");
    Ok(layers.into_iter().map(Some).collect())
}

/// What all ranks are loaded from.
struct Loading<'a> {
    /// The world of each stage.
    worlds: &'a [World],
    /// The layers of each stage, as [`stage_layers`] has them.
    layers: &'a [Option<Range<usize>>],
    dir: &'a Path,
    config: &'a ModelConfig,
    options: &'a ModelRunnerOptions,
    role: &'a Role,
    readbacks: &'a Readbacks,
}

/// A rank that is to be loaded.
struct Place {
    stage: usize,
    shard: Shard,
    /// If there are other ranks in the stage.
    communicator: Option<Communicator>,
    links: Links,
}

impl Loading<'_> {
    /// Loads every rank, several at once, and returns those of each stage.
    fn all(&self, progress: &mut dyn FnMut(Progress)) -> Result<Vec<Vec<Rank>>> {
        let mut report = |done, total| progress(Progress { stage: Stage::LoadWeights, done, total });
        let num_ranks = self.worlds[0].num_local();
        let places = self.places()?;
        let num_places = places.len();
        let mut loaded = if num_places == 1 {
            places.into_iter().map(|place| self.one(place, &mut report)).collect::<Result<Vec<_>>>()?
        } else {
            self.at_once(places, &mut report)?
        };
        let stages = (0..num_places / num_ranks).map(|_| loaded.drain(..num_ranks).collect());
        Ok(stages.collect())
    }

    /// Loads several ranks at once.
    fn at_once(&self, places: Vec<Place>, report: &mut dyn FnMut(usize, usize)) -> Result<Vec<Rank>> {
        let (sender, reports) = sync_channel(REPORTS_MAX);
        let num_places = places.len();
        std::thread::scope(|scope| {
            let load = |(at, place): (usize, Place)| {
                let sender = sender.clone();
                let mut report = move |done, total| {
                    let _ = sender.send((at, done, total)); // the receiver outlives the threads
                };
                scope.spawn(move || self.one(place, &mut report))
            };
            let threads: Vec<_> = places.into_iter().enumerate().map(load).collect();
            drop(sender);
            // How much there is in all is known once every rank has said what it has.
            let mut known: Vec<Option<(usize, usize)>> = vec![None; num_places];
            for (at, done, total) in reports {
                known[at] = Some((done, total));
                let sums = known.iter().try_fold((0, 0), |sums, known| known.map(|of| (sums.0 + of.0, sums.1 + of.1)));
                if let Some((done, total)) = sums {
                    report(done, total);
                }
            }
            let panicked = |at| Err(bcg_runtime::Error::other(format!("loading rank {at} panicked")).into());
            let joined = threads.into_iter().enumerate();
            joined.map(|(at, thread)| thread.join().unwrap_or_else(|_| panicked(at))).collect()
        })
    }

    /// What each rank is to be, in the order of the devices.
    fn places(&self) -> Result<Vec<Place>> {
        let (num_ranks, limits) = (self.worlds[0].size(), self.options.limits()?);
        let shape = [limits.rows, self.config.hidden_size];
        // The links of each rank of this process, stage after stage.
        let mut links = (0..self.worlds[0].num_local())
            .map(|rank| {
                let devices: Vec<Device> = self.worlds.iter().map(|world| world.device(rank).clone()).collect();
                Ok(Links::for_rank(&devices, shape, self.config.dtype, limits.sequences)?.into_iter())
            })
            .collect::<Result<Vec<_>>>()?;
        let mut places = Vec::new();
        for (stage, world) in self.worlds.iter().enumerate() {
            let mut communicators = match num_ranks {
                1 => Vec::new(),
                _ => world.communicators(self.communicators(num_ranks)?)?,
            }
            .into_iter();
            for (rank, links) in (world.first_rank()..).zip(&mut links) {
                places.push(Place {
                    stage,
                    shard: Shard { experts: self.options.experts, ..Shard::new(rank, num_ranks) },
                    communicator: communicators.next(),
                    links: links.next().unwrap_or_default(),
                });
            }
        }
        Ok(places)
    }

    /// Loads one rank.
    fn one(&self, place: Place, progress: &mut dyn FnMut(usize, usize)) -> Result<Rank> {
        let Self { worlds, layers, dir, config, options, role, readbacks } = *self;
        let Place { stage, shard, communicator, links } = place;
        let device = worlds[stage].device(shard.rank - worlds[stage].first_rank());
        let weights = match options.load_format {
            LoadFormat::Auto => Weights::open(dir, device, config.dtype, shard)?,
            LoadFormat::Dummy => Weights::random(device, config.dtype, shard)?,
        };
        let mut weight_bytes = 0;
        let mut report = |done, total| {
            weight_bytes = total;
            progress(done, total);
        };
        let weights = weights.with_layers(layers[stage].clone()).with_progress(&mut report);
        let model = registry::load(config, weights)?;
        let num_pages = if options.mem_fraction_static.is_some() { 1 } else { options.num_pages() };
        let layout = config.cache_layout(shard)?.with_layers(model.num_cached_layers());
        let caches = Arc::new(memory::caches(device, config, options, (role, &layout), num_pages)?);
        // One plan for all ranks: that of the first device.
        let decode_plan = DecodePlan::new(worlds[0].device(0), layout.q_heads, layout.k[0]);
        let inputs = InputBuffers::new(device, options.limits()?, options.page_size, decode_plan)?;
        let mut inputs = role.inputs(inputs, device)?;
        if worlds.len() > 1 {
            let chosen = match &links.tokens {
                Some(tokens) if stage == 0 => tokens.chosen.clone(),
                _ => device.zeros(&[worlds.len() * options.limits()?.sequences], DType::I32)?,
            };
            inputs = inputs.in_pipeline(device, chosen)?;
        }
        let mut runtime_options = RunnerOptions::default();
        runtime_options.name = "model".to_owned();
        runtime_options.poison = options.poison_graph_memory;
        let graphs = |phase: Phase| {
            let mut kept = options.graph_cache(phase)?;
            kept.ladder = kept.ladder.filter(|_| role.has(phase));
            Ok::<_, Error>(GraphCache::new(phase.name(), kept))
        };
        let is_read = shard.rank == 0 && links.after.is_none();
        Ok(Rank {
            prefill_graphs: graphs(Phase::Prefill)?,
            decode_graphs: graphs(Phase::Decode)?,
            inputs,
            stage,
            links,
            layout,
            caches,
            model,
            weight_bytes,
            readbacks: is_read.then(|| readbacks.clone()),
            runtime: match communicator {
                None => Runner::new(device, runtime_options)?,
                Some(communicator) => Runner::in_world(communicator, runtime_options)?,
            },
        })
    }

    /// Planes with room for the largest message of a step, twice, from every rank: the hidden states of its rows, or the
    /// logits that are gathered from all ranks.
    fn communicators(&self, size: usize) -> Result<CommunicatorOptions> {
        let config = self.config;
        let hidden = self.options.chunked_prefill_size * config.hidden_size * config.dtype.size_bytes();
        let logits = self.options.limits()?.sequences * config.vocab_size.div_ceil(size) * size_of::<f32>();
        let bytes = hidden.max(logits).saturating_mul(2 * size);
        let mut options = CommunicatorOptions::default();
        options.plane_bytes = bytes.clamp(PLANE_BYTES_MIN, PLANE_BYTES_MAX);
        Ok(options)
    }
}
