//! Several ranks compute what one computes, and each keeps its share.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bcg_kernels::DecodePlan;
use bcg_runtime::{
    CommunicatorOptions, DType, Device, RankThreads, Result, Runner, RunnerOptions, Tensor, World, WorldOptions,
};
use safetensors::SafeTensors;
use safetensors::tensor::{TensorInfo, TensorView};
use serde_json::{Value, json};

use super::{PAGE_SIZE, PAGES, ROWS, SEQUENCES, TINY, folder};
use crate::batch::{BatchLimits, InputBuffers, Phase, SequenceInput, TokenInputs};
use crate::config::ModelConfig;
use crate::registry::{self, Model};
use crate::sampling::SamplingParams;
use crate::state::{CacheLayout, Caches, KvCache, PageLease, PagePool, StateCache, StateLayout};
use crate::testing::TempDir;
use crate::weights::{Experts, MoeA2a, Shard, Weights};

/// One rank of a tiny checkpoint on the host device, with two sequences.
struct Rank {
    runner: Runner,
    model: Arc<dyn Model>,
    caches: Caches,
    buffers: InputBuffers,
    leases: Vec<PageLease>,
    /// The bytes of the weights.
    weight_bytes: usize,
}

/// The hidden states and the logits of one step, by row.
#[derive(Debug, Clone, PartialEq)]
struct Step {
    hidden: Vec<f32>,
    logits: Vec<f32>,
}

impl Rank {
    fn load(dir: &Path, dtype: DType, runner: Runner, shard: Shard) -> Self {
        let (device, mut weight_bytes) = (runner.device().clone(), 0);
        let config = ModelConfig { dtype, ..ModelConfig::load(dir).expect("a configuration") };
        let mut count = |_, total| weight_bytes = total;
        let weights = Weights::open(dir, &device, config.dtype, shard).expect("weights");
        let model = registry::load(&config, weights.with_progress(&mut count)).expect("a model");
        let layout = config.cache_layout(shard).expect("a layout");
        let kv = KvCache::new(&device, config.dtype, &layout, [2 * PAGES, PAGE_SIZE]).expect("a cache");
        let states = StateCache::new(&device, config.dtype, layout.states.as_ref(), 4).expect("states");
        let plan = DecodePlan::new(&device, layout.q_heads, layout.k[0]);
        let limits = BatchLimits { rows: ROWS, sequences: SEQUENCES, pages_per_sequence: PAGES };
        let buffers = InputBuffers::new(&device, limits, PAGE_SIZE, plan).expect("buffers");
        let pool = PagePool::with_states(2 * PAGES, PAGE_SIZE, 2);
        let leases = (0..2).map(|_| pool.lease(PAGES).expect("pages")).collect();
        Self { runner, model, caches: Caches { kv, states }, buffers, leases, weight_bytes }
    }

    /// Runs the next tokens of both sequences. Of a step that wants all rows, those of all tokens come back.
    fn step(&mut self, past: [usize; 2], new: [usize; 2], wants_all: bool) -> Result<Step> {
        let token = |sequence: usize, at: usize| (37 * at as u32 + 111 * sequence as u32 + 3) % 512;
        let tokens = [0, 1].map(|i| (past[i]..past[i] + new[i]).map(|at| token(i, at)).collect::<Vec<_>>());
        let sampling = SamplingParams::greedy();
        let batch: Vec<_> = std::iter::zip(&tokens, &self.leases)
            .zip(past)
            .map(|((tokens, lease), past)| SequenceInput {
                state: lease.state(),
                ..SequenceInput::new(tokens, past, lease.pages(), &sampling)
            })
            .collect();
        let phase = Phase::of(&batch);
        let padded = if phase == Phase::Decode { SEQUENCES } else { ROWS };
        let live = self.buffers.fill(&mut self.runner, &batch, phase, padded, true)?;
        let mut inputs = self.buffers.token_inputs(phase, padded)?;
        if wants_all {
            inputs = TokenInputs { last_rows: None, ..inputs };
        }
        let (model, caches) = (&self.model, &self.caches);
        let (hidden, logits) = self.runner.eager(&live, |cx| {
            let hidden = model.forward(cx, &inputs, caches)?.hidden;
            let logits = model.logits(cx, &hidden)?;
            Ok((hidden, logits))
        })?;
        for ((lease, past), new) in self.leases.iter().zip(past).zip(new) {
            lease.state().expect("a state").commit(past + new);
        }
        let rows = if wants_all { new[0] + new[1] } else { 2 };
        Ok(Step { hidden: self.read(&hidden, rows)?, logits: self.read(&logits, rows)? })
    }

    fn read(&mut self, tensor: &Tensor, rows: usize) -> Result<Vec<f32>> {
        let rows = tensor.rows(0..rows)?;
        match tensor.dtype() {
            DType::F32 => self.runner.read(&rows),
            _ => Ok(self.runner.read::<half::bf16>(&rows)?.into_iter().map(f32::from).collect()),
        }
    }

    /// A prompt, a mixed batch, and two decodes.
    fn steps(&mut self) -> Result<Vec<Step>> {
        Ok(vec![
            self.step([0, 0], [5, 9], true)?,
            self.step([5, 9], [1, 4], false)?,
            self.step([6, 13], [1, 1], false)?,
            self.step([7, 14], [1, 1], false)?,
        ])
    }
}

/// The ranks of a world of host devices that each have their share of a tiny checkpoint.
fn ranks(dir: &Path, dtype: DType, num_ranks: usize, experts: Experts) -> RankThreads<Rank> {
    let devices = (0..num_ranks).map(|_| Device::host()).collect();
    let mut options = WorldOptions::default();
    options.timeout = Duration::from_secs(60); // the ranks may have to share one busy core
    let world = World::new(devices, options).expect("a world");
    let communicators = world.communicators(CommunicatorOptions::default()).expect("communicators");
    let load = |(rank, communicator)| {
        let runner = Runner::in_world(communicator, RunnerOptions::default()).expect("a runner");
        Rank::load(dir, dtype, runner, Shard { experts, ..Shard::new(rank, num_ranks) })
    };
    RankThreads::start(&world, communicators.into_iter().enumerate().map(load).collect()).expect("threads")
}

/// The tiny checkpoints, each with the numbers of ranks that divide its heads, and those with experts in each way.
const RANKS: [(&str, &[usize], Experts); 8] = [
    ("tiny-qwen3", &[2, 4], Experts::ByChannels),
    ("tiny-qwen3-moe", &[2, 4], Experts::ByChannels),
    ("tiny-qwen3-moe", &[2, 4], Experts::Whole(MoeA2a::None)),
    ("tiny-qwen3-moe", &[2, 4], Experts::Whole(MoeA2a::Push)),
    ("tiny-nemotron-h", &[2], Experts::ByChannels),
    ("tiny-deepseek-v3", &[2, 4], Experts::ByChannels),
    ("tiny-deepseek-v3", &[2, 4], Experts::Whole(MoeA2a::None)),
    ("tiny-deepseek-v3", &[2, 4], Experts::Whole(MoeA2a::Push)),
];

/// The steps of one rank that has all of a tiny checkpoint.
fn steps_of_one(dir: &Path, dtype: DType) -> Vec<Step> {
    let runner = Runner::new(&Device::host(), RunnerOptions::default()).expect("a runner");
    Rank::load(dir, dtype, runner, Shard::WHOLE).steps().expect("one rank")
}

/// The steps of several ranks, whose hidden states and logits have the same bits.
fn steps_of_ranks(dir: &Path, dtype: DType, num_ranks: usize, experts: Experts) -> Vec<Step> {
    let mut steps = ranks(dir, dtype, num_ranks, experts).run(Rank::steps).expect("ranks");
    assert_eq!(steps.len(), num_ranks);
    assert!(steps.iter().all(|of_rank| *of_rank == steps[0]), "{}: {num_ranks} ranks differ", dir.display());
    steps.remove(0)
}

/// Asserts that several ranks compute in f32 what one does: they differ in the order of sums alone.
fn assert_ranks_agree(dir: &Path, worlds: &[usize], experts: Experts) {
    let whole = steps_of_one(dir, DType::F32);
    for &num_ranks in worlds {
        let steps = steps_of_ranks(dir, DType::F32, num_ranks, experts);
        for (at, (got, expected)) in std::iter::zip(steps, &whole).enumerate() {
            assert_eq!(got.logits.len(), expected.logits.len());
            let far = std::iter::zip(&got.logits, &expected.logits)
                .find(|(got, expected)| (**got - **expected).abs() > 1e-4 * (1.0 + expected.abs()));
            assert_eq!(far, None, "{}, {num_ranks} ranks, {experts:?}, step {at}: far from one rank", dir.display());
        }
    }
}

#[test]
fn several_ranks_compute_what_one_does_and_the_same_bits_on_all() {
    for (name, worlds, experts) in RANKS {
        assert_ranks_agree(&folder(name), worlds, experts);
    }
}

/// Fields of tiny checkpoints that 8 ranks divide, where need be because tensors are [`widened`].
fn for_8_ranks(name: &str) -> Value {
    let heads = json!({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32});
    let mixers = json!({"mamba_num_heads": 8, "mamba_head_dim": 32, "n_groups": 8, "ssm_state_size": 16});
    match name {
        "tiny-deepseek-v3" => json!({"num_attention_heads": 8, "num_key_value_heads": 8}),
        "tiny-nemotron-h" => {
            let mut fields = heads;
            fields["attention_head_dim"] = json!(32);
            fields.as_object_mut().expect("an object").extend(mixers.as_object().expect("an object").clone());
            fields
        }
        _ => heads,
    }
}

/// What the tensor `name` of a checkpoint is with the heads of [`for_8_ranks`]: norms of heads are cut, and what there is one
/// of for each head is there twice.
fn widened(checkpoint: &str, name: &str, info: &TensorInfo, bytes: &[u8]) -> (Vec<usize>, Vec<u8>) {
    let (mut shape, mut bytes) = (info.shape.clone(), bytes.to_vec());
    let row_bytes = bytes.len() / shape[0];
    let is = |parts: &[&str]| parts.iter().any(|part| name.contains(part));
    if is(&[".q_norm.", ".k_norm."]) {
        shape[0] /= 2;
        bytes.truncate(shape[0] * row_bytes);
    } else if is(&[".q_b_proj.", ".kv_b_proj.", ".A_log", ".mixer.D", ".dt_bias"]) {
        shape[0] *= 2;
        bytes.extend_from_within(..);
    } else if is(&[".mixer.in_proj."]) {
        shape[0] += 4;
        bytes.extend_from_within(bytes.len() - 4 * row_bytes..); // the time steps stand last
    } else if checkpoint == "tiny-deepseek-v3" && is(&[".o_proj."]) {
        shape[1] *= 2;
        bytes = bytes.chunks(row_bytes).flat_map(|row| row.repeat(2)).collect();
    }
    (shape, bytes)
}

/// Of the four key-value heads of grouped-query attention, two ranks each keep one.
#[test]
fn eight_ranks_compute_what_one_does() {
    for (name, _) in TINY {
        let file = std::fs::read(folder(name).join("model.safetensors")).expect(name);
        let (header, metadata) = SafeTensors::read_metadata(&file).expect("a header");
        let tensors: Vec<_> = metadata
            .tensors()
            .into_iter()
            .map(|(tensor, info)| {
                let (begin, end) = info.data_offsets;
                let (shape, bytes) = widened(name, &tensor, info, &file[8 + header..][begin..end]);
                (tensor, info.dtype, shape, bytes)
            })
            .collect();
        let views = tensors.iter().map(|(tensor, dtype, shape, bytes)| {
            (tensor, TensorView::new(*dtype, shape.clone(), bytes).expect("a view"))
        });
        let dir = with(name, &for_8_ranks(name));
        dir.write("model.safetensors", &safetensors::serialize(views, None).expect("serialised"));
        assert_ranks_agree(dir.path(), &[8], Experts::ByChannels);
    }
}

/// In bf16, logits of several ranks are as far from those in f32 as the logits of one rank are: at most 0.08 on the average
/// of a step, where rounding turns the choice of a router.
#[test]
fn several_ranks_round_no_worse_than_one() {
    for (name, worlds, experts) in RANKS {
        let exact = steps_of_one(&folder(name), DType::F32);
        for &num_ranks in worlds {
            for (at, (got, expected)) in
                std::iter::zip(steps_of_ranks(&folder(name), DType::Bf16, num_ranks, experts), &exact).enumerate()
            {
                let squares =
                    std::iter::zip(&got.logits, &expected.logits).map(|(got, expected)| (got - expected).powi(2));
                let rms = (squares.sum::<f32>() / expected.logits.len() as f32).sqrt();
                assert!(rms <= 0.1, "{name}, {num_ranks} ranks, step {at}: {rms} from f32");
            }
        }
    }
}

/// However rows come to experts: as long as the router gives the same bits, as it does on host devices, so do the sums.
#[test]
fn rows_that_are_sent_to_experts_come_back_with_the_same_bits() {
    for name in ["tiny-qwen3-moe", "tiny-deepseek-v3"] {
        for num_ranks in [2, 4] {
            let steps = |a2a| steps_of_ranks(&folder(name), DType::Bf16, num_ranks, Experts::Whole(a2a));
            let expected = steps(MoeA2a::None);
            for a2a in [MoeA2a::Push, MoeA2a::Break] {
                assert!(steps(a2a) == expected, "{name}, {num_ranks} ranks, {a2a:?}: other bits");
            }
        }
    }
}

#[test]
fn a_model_refuses_to_run_as_another_rank_than_its_weights_are_of() {
    let runner = Runner::new(&Device::host(), RunnerOptions::default()).expect("a runner");
    let mut alone = Rank::load(&folder("tiny-qwen3"), DType::Bf16, runner, Shard::new(1, 2));
    let error = alone.steps().expect_err("outside of a world").to_string();
    let says = "the model has the weights of rank 1 of 2, and it runs as rank 0 of 1; load its own";
    assert!(error.contains(says), "{error}");
}

/// How many ranks share what the tensor `name` holds, as the documentation of `weights` says.
fn num_shares(name: &str, num_ranks: usize, kv_heads: usize) -> usize {
    let is_whole = name.contains("layernorm")
        || (name.contains("norm") && !name.contains(".mixer.norm."))
        || [".gate.", ".q_a_proj.", ".kv_a_proj_with_mqa."].iter().any(|part| name.contains(part));
    match name {
        _ if is_whole => 1,
        _ if name.contains(".k_proj.") || name.contains(".v_proj.") => num_ranks.min(kv_heads),
        _ => num_ranks,
    }
}

#[test]
fn a_rank_keeps_the_documented_bytes() {
    for (name, worlds, experts) in RANKS {
        let config = ModelConfig::load(&folder(name)).expect(name);
        let header = std::fs::read(folder(name).join("model.safetensors")).expect(name);
        let (_, metadata) = SafeTensors::read_metadata(&header).expect("a header");
        let kv_heads = config.fields.count("num_key_value_heads").expect("a count");
        for &num_ranks in worlds.iter().chain(&[1]) {
            let bytes = |(name, info): (&String, &&TensorInfo)| {
                let size = if name.ends_with("e_score_correction_bias") { 4 } else { config.dtype.size_bytes() };
                info.shape.iter().product::<usize>() * size / num_shares(name, num_ranks, kv_heads)
            };
            let expected: usize = metadata.tensors().iter().map(bytes).sum();
            for rank in 0..num_ranks {
                let runner = Runner::new(&Device::host(), RunnerOptions::default()).expect("a runner");
                let shard = Shard { experts, ..Shard::new(rank, num_ranks) };
                let got = Rank::load(&folder(name), config.dtype, runner, shard).weight_bytes;
                assert_eq!(got, expected, "{name}, rank {rank} of {num_ranks}, {experts:?}");
            }
        }
    }
}

#[test]
fn a_rank_keeps_its_share_of_keys_values_and_states() {
    let layout = |name: &str, num_ranks| {
        let config = ModelConfig::load(&folder(name)).expect(name);
        config.cache_layout(Shard::new(num_ranks - 1, num_ranks)).expect(name)
    };
    let heads = |kv, q_heads, kv_layers| CacheLayout { kv_layers, k: [kv, 128], v: [kv, 128], q_heads, states: None };
    assert_eq!(layout("geometries/qwen3-32b", 2), heads(4, 32, 64));
    assert_eq!(layout("geometries/qwen3-32b", 8), heads(1, 8, 64));
    assert_eq!(layout("geometries/qwen3-30b-a3b", 2), heads(2, 16, 48));
    assert_eq!(layout("geometries/qwen3-235b-a22b", 4), heads(1, 16, 94));
    assert_eq!(layout("geometries/qwen3-235b-a22b", 8), heads(1, 8, 94), "two ranks keep one head");
    let states = StateLayout { layers: 24, conv: [1280, 3], ssm: [16, 64, 128], ssm_dtype: DType::F32 };
    assert_eq!(layout("geometries/nemotron-h-8b", 8), CacheLayout { states: Some(states), ..heads(1, 4, 4) });
    let latents = CacheLayout { kv_layers: 6, k: [1, 512], v: [1, 64], q_heads: 16, states: None };
    assert_eq!(layout("geometries/deepseek-v3-6-layers", 8), latents, "latents are not divided");
}

/// Every rank makes up its own parts, and what all keep is the same on all of them.
#[test]
fn made_up_weights_agree_where_they_are_not_divided() {
    let device = Device::host();
    for name in TINY.map(|(name, _)| name) {
        let config = ModelConfig::load(&folder(name)).expect(name);
        let load = |rank| {
            let mut weights = Weights::random(&device, config.dtype, Shard::new(rank, 2)).expect("weights");
            let hidden = config.hidden_size;
            let norm = weights.take("norm", &[hidden]).expect("a norm");
            let head =
                crate::layers::Linear::column(&mut weights, "lm_head", config.vocab_size, hidden).expect("a head");
            weights.finish().expect("nothing can be left");
            [norm, head.weight].map(|tensor| device.read::<half::bf16>(&tensor).expect("read"))
        };
        let ([norm, head], [other_norm, other_head]) = (load(0), load(1));
        assert_eq!(norm, other_norm);
        assert_eq!(head.len(), config.vocab_size / 2 * config.hidden_size);
        assert_ne!(head, other_head);
    }
}

/// A folder with the configuration in `name` and other values for some of its fields.
fn with(name: &str, fields: &Value) -> TempDir {
    let read = std::fs::read(folder(name).join("config.json")).expect("a configuration");
    let mut root: Value = serde_json::from_slice(&read).expect("JSON");
    let fields = fields.as_object().expect("an object");
    root.as_object_mut().expect("an object").extend(fields.clone());
    let names: Vec<_> = fields.iter().map(|(field, value)| format!("{field}-{value}")).collect();
    let dir = TempDir::new(&format!("ranks-{}-{}", name.replace('/', "-"), names.join("-")));
    dir.write("config.json", root.to_string().as_bytes());
    dir
}

/// The configuration in `name` with one other field.
fn config_with(name: &str, field: &str, value: usize) -> ModelConfig {
    let mut fields = json!({field: value});
    if name == "tiny-deepseek-v3" && field == "num_attention_heads" {
        fields["num_key_value_heads"] = json!(value);
    }
    ModelConfig::load(with(name, &fields).path()).expect(name)
}

#[test]
fn counts_that_the_ranks_cannot_divide_are_refused_by_name() {
    for (name, field, value, num_ranks, works) in [
        ("tiny-qwen3", "num_attention_heads", 6, 4, "1, 2"),
        ("tiny-qwen3", "intermediate_size", 390, 4, "1, 2"),
        ("tiny-qwen3", "vocab_size", 513, 2, "1"),
        ("tiny-qwen3", "vocab_size", 510, 4, "1, 2"),
        ("tiny-qwen3-moe", "num_attention_heads", 6, 4, "1, 2"),
        ("tiny-qwen3-moe", "moe_intermediate_size", 98, 4, "1, 2"),
        ("tiny-nemotron-h", "num_attention_heads", 2, 4, "1, 2"),
        ("tiny-nemotron-h", "mamba_num_heads", 6, 4, "1, 2"),
        ("tiny-nemotron-h", "n_groups", 2, 4, "1, 2"),
        ("tiny-nemotron-h", "intermediate_size", 385, 2, "1"),
        ("tiny-deepseek-v3", "num_attention_heads", 6, 4, "1, 2"),
        ("tiny-deepseek-v3", "intermediate_size", 390, 4, "1, 2"),
        ("tiny-deepseek-v3", "moe_intermediate_size", 98, 4, "1, 2"),
    ] {
        let config = config_with(name, field, value);
        let says = format!(
            "field `{field}`: expected a multiple of {num_ranks} ranks, got {value}; numbers of ranks that work: {works}"
        );
        for error in [
            registry::check_shard(&config, num_ranks, Experts::ByChannels).expect_err(field),
            config.cache_layout(Shard::new(0, num_ranks)).expect_err(field),
        ] {
            assert!(error.to_string().ends_with(&says), "{name}: {error}");
        }
        let device = Device::host();
        let weights = Weights::random(&device, config.dtype, Shard::new(0, num_ranks)).expect("weights");
        let error = registry::load(&config, weights).expect_err(field).to_string();
        assert!(error.ends_with(&says), "{name}: {error}");
    }
    let mut config = config_with("tiny-qwen3", "num_attention_heads", 12);
    config = ModelConfig { vocab_size: 12 * 512, ..config };
    registry::check_shard(&config, 4, Experts::ByChannels).expect("two ranks keep each of the two heads");
    let three = config_with("geometries/qwen3-8b", "num_attention_heads", 24);
    let error = registry::check_shard(&ModelConfig { vocab_size: 151_920, ..three }, 3, Experts::ByChannels)
        .expect_err("8 heads")
        .to_string();
    let says = "field `num_key_value_heads`: expected a multiple or a divisor of 3 ranks, got 8; \
                numbers of ranks that work: 1, 2, 4, 8";
    assert!(error.ends_with(says), "{error}");
    let error = registry::check_shard(&config, 0, Experts::ByChannels).expect_err("no rank").to_string();
    assert!(error.contains("`num_attention_heads`"), "{error}");
}

#[test]
fn experts_that_the_ranks_cannot_share_are_refused_by_name() {
    let check =
        |config: &ModelConfig, num_ranks| registry::check_shard(config, num_ranks, Experts::Whole(MoeA2a::None));
    for (name, field, value) in [
        ("tiny-qwen3-moe", "num_local_experts", 6),
        ("tiny-deepseek-v3", "n_routed_experts", 6),
        ("tiny-deepseek-v3", "moe_intermediate_size", 98), // of the shared expert
    ] {
        let error = check(&config_with(name, field, value), 4).expect_err(field).to_string();
        let says =
            format!("field `{field}`: expected a multiple of 4 ranks, got {value}; numbers of ranks that work: 1, 2");
        assert!(error.ends_with(&says), "{name}: {error}");
    }
    let odd = config_with("tiny-qwen3-moe", "moe_intermediate_size", 97);
    check(&odd, 4).expect("the channels of an expert stay together");
    for (name, architecture) in [("tiny-qwen3", "Qwen3ForCausalLM"), ("tiny-nemotron-h", "NemotronHForCausalLM")] {
        let config = ModelConfig::load(&folder(name)).expect(name);
        let error = check(&config, 2).expect_err("no experts").to_string();
        assert!(error.contains("field `architectures`: expected a mixture of experts, got "), "{error}");
        assert!(error.contains(architecture) && error.contains("give `ep` 1"), "{error}");
    }
}

#[test]
fn the_published_geometries_are_divided_by_8_ranks() {
    let geometries = std::fs::read_dir(folder("geometries")).expect("the geometries");
    for geometry in geometries.map(|entry| entry.expect("an entry").path()) {
        let config = ModelConfig::load(&geometry).expect("a configuration");
        for num_ranks in [1, 2, 4, 8] {
            registry::check_shard(&config, num_ranks, Experts::ByChannels).expect("a number of ranks");
        }
        // Their names tell which are mixtures.
        let is_mixture = ["deepseek", "a3b", "a22b"].iter().any(|part| geometry.to_string_lossy().contains(part));
        assert_eq!(
            registry::check_shard(&config, 8, Experts::Whole(MoeA2a::None)).is_ok(),
            is_mixture,
            "{}",
            geometry.display()
        );
    }
}
