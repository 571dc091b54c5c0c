//! Rules that every model keeps, and what the published configurations say of their sizes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bcg_kernels::DecodePlan;
use bcg_runtime::{BreakableCudaGraph, Context, DType, Device, Result, Runner, RunnerOptions, Tensor};
use serde_json::{Value, json};

use super::deepseek;
use crate::batch::{BatchLimits, ForwardBatch, InputBuffers, Phase, SequenceInput, TokenInputs};
use crate::config::{LayerKind, ModelConfig};
use crate::layers::{Heads, Mamba2Config, MlaDims, MoeConfig, Relu2Mlp, RotaryScaling};
use crate::registry::{self, Model};
use crate::runner::{GraphMode, LoadFormat, ModelRunner};
use crate::sampling::SamplingParams;
use crate::state::{CacheLayout, Caches, KvCache, StateCache, StateLayout};
use crate::testing::TempDir;
use crate::weights::{Shard, Weights};

mod dry_run;
mod ranks;

/// A folder in `models`.
fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models").join(name)
}

/// The numbers that the checkpoint in `dir` stores.
fn num_stored(dir: &Path) -> usize {
    let header = std::fs::read(dir.join("model.safetensors")).expect("the tiny checkpoint");
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&header).expect("a header");
    metadata.tensors().values().map(|info| info.shape.iter().product::<usize>()).sum()
}

/// A model is wiring: what is longer belongs to a layer, to the configuration, or to these tests.
#[test]
fn a_model_is_one_file_of_at_most_80_lines() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/models");
    let entries = std::fs::read_dir(dir).expect("the models").map(|entry| entry.expect("an entry").path());
    for file in entries.filter(|entry| entry.is_file()) {
        let lines = std::fs::read_to_string(&file).expect("text").lines().count();
        assert!(lines <= 80 || file.ends_with("tests.rs"), "{} has {lines} lines", file.display());
    }
}

/// Rows, and the most sequences, of the batches below.
const ROWS: usize = 20;
const SEQUENCES: usize = 8;
/// Tokens of each page, and pages of each sequence.
const PAGE_SIZE: usize = 4;
const PAGES: usize = 4;

/// A tiny checkpoint on the host device, and a batch of two sequences, of 5 and 9 tokens, in 20 padded rows.
struct Tiny {
    runner: Runner,
    model: Arc<dyn Model>,
    caches: Caches,
    inputs: TokenInputs,
    live: ForwardBatch,
    _buffers: InputBuffers,
}

impl Tiny {
    fn load(name: &str) -> Self {
        let device = Device::host();
        let config = ModelConfig::load(&folder(name)).expect(name);
        let weights = Weights::open(&folder(name), &device, config.dtype, Shard::WHOLE).expect(name);
        let layout = config.cache_layout(Shard::WHOLE).expect("a layout");
        let kv = KvCache::new(&device, config.dtype, &layout, [2 * PAGES, PAGE_SIZE]).expect("a cache");
        let states = StateCache::new(&device, config.dtype, layout.states.as_ref(), 2).expect("states");
        let plan = DecodePlan::new(&device, layout.q_heads, layout.k[0]);
        let limits = BatchLimits { rows: ROWS, sequences: SEQUENCES, pages_per_sequence: PAGES };
        let mut buffers = InputBuffers::new(&device, limits, PAGE_SIZE, plan).expect("buffers");
        let mut runner = Runner::new(&device, RunnerOptions::default()).expect("a runner");
        let (sampling, pages) = (SamplingParams::greedy(), [0, 1, 2, 3, 4, 5]);
        let tokens: Vec<u32> = (0..14).map(|i| 37 * i % 512).collect();
        let batch = [
            SequenceInput::new(&tokens[..5], 0, &pages[..2], &sampling),
            SequenceInput::new(&tokens[5..], 0, &pages[2..], &sampling),
        ];
        let live = buffers.fill(&mut runner, &batch, Phase::Prefill, ROWS, true).expect("filled");
        Self {
            model: registry::load(&config, weights).expect(name),
            caches: Caches { kv, states },
            inputs: buffers.token_inputs(Phase::Prefill, ROWS).expect("views"),
            live,
            runner,
            _buffers: buffers,
        }
    }

    /// The hidden states that a forward over `inputs` returns, by row.
    fn hidden(&mut self, inputs: &TokenInputs) -> Vec<Vec<f32>> {
        let (model, caches) = (&self.model, &self.caches);
        let run = self.runner.eager(&self.live, |cx| model.forward(cx, inputs, caches));
        let hidden = run.expect("a forward").hidden;
        let width = hidden.dim(1);
        let values: Vec<f32> = match hidden.dtype() {
            DType::F32 => self.runner.read(&hidden).expect("read"),
            _ => self.runner.read::<half::bf16>(&hidden).expect("read").into_iter().map(f32::from).collect(),
        };
        values.chunks(width).map(<[f32]>::to_vec).collect()
    }

    /// The kernels of the last segment of a captured forward.
    fn last_kernels(mut self) -> Vec<&'static str> {
        let (model, inputs, caches) = (Arc::clone(&self.model), self.inputs.clone(), self.caches);
        let forward = move |cx: &mut Context<'_, ForwardBatch>| -> Result<Tensor> {
            Ok(model.forward(cx, &inputs, &caches)?.hidden)
        };
        let mut graph = BreakableCudaGraph::new("tiny");
        graph.capture(&mut self.runner, &self.live, forward).expect("a capture");
        graph.describe().segments.pop().expect("a segment").kernels
    }
}

/// The tiny checkpoints, and the kernels that their last feed-forwards end with.
const TINY: [(&str, &str); 4] = [
    ("tiny-qwen3", "silu_mul"),
    ("tiny-qwen3-moe", "moe_combine"),
    ("tiny-nemotron-h", "relu2"),
    ("tiny-deepseek-v3", "moe_combine"),
];

/// The rows that nobody wants end before the last feed-forward, and those that stay are as they would have been.
#[test]
fn the_last_feed_forward_works_on_the_wanted_rows_only() {
    for (name, kernel) in TINY {
        let mut tiny = Tiny::load(name);
        let wanted = tiny.inputs.clone();
        let all = tiny.hidden(&TokenInputs { last_rows: None, ..wanted.clone() });
        let kept = tiny.hidden(&wanted);
        assert_eq!((all.len(), kept.len()), (ROWS, SEQUENCES), "{name}");
        assert_eq!(kept[..2], [all[4].clone(), all[13].clone()], "{name}");
        let kernels = tiny.last_kernels();
        let position = |kernel: &str| kernels.iter().rposition(|other| other.starts_with(kernel)).expect(kernel);
        assert!(position("gather_rows") < position(kernel), "{name}: {kernels:?}");
    }
}

/// After the last layer that mixes rows, a row stands for a sequence: those without one are padding and choose no
/// expert.
#[test]
fn a_kept_row_without_a_sequence_chooses_no_expert() {
    for name in ["tiny-qwen3-moe", "tiny-deepseek-v3"] {
        let mut tiny = Tiny::load(name);
        let wanted = tiny.inputs.clone();
        let all = tiny.hidden(&TokenInputs { last_rows: None, ..wanted.clone() });
        let kept = tiny.hidden(&wanted);
        // They gather row 0, which is valid and has experts.
        assert_eq!(kept[2..], vec![kept[2].clone(); SEQUENCES - 2], "{name}");
        assert_ne!(kept[2], all[0], "{name}");
        let tokens = tiny.hidden(&TokenInputs { num_sequences: wanted.num_valid.clone(), ..wanted });
        assert_eq!(tokens[2], all[0], "{name}: the number of tokens would make them valid");
    }
}

/// A runner of a tiny checkpoint's configuration with other heads, and random weights.
fn with_head_dim(name: &str, head_dim: usize, graph: GraphMode) -> crate::Result<ModelRunner> {
    let read = std::fs::read(folder(name).join("config.json")).expect("a configuration");
    let mut root: Value = serde_json::from_slice(&read).expect("JSON");
    root["head_dim"] = json!(head_dim);
    let dir = TempDir::new(&format!("{name}-{head_dim}-{graph:?}"));
    dir.write("config.json", root.to_string().as_bytes());
    let options = crate::ModelRunnerOptions {
        load_format: LoadFormat::Dummy,
        skip_tokenizer_init: true,
        context_length: 64,
        graph,
        cuda_graph_sizes: Some(vec![8, 16]),
        ..crate::ModelRunnerOptions::default()
    };
    let mut runner = ModelRunner::load(&Device::host(), dir.path(), options, &mut |_| ())?;
    runner.capture(&mut |_| ())?;
    Ok(runner)
}

/// Runs 12 tokens in steps that end at `ends`, and returns the last logits.
fn last_logits(runner: &mut ModelRunner, ends: &[usize]) -> Vec<f32> {
    let lease = runner.pages().lease(runner.pages().pages_for(12)).expect("pages");
    let (sampling, tokens) = (SamplingParams::greedy(), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]);
    let (mut begin, mut logits) = (0, None);
    for &end in ends {
        let new = SequenceInput::new(&tokens[begin..end], begin, lease.pages(), &sampling);
        let output = runner.step(&[SequenceInput { state: lease.state(), logits: true, ..new }]).expect("a step");
        (begin, logits) = (end, output.tokens.into_iter().next().and_then(|token| token.logits));
    }
    logits.expect("logits were asked for")
}

/// Heads that only the kernels for any dimension take: chunks, decodes and graphs give the logits of a prompt at once.
#[test]
fn heads_of_every_dimension_that_the_kernels_take_are_served() {
    for (name, head_dim) in [32, 96, 256].into_iter().flat_map(|dim| [("tiny-qwen3", dim), ("tiny-nemotron-h", dim)]) {
        let mut eager = with_head_dim(name, head_dim, GraphMode::Off).expect("a runner");
        let mut graphs = with_head_dim(name, head_dim, GraphMode::Ahead).expect("a runner");
        let whole = last_logits(&mut eager, &[12]);
        assert!(whole.iter().all(|logit| logit.is_finite()), "{name}, heads of {head_dim}");
        assert_eq!(last_logits(&mut eager, &[5, 12]), whole, "{name}, heads of {head_dim}: chunks");
        assert_eq!(last_logits(&mut graphs, &[5, 12]), whole, "{name}, heads of {head_dim}: graphs");
        let decoded = last_logits(&mut eager, &[10, 11, 12]);
        assert_eq!(last_logits(&mut graphs, &[10, 11, 12]), decoded, "{name}, heads of {head_dim}: graphs");
        let is_near = decoded.iter().zip(&whole).all(|(a, b)| (a - b).abs() <= 0.06 + b.abs() / 64.0);
        assert!(is_near, "{name}, heads of {head_dim}: decodes");
        assert!(graphs.stats().num_replays >= 5, "{:?}", graphs.stats());
    }
}

#[test]
fn heads_that_no_kernel_takes_are_refused_with_the_true_reason() {
    for head_dim in [16, 80, 288] {
        let error = with_head_dim("tiny-qwen3", head_dim, GraphMode::Off).expect_err("refused").to_string();
        let says = format!("`head_dim`: expected a multiple of 32 up to 256, got {head_dim}; the attention kernels");
        assert!(error.contains(&says), "{error}");
    }
}

/// The parameters of a DeepSeek, tied ones counted once.
fn num_parameters_deepseek(config: &ModelConfig) -> usize {
    let (hidden, dims) = (config.hidden_size, MlaDims::read(config).expect("widths"));
    let moe = MoeConfig::read(config).expect("experts");
    let count = |field| config.fields.count(field).expect("a count");
    let q_width = dims.heads * (dims.nope + dims.rope);
    let queries = dims.q_rank.map_or(hidden * q_width, |rank| rank * (hidden + 1 + q_width));
    let latents = hidden * (dims.latent + dims.rope) + dims.latent;
    let of_heads = dims.heads * ((dims.nope + dims.value) * dims.latent + dims.value * hidden);
    let experts = 3 * hidden * (moe.num_experts * moe.inner + moe.shared_inner.unwrap_or(0));
    let router = moe.num_experts * (hidden + usize::from(moe.is_sigmoid));
    let (layers, dense) = (count("num_hidden_layers"), count("first_k_dense_replace"));
    let tables = if config.tie_word_embeddings { 1 } else { 2 };
    layers * (queries + latents + of_heads + 2 * hidden)
        + dense * 3 * hidden * count("intermediate_size")
        + (layers - dense) * (experts + router)
        + hidden
        + tables * config.vocab_size * hidden
}

#[test]
fn the_geometries_of_deepseek_have_the_published_numbers() {
    for (name, parameters, layout, score_scale) in [
        // The model card says 15.7 billion; DeepSeek-V3 is cut to six layers.
        ("geometries/deepseek-v2-lite", 15_706_484_224, (27, 16), 1.2608f32.powi(2)),
        ("geometries/deepseek-v3-6-layers", 38_125_674_240, (6, 128), 1.368_89f32.powi(2)),
    ] {
        let config = ModelConfig::load(&folder(name)).expect(name);
        assert_eq!(num_parameters_deepseek(&config), parameters, "{name}");
        let got = deepseek::cache_layout(&config).expect("a layout");
        let (kv_layers, q_heads) = layout;
        assert_eq!(got, CacheLayout { kv_layers, k: [1, 512], v: [1, 64], q_heads, states: None });
        let rotary = RotaryScaling::read(&config.fields, 64).expect("YaRN");
        assert!((rotary.score_scale - score_scale).abs() < 1e-4, "{name}: {}", rotary.score_scale);
    }
    let tiny = folder("tiny-deepseek-v3");
    assert_eq!(num_parameters_deepseek(&ModelConfig::load(&tiny).expect("a configuration")), num_stored(&tiny));
}

#[test]
fn what_deepseek_cannot_honour_is_refused_by_name() {
    let read = std::fs::read(folder("tiny-deepseek-v3/config.json")).expect("a configuration");
    let root: Value = serde_json::from_slice(&read).expect("JSON");
    for (field, value) in [
        ("attention_bias", json!(true)),
        ("quantization_config", json!({"quant_method": "fp8"})),
        ("kv_lora_rank", json!(48)),
        ("qk_rope_head_dim", json!(160)),
        ("num_key_value_heads", json!(2)),
        ("moe_layer_freq", json!(2)),
        ("hidden_act", json!("gelu")),
        ("rope_parameters", json!({"rope_type": "linear", "rope_theta": 1e4})),
    ] {
        let mut root = root.clone();
        root[field] = value;
        let dir = TempDir::new(&format!("deepseek-{field}"));
        dir.write("config.json", root.to_string().as_bytes());
        let error = ModelConfig::load(dir.path()).expect_err(field).to_string();
        assert!(error.contains(field), "{error}");
    }
}

/// The parameters of a Nemotron-H with a head of its own.
fn num_parameters_nemotron_h(config: &ModelConfig) -> usize {
    let (hidden, inner) = (config.hidden_size, Relu2Mlp::read_width(&config.fields).expect("a width"));
    let (heads, mixer) = (Heads::read(config).expect("heads"), Mamba2Config::read(&config.fields).expect("a mixer"));
    let StateLayout { conv: [channels, past], ssm: [ssm_heads, head_dim, _], .. } = mixer.state_layout(1);
    let width = ssm_heads * head_dim;
    let of_layer = |kind: &LayerKind| match kind {
        LayerKind::Mamba2 => {
            (2 * width + channels + ssm_heads) * hidden + channels * (past + 2) + 3 * ssm_heads + width
        }
        LayerKind::Attention => 2 * hidden * (heads.q + heads.kv) * heads.dim,
        LayerKind::Mlp => 2 * hidden * inner,
    };
    let layers: usize =
        LayerKind::read_all(&config.fields).expect("kinds").iter().map(|kind| hidden + of_layer(kind)).sum();
    layers + hidden + 2 * config.vocab_size * hidden
}

#[test]
fn the_geometry_of_nemotron_h_has_the_published_number_of_parameters() {
    let config = ModelConfig::load(&folder("geometries/nemotron-h-8b")).expect("config");
    assert_eq!(num_parameters_nemotron_h(&config), 8_100_852_736);
    let ssm_dtype = DType::F32;
    let states = StateLayout { layers: 24, conv: [10_240, 3], ssm: [128, 64, 128], ssm_dtype };
    let layout = CacheLayout { kv_layers: 4, k: [8, 128], v: [8, 128], q_heads: 32, states: Some(states) };
    assert_eq!(config.cache_layout(Shard::WHOLE).expect("a layout"), layout);
    let tiny = folder("tiny-nemotron-h");
    assert_eq!(num_parameters_nemotron_h(&ModelConfig::load(&tiny).expect("config")), num_stored(&tiny));
}
