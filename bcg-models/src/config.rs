//! The configuration of a model, read from a checkpoint folder.
//!
//! `config.json` gives the geometry, `generation_config.json` (if there is one) further end-of-sequence ids.
//! A value that this code cannot honour is refused here, by name, and not discovered later as wrong tokens.

use std::path::{Path, PathBuf};

use bcg_runtime::DType;
use serde_json::Value;

use crate::error::{Error, Result, read_file};

/// Head dimensions that the attention kernels cover.
const HEAD_DIMS: [usize; 2] = [64, 128];

/// The geometry and the constants of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The first entry of `architectures`, a key of the [registry](crate::registry).
    pub architecture: String,
    /// The element type that weights are converted to.
    pub dtype: DType,
    /// C.
    pub hidden_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Hq.
    pub num_attention_heads: usize,
    /// Hkv.
    pub num_key_value_heads: usize,
    /// D.
    pub head_dim: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// V.
    pub vocab_size: usize,
    /// The longest context that the checkpoint was made for.
    pub max_position_embeddings: usize,
    /// The epsilon of every RMS norm.
    pub rms_norm_eps: f32,
    /// The base of the rotary frequencies.
    pub rope_theta: f64,
    /// Whether the LM head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Token ids that end a sequence, without repetition.
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Reads the configuration of the checkpoint in `dir`.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Format`] if a file is absent or not JSON; [`Error::Architecture`]; [`Error::Config`] for
    /// a field that is absent or that cannot be honoured.
    pub fn load(dir: &Path) -> Result<Self> {
        let config = Fields::read(dir.join("config.json"))?;
        let generation_file = dir.join("generation_config.json");
        let generation = if generation_file.exists() { Some(Fields::read(generation_file)?) } else { None };
        Self::parse(&config, generation.as_ref())
    }

    fn parse(config: &Fields, generation: Option<&Fields>) -> Result<Self> {
        // First, because another architecture may lack any of the fields below.
        let architecture = config.architecture()?;
        crate::registry::check(&architecture)?;
        let num_attention_heads = config.count("num_attention_heads")?;
        let num_key_value_heads = config.optional_count("num_key_value_heads")?.unwrap_or(num_attention_heads);
        let hidden_size = config.count("hidden_size")?;
        let head_dim = match config.optional_count("head_dim")? {
            Some(head_dim) => head_dim,
            None => hidden_size / num_attention_heads,
        };
        let mut eos_token_ids = Vec::new();
        for fields in generation.into_iter().chain([config]) {
            for id in fields.token_ids("eos_token_id")? {
                if !eos_token_ids.contains(&id) {
                    eos_token_ids.push(id);
                }
            }
        }
        let parsed = Self {
            architecture,
            dtype: config.dtype()?,
            hidden_size,
            num_hidden_layers: config.count("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            intermediate_size: config.count("intermediate_size")?,
            vocab_size: config.count("vocab_size")?,
            max_position_embeddings: config.count("max_position_embeddings")?,
            rms_norm_eps: config.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            rope_theta: config.rope_theta()?,
            tie_word_embeddings: config.flag("tie_word_embeddings")?,
            eos_token_ids,
        };
        parsed.check(config)?;
        Ok(parsed)
    }

    /// Refuses what the layers cannot honour.
    fn check(&self, config: &Fields) -> Result<()> {
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(config.error(
                "num_key_value_heads",
                format!("a divisor of num_attention_heads = {}", self.num_attention_heads),
                self.num_key_value_heads,
                "check the checkpoint's conversion",
            ));
        }
        if !HEAD_DIMS.contains(&self.head_dim) {
            return Err(config.error(
                "head_dim",
                "64 or 128",
                self.head_dim,
                "the attention kernels cover no other head dimension yet",
            ));
        }
        if config.flag("use_sliding_window")? {
            return Err(config.error(
                "use_sliding_window",
                "false",
                true,
                "sliding-window attention is not implemented",
            ));
        }
        if let Some(kinds) = config.get("layer_types").and_then(Value::as_array)
            && let Some(other) = kinds.iter().find(|kind| kind.as_str() != Some("full_attention"))
        {
            return Err(config.error("layer_types", "`full_attention` only", other, "no other kind is implemented"));
        }
        if config.flag("attention_bias")? {
            return Err(config.error("attention_bias", "false", true, "biased projections are not implemented"));
        }
        match config.get("hidden_act") {
            None => Ok(()),
            Some(act) if act.as_str() == Some("silu") => Ok(()),
            Some(act) => Err(config.error("hidden_act", "\"silu\"", act, "no other activation is implemented")),
        }
    }

    /// The bytes of keys and values that one token holds in all layers.
    pub fn kv_bytes_per_token(&self) -> usize {
        2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * self.dtype.size_bytes()
    }
}

/// The top-level object of one configuration file, with readers that name the file and the field when they fail.
#[derive(Debug)]
struct Fields {
    file: PathBuf,
    root: Value,
}

impl Fields {
    fn read(file: PathBuf) -> Result<Self> {
        let bytes = read_file(&file)?;
        let root: Value = serde_json::from_slice(&bytes)
            .map_err(|error| Error::format(&file, format!("expected a JSON object: {error}")))?;
        if !root.is_object() {
            return Err(Error::format(&file, "expected a JSON object"));
        }
        Ok(Self { file, root })
    }

    /// The value of a dotted field; `null` counts as absent.
    fn get(&self, field: &str) -> Option<&Value> {
        field.split('.').try_fold(&self.root, |value, key| value.get(key)).filter(|value| !value.is_null())
    }

    fn error(&self, field: &str, expected: impl std::fmt::Display, got: impl std::fmt::Display, remedy: &str) -> Error {
        Error::Config {
            file: self.file.clone(),
            field: field.to_owned(),
            expected: expected.to_string(),
            got: got.to_string(),
            remedy: remedy.to_owned(),
        }
    }

    fn optional_count(&self, field: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64() {
            Some(count @ 1..=0xffff_ffff) => Ok(Some(count as usize)),
            _ => Err(self.error(field, "a positive integer", value, "check the checkpoint's conversion")),
        }
    }

    fn count(&self, field: &str) -> Result<usize> {
        self.optional_count(field)?.ok_or_else(|| {
            self.error(field, "a positive integer", "nothing", "the file is cut short or of another architecture")
        })
    }

    fn number(&self, field: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if number > 0.0 => Ok(Some(number)),
            _ => Err(self.error(field, "a positive number", value, "check the checkpoint's conversion")),
        }
    }

    fn flag(&self, field: &str) -> Result<bool> {
        let Some(value) = self.get(field) else { return Ok(false) };
        value.as_bool().ok_or_else(|| self.error(field, "true or false", value, "check the checkpoint's conversion"))
    }

    fn architecture(&self) -> Result<String> {
        let first = self.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
        first.map(str::to_owned).ok_or_else(|| {
            self.error(
                "architectures",
                "a list with the name of the model class",
                self.get("architectures").unwrap_or(&Value::Null),
                "is this a Hugging Face checkpoint folder?",
            )
        })
    }

    /// `dtype` (transformers 5) or `torch_dtype`; bf16 if neither stands there.
    fn dtype(&self) -> Result<DType> {
        let (field, value) = match (self.get("dtype"), self.get("torch_dtype")) {
            (Some(value), _) => ("dtype", value),
            (None, Some(value)) => ("torch_dtype", value),
            (None, None) => return Ok(DType::Bf16),
        };
        match value.as_str() {
            Some("bfloat16") => Ok(DType::Bf16),
            Some("float16") => Ok(DType::F16),
            Some("float32") => Ok(DType::F32),
            _ => Err(self.error(
                field,
                "\"bfloat16\", \"float16\" or \"float32\"",
                value,
                "quantised checkpoints are not supported",
            )),
        }
    }

    /// `rope_parameters.rope_theta` (transformers 5) or `rope_theta`; scaled variants are refused.
    fn rope_theta(&self) -> Result<f64> {
        for field in ["rope_parameters.rope_type", "rope_scaling.rope_type", "rope_scaling.type"] {
            if let Some(kind) = self.get(field)
                && kind.as_str() != Some("default")
            {
                return Err(self.error(field, "\"default\"", kind, "scaled rotary embeddings are not implemented"));
            }
        }
        for field in ["rope_parameters.rope_theta", "rope_theta"] {
            if let Some(theta) = self.number(field)? {
                return Ok(theta);
            }
        }
        Err(self.error(
            "rope_theta",
            "a positive number",
            "nothing",
            "add `rope_theta` or `rope_parameters.rope_theta`",
        ))
    }

    /// A token id or a list of them; none if the field is absent.
    fn token_ids(&self, field: &str) -> Result<Vec<u32>> {
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        list.iter()
            .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| self.error(field, "a token id or a list of token ids", value, "check the checkpoint"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(root: Value) -> Fields {
        Fields { file: PathBuf::from("config.json"), root }
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
        ModelConfig::parse(&fields(root), None)
    }

    #[test]
    fn both_spellings_of_rope_theta_are_read() {
        assert_eq!(with(&json!({})).expect("config").rope_theta, 1e6);
        let five =
            with(&json!({"rope_theta": null, "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}}));
        assert_eq!(five.expect("config").rope_theta, 5000.0);
    }

    #[test]
    fn head_dim_is_explicit_or_derived() {
        assert_eq!(with(&json!({})).expect("config").head_dim, 64);
        assert_eq!(with(&json!({"head_dim": 128})).expect("config").head_dim, 128);
    }

    #[test]
    fn eos_ids_of_both_files_are_merged() {
        let generation = fields(json!({"eos_token_id": [9, 7]}));
        let config = ModelConfig::parse(&fields(qwen3()), Some(&generation)).expect("config");
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
            ("head_dim", json!(96)),
            ("num_key_value_heads", json!(3)),
            ("hidden_act", json!("gelu")),
            ("attention_bias", json!(true)),
            ("rope_scaling", json!({"rope_type": "yarn"})),
            ("layer_types", json!(["sliding_attention"])),
            ("vocab_size", json!(-1)),
            ("hidden_size", Value::Null),
            ("torch_dtype", json!("int8")),
            ("eos_token_id", json!("two")),
            ("architectures", json!([])),
        ] {
            let error = with(&json!({field: value})).expect_err(field).to_string();
            assert!(error.contains(field), "{error}");
        }
    }

    /// The parameters of a dense Qwen3, tied ones counted once.
    fn num_parameters(config: &ModelConfig) -> usize {
        let (hidden, head_dim) = (config.hidden_size, config.head_dim);
        let q_width = config.num_attention_heads * head_dim;
        let kv_width = config.num_key_value_heads * head_dim;
        let attention = hidden * (q_width + 2 * kv_width) + q_width * hidden + 2 * head_dim;
        let layer = attention + 3 * hidden * config.intermediate_size + 2 * hidden;
        let tables = if config.tie_word_embeddings { 1 } else { 2 };
        config.num_hidden_layers * layer + hidden + tables * config.vocab_size * hidden
    }

    #[test]
    fn the_geometries_have_the_published_numbers_of_parameters() {
        // As the model cards say, in billions, and exactly.
        for (name, billions, parameters) in [
            ("qwen3-0.6b", "0.6", 596_049_920),
            ("qwen3-1.7b", "1.7", 1_720_574_976),
            ("qwen3-8b", "8.2", 8_190_735_360),
            ("qwen3-32b", "32.8", 32_762_123_264),
        ] {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/geometries").join(name);
            let config = ModelConfig::load(&dir).expect(name);
            assert_eq!(num_parameters(&config), parameters, "{name}");
            assert_eq!(format!("{:.1}", parameters as f64 / 1e9), billions, "{name}");
            assert_eq!((config.vocab_size, config.rope_theta, config.eos_token_ids), (151_936, 1e6, vec![151_645]));
        }
        let tiny = crate::testing::tiny_qwen3();
        let header = std::fs::read(tiny.join("model.safetensors")).expect("the tiny checkpoint");
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&header).expect("a header");
        let stored: usize = metadata.tensors().values().map(|info| info.shape.iter().product::<usize>()).sum();
        assert_eq!(num_parameters(&ModelConfig::load(&tiny).expect("config")), stored);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = ModelConfig::load(Path::new("/nonexistent")).expect_err("no such folder");
        assert!(error.to_string().starts_with("/nonexistent/config.json: "), "{error}");
    }
}
