//! The largest model on eight ranks, without its numbers: what each rank keeps, and the capture of each size.

use std::sync::Arc;
use std::time::Duration;

use bcg_kernels::DecodePlan;
use bcg_runtime::{
    BreakableCudaGraph, CommunicatorOptions, Device, HostOptions, RankThreads, Result, Runner, RunnerOptions, World,
    WorldOptions,
};

use super::folder;
use crate::batch::{BatchLimits, ForwardBatch, InputBuffers, Phase, SequenceInput};
use crate::config::ModelConfig;
use crate::registry::{self, Model, StageOutput};
use crate::sampling::SamplingParams;
use crate::state::{Caches, KvCache, StateCache};
use crate::weights::{Shard, Weights};

const NUM_RANKS: usize = 8;
/// What an H200 has for programs.
const MEMORY_BYTES: usize = 139 << 30;
const PAGE_SIZE: usize = 16;
const PAGES: usize = 64;
const LIMITS: BatchLimits = BatchLimits { rows: 8192, sequences: 256, pages_per_sequence: 512 };

struct Rank {
    runner: Runner,
    model: Arc<dyn Model>,
    caches: Arc<Caches>,
    buffers: InputBuffers,
    weight_bytes: usize,
    kv_bytes: usize,
}

impl Rank {
    fn load(config: &ModelConfig, runner: Runner, shard: Shard) -> crate::Result<Self> {
        let device = runner.device().clone();
        let free = || device.memory_info().map(|info| info.free_bytes);
        let before = free()?;
        let model = registry::load(config, Weights::unfilled(&device, config.dtype, shard))?;
        let loaded = free()?;
        let layout = config.cache_layout(shard)?;
        let kv = KvCache::new(&device, config.dtype, &layout, [PAGES, PAGE_SIZE])?;
        let kv_bytes = loaded - free()?;
        let states = StateCache::new(&device, config.dtype, layout.states.as_ref(), 1)?;
        let plan = DecodePlan::new(&device, layout.q_heads, layout.k[0]);
        let buffers = InputBuffers::new(&device, LIMITS, PAGE_SIZE, plan)?;
        let caches = Arc::new(Caches { kv, states });
        Ok(Self { runner, model, caches, buffers, weight_bytes: before - loaded, kv_bytes })
    }

    /// Captures a forward, which runs nothing, and returns the numbers of its segments, breaks and merged executables.
    fn capture(&mut self, phase: Phase, size: usize) -> Result<[usize; 3]> {
        let sampling = SamplingParams::greedy();
        let (tokens, pages) =
            (vec![0; if phase == Phase::Decode { 1 } else { size }], vec![0; size.div_ceil(PAGE_SIZE)]);
        let batch = match phase {
            Phase::Decode => vec![SequenceInput::new(&tokens, 0, &pages, &sampling); size],
            Phase::Prefill => vec![SequenceInput::new(&tokens, 0, &pages, &sampling)],
        };
        let live = self.buffers.fill(&mut self.runner, &batch, phase, size, false)?;
        let inputs = self.buffers.token_inputs(phase, size)?;
        let (model, caches) = (Arc::clone(&self.model), Arc::clone(&self.caches));
        let mut graph = BreakableCudaGraph::<ForwardBatch, StageOutput>::new(format!("{} of {size}", phase.name()));
        graph.capture_ahead(&mut self.runner, &live, move |cx| model.forward(cx, &inputs, &caches))?;
        let made = graph.describe();
        Ok([made.segments.len(), made.breaks.len(), made.num_merged])
    }
}

/// The bytes of a rank's weights: what every rank keeps, keys and values by heads, all else divided; and of the rotary
/// frequencies, in f32.
fn weight_bytes(config: &ModelConfig) -> usize {
    let count = |field| config.fields.count(field).expect(field);
    let (hidden, head, layers) = (config.hidden_size, count("head_dim"), count("num_hidden_layers"));
    let (experts, inner) = (count("num_experts"), count("moe_intermediate_size"));
    let kept = layers * (2 * hidden + 2 * head + experts * hidden) + hidden;
    let keys_and_values = layers * 2 * count("num_key_value_heads") * head * hidden;
    let attention = 2 * count("num_attention_heads") * head * hidden;
    let divided = layers * (attention + experts * 3 * inner * hidden) + 2 * config.vocab_size * hidden;
    let shares = NUM_RANKS.min(count("num_key_value_heads"));
    (kept + keys_and_values / shares + divided / NUM_RANKS) * config.dtype.size_bytes() + head / 2 * size_of::<f32>()
}

#[test]
fn qwen3_235b_fits_eight_ranks_and_every_size_is_captured() {
    let config = ModelConfig::load(&folder("geometries/qwen3-235b-a22b")).expect("a configuration");
    let devices = (0..NUM_RANKS).map(|_| {
        let mut options = HostOptions::default();
        options.memory_bytes = MEMORY_BYTES;
        Device::host_with(options)
    });
    let mut options = WorldOptions::default();
    options.timeout = Duration::from_secs(120); // the ranks may have to share one busy core
    let world = World::new(devices.collect(), options).expect("a world");
    let communicators = world.communicators(CommunicatorOptions::default()).expect("communicators");
    let load = |(rank, communicator)| {
        let mut options = RunnerOptions::default();
        options.arena_bytes = 16 << 30; // nothing runs that would make it grow
        let runner = Runner::in_world(communicator, options).expect("a runner");
        Rank::load(&config, runner, Shard::new(rank, NUM_RANKS)).expect("a rank")
    };
    let ranks: Vec<Rank> = communicators.into_iter().enumerate().map(load).collect();
    let expected = weight_bytes(&config);
    assert!((58_000_000_000..60_000_000_000).contains(&expected), "an eighth of 470 GB, and what all keep: {expected}");
    for rank in &ranks {
        assert_eq!(rank.weight_bytes, expected);
        let token = 94 * 2 * 128 * config.dtype.size_bytes(); // one head of keys and values in each layer
        assert_eq!(rank.kv_bytes, PAGES * PAGE_SIZE * token);
    }
    let mut ranks = RankThreads::start(&world, ranks).expect("threads");
    for (phase, sizes, breaks) in [(Phase::Prefill, [16, 256, 1024, 8192], 94), (Phase::Decode, [1, 16, 64, 256], 0)] {
        for size in sizes {
            let made = ranks.run(move |rank: &mut Rank| rank.capture(phase, size)).expect("captured on all ranks");
            assert_eq!(made, [[breaks + 1, breaks, 1]; NUM_RANKS], "{} of {size}", phase.name());
        }
    }
}
