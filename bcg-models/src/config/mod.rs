//! The configuration of a model, read from a checkpoint folder.
//!
//! `config.json` gives the geometry, `generation_config.json` (if there is one) further end-of-sequence ids.
//! [`ModelConfig`] holds what every model has; what only some have, their layers read from [`ModelConfig::fields`].
//! A value that this code cannot honour is refused by name before anything is loaded, and not discovered later as wrong
//! tokens.

mod dense_layers;
mod fields;
mod layer_kinds;

use std::path::Path;

use bcg_runtime::DType;

use crate::error::Result;
use crate::registry;
use crate::state::CacheLayout;
use crate::weights::Shard;

pub use dense_layers::DenseLayers;
pub use fields::Fields;
pub use layer_kinds::LayerKind;

/// The most layers of a model; more is an error. The largest published ones have less than 200.
pub const LAYERS_MAX: usize = 1_024;

/// The geometry and the constants of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The first entry of `architectures`, a key of the [registry].
    pub architecture: String,
    /// The element type that weights are converted to.
    pub dtype: DType,
    /// The width of hidden states, C.
    pub hidden_size: usize,
    /// Tokens of the vocabulary, V.
    pub vocab_size: usize,
    /// The longest context that the checkpoint was made for.
    pub max_position_embeddings: usize,
    /// The epsilon of every RMS norm.
    pub rms_norm_eps: f32,
    /// Whether the LM head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Token ids that end a sequence, without repetition.
    pub eos_token_ids: Vec<u32>,
    /// All of `config.json`.
    pub fields: Fields,
}

impl ModelConfig {
    /// Reads the configuration of the checkpoint in `dir`.
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File) or [`Error::Format`](crate::Error::Format) if a file is absent or not JSON;
    /// [`Error::Architecture`](crate::Error::Architecture); [`Error::Config`](crate::Error::Config) for a field that is
    /// absent or that cannot be honoured.
    pub fn load(dir: &Path) -> Result<Self> {
        let config = Fields::read(dir.join("config.json"))?;
        let generation = Fields::read_optional(dir.join("generation_config.json"))?;
        Self::parse(config, generation.as_ref())
    }

    fn parse(config: Fields, generation: Option<&Fields>) -> Result<Self> {
        // First, because another architecture may lack any of the fields below.
        let architecture = config.architecture()?;
        registry::check(&architecture)?;
        for field in ["num_hidden_layers", "num_nextn_predict_layers"] {
            config.check_layers(field, config.optional_size(field)?)?;
        }
        let mut eos_token_ids = Vec::new();
        for fields in generation.into_iter().chain([&config]) {
            for id in fields.token_ids("eos_token_id")? {
                if !eos_token_ids.contains(&id) {
                    eos_token_ids.push(id);
                }
            }
        }
        let eps = config.number("rms_norm_eps")?.or(config.number("layer_norm_epsilon")?);
        let parsed = Self {
            architecture,
            dtype: config.dtype()?,
            hidden_size: config.count("hidden_size")?,
            vocab_size: config.count("vocab_size")?,
            max_position_embeddings: config.count("max_position_embeddings")?,
            rms_norm_eps: eps.unwrap_or(1e-6) as f32,
            tie_word_embeddings: config.flag("tie_word_embeddings")?,
            eos_token_ids,
            fields: config,
        };
        parsed.cache_layout(Shard::WHOLE)?; // asks the family, which refuses what its layers cannot honour
        Ok(parsed)
    }

    /// What one rank keeps of a sequence between steps: of [`Shard::WHOLE`], all.
    ///
    /// # Errors
    /// Those of [`registry::cache_layout`]; none for the whole after a successful [`load`](Self::load).
    pub fn cache_layout(&self, shard: Shard) -> Result<CacheLayout> {
        registry::cache_layout(self, shard)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::{Heads, MoeConfig, rope_theta};
    use serde_json::{Value, json};

    fn fields(root: Value) -> Fields {
        Fields::new("config.json", root)
    }

    fn qwen3() -> Value {
        json!({
            "architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024, "num_hidden_layers": 2,
            "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 3072, "vocab_size": 151_936,
            "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000, "hidden_act": "silu",
            "torch_dtype": "bfloat16", "tie_word_embeddings": true, "eos_token_id": 7,
        })
    }

    fn with(changes: &Value) -> Result<ModelConfig> {
        let mut root = qwen3();
        for (key, value) in changes.as_object().expect("an object") {
            root[key] = value.clone();
        }
        ModelConfig::parse(fields(root), None)
    }

    #[test]
    fn both_spellings_of_rope_theta_are_read() {
        let theta = |changes| rope_theta(&with(&changes).expect("config").fields).expect("a base");
        assert_eq!(theta(json!({})), 1e6);
        let five = json!({"rope_theta": null, "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}});
        assert_eq!(theta(five), 5000.0);
    }

    #[test]
    fn head_dim_is_explicit_or_derived() {
        let dim = |changes| Heads::read(&with(&changes).expect("config")).expect("heads").dim;
        assert_eq!(dim(json!({})), 64);
        assert_eq!(dim(json!({"head_dim": 128})), 128);
    }

    #[test]
    fn eos_ids_of_both_files_are_merged() {
        let generation = fields(json!({"eos_token_id": [9, 7]}));
        let config = ModelConfig::parse(fields(qwen3()), Some(&generation)).expect("config");
        assert_eq!(config.eos_token_ids, [9, 7]);
    }

    #[test]
    fn an_error_names_file_field_expected_got_and_remedy() {
        let error = with(&json!({"use_sliding_window": true})).expect_err("sliding window is refused");
        assert_eq!(
            error.to_string(),
            "config.json: field `use_sliding_window`: expected false, got true; sliding-window attention is not implemented"
        );
    }

    #[test]
    fn what_cannot_be_honoured_is_refused() {
        for (field, value) in [
            ("head_dim", json!(80)),
            ("num_key_value_heads", json!(3)),
            ("hidden_act", json!("gelu")),
            ("attention_bias", json!(true)),
            ("rope_scaling", json!({"rope_type": "yarn"})),
            ("layer_types", json!(["sliding_attention"])),
            ("vocab_size", json!(-1)),
            ("num_hidden_layers", json!(1_000_000_000)),
            ("num_nextn_predict_layers", json!(1_000_000_000)),
            ("hidden_size", Value::Null),
            ("torch_dtype", json!("int8")),
            ("eos_token_id", json!("two")),
            ("architectures", json!([])),
        ] {
            let error = with(&json!({field: value})).expect_err(field).to_string();
            assert!(error.contains(field), "{error}");
        }
    }

    /// The parameters of a Qwen3, dense or of experts, tied ones counted once.
    fn num_parameters(config: &ModelConfig) -> usize {
        let (hidden, heads) = (config.hidden_size, Heads::read(config).expect("heads"));
        let count = |field| config.fields.count(field).expect("a count");
        let attention = hidden * (heads.q + 2 * heads.kv) * heads.dim + heads.q * heads.dim * hidden + 2 * heads.dim;
        let mlp = match config.architecture.as_str() {
            "Qwen3MoeForCausalLM" => {
                let moe = MoeConfig::read(config).expect("experts");
                moe.num_experts * (hidden + 3 * hidden * moe.inner)
            }
            _ => 3 * hidden * count("intermediate_size"),
        };
        let layer = attention + mlp + 2 * hidden;
        let tables = if config.tie_word_embeddings { 1 } else { 2 };
        count("num_hidden_layers") * layer + hidden + tables * config.vocab_size * hidden
    }

    #[test]
    fn the_geometries_have_the_published_numbers_of_parameters() {
        // As the model cards say, in billions, and exactly.
        for (name, billions, parameters) in [
            ("qwen3-0.6b", "0.6", 596_049_920),
            ("qwen3-1.7b", "1.7", 1_720_574_976),
            ("qwen3-8b", "8.2", 8_190_735_360),
            ("qwen3-32b", "32.8", 32_762_123_264),
            ("qwen3-30b-a3b", "30.5", 30_532_122_624),
            ("qwen3-235b-a22b", "235.1", 235_093_634_560),
        ] {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/geometries").join(name);
            let config = ModelConfig::load(&dir).expect(name);
            assert_eq!(num_parameters(&config), parameters, "{name}");
            assert_eq!(format!("{:.1}", parameters as f64 / 1e9), billions, "{name}");
            assert_eq!(rope_theta(&config.fields).expect("a base"), 1e6, "{name}");
            assert_eq!((config.vocab_size, config.eos_token_ids), (151_936, vec![151_645]));
        }
        let qwen3 = crate::testing::tiny_qwen3();
        for tiny in [qwen3.with_file_name("tiny-qwen3-moe"), qwen3] {
            let header = std::fs::read(tiny.join("model.safetensors")).expect("the tiny checkpoint");
            let (_, metadata) = safetensors::SafeTensors::read_metadata(&header).expect("a header");
            let stored: usize = metadata.tensors().values().map(|info| info.shape.iter().product::<usize>()).sum();
            assert_eq!(num_parameters(&ModelConfig::load(&tiny).expect("config")), stored);
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = ModelConfig::load(Path::new("/nonexistent")).expect_err("no such folder");
        assert!(error.to_string().starts_with("/nonexistent/config.json: "), "{error}");
    }
}
