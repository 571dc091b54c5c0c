//! DeepSeek-V2 and DeepSeek-V3: latent attention, a few dense layers, then experts with shared ones.

use bcg_runtime::{Context, OpStream, Result, Tensor};

use crate::batch::{ForwardBatch, TokenInputs};
use crate::config::ModelConfig;
use crate::layers::{FeedForward, Linear, Mla, MlaDims, MlaShared, Mlp, Moe, MoeConfig, RmsNorm, RotaryScaling};
use crate::ops;
use crate::registry::Model;
use crate::state::{CacheLayout, Caches, LayerKv};
use crate::weights::Weights;

/// `DeepseekV2ForCausalLM` and `DeepseekV3ForCausalLM`.
#[derive(Debug)]
pub struct Deepseek {
    embed_tokens: Tensor,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    lm_head: Linear,
}

#[derive(Debug)]
struct DecoderLayer {
    input_layernorm: RmsNorm,
    self_attn: Mla,
    post_attention_layernorm: RmsNorm,
    mlp: FeedForward,
}

impl Deepseek {
    /// Latents and rope keys of every layer.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for what the layers cannot honour.
    pub fn cache_layout(config: &ModelConfig) -> crate::Result<CacheLayout> {
        let fields = &config.fields;
        if let Some(quantization) = fields.get("quantization_config") {
            let remedy = "convert the checkpoint to bfloat16, and remove the field";
            return Err(fields.error("quantization_config", "nothing", quantization, remedy));
        }
        if let Some(freq) = fields.optional_count("moe_layer_freq")?.filter(|freq| *freq != 1) {
            return Err(fields.error(
                "moe_layer_freq",
                1,
                freq,
                "dense layers among those of experts are not implemented",
            ));
        }
        let dims = MlaDims::read(config)?;
        RotaryScaling::read(fields, dims.rope)?;
        Mlp::read_width(fields)?;
        MoeConfig::read(config)?;
        Ok(dims.cache_layout(fields.count("num_hidden_layers")?))
    }

    /// Takes the model's weights. Layers that predict further tokens, behind the last one, are left out.
    ///
    /// # Errors
    /// Those of [`Weights::take`].
    pub fn load(config: &ModelConfig, weights: &mut Weights<'_>) -> crate::Result<Self> {
        let (fields, vocab, hidden) = (&config.fields, config.vocab_size, config.hidden_size);
        let num_layers = fields.count("num_hidden_layers")?;
        let shared = MlaShared::load(weights, config)?;
        let embed_tokens = weights.take("model.embed_tokens.weight", &[vocab, hidden])?;
        let layers = (0..num_layers)
            .map(|layer| DecoderLayer::load(config, weights, layer, &shared))
            .collect::<crate::Result<_>>()?;
        for layer in num_layers..num_layers + fields.optional_size("num_nextn_predict_layers")? {
            weights.skip_all(&format!("model.layers.{layer}."));
        }
        let norm = RmsNorm::load(weights, "model.norm", hidden, config.rms_norm_eps)?;
        let lm_head = if config.tie_word_embeddings {
            weights.skip("lm_head.weight"); // some checkpoints repeat the table
            Linear { weight: embed_tokens.clone() }
        } else {
            Linear::load(weights, "lm_head", vocab, hidden)?
        };
        Ok(Self { embed_tokens, layers, norm, lm_head })
    }
}

impl Model for Deepseek {
    fn forward(&self, cx: &mut Context<'_, ForwardBatch>, inputs: &TokenInputs, caches: &Caches) -> Result<Tensor> {
        let mut residual = ops::gather_rows(cx, &self.embed_tokens, &inputs.token_ids)?; // [T, C]
        let mut branch = None;
        for (layer, kv) in self.layers.iter().zip(caches.kv.layers()) {
            let out = layer.forward(cx, branch, residual, inputs, kv)?;
            (branch, residual) = (Some(out.0), out.1);
        }
        Ok(self.norm.forward_branch(cx, branch, residual)?.0)
    }

    fn logits(&self, cx: &mut OpStream, hidden: &Tensor) -> Result<Tensor> {
        self.lm_head.forward_f32(cx, hidden)
    }
}

impl DecoderLayer {
    fn load(config: &ModelConfig, weights: &mut Weights<'_>, layer: usize, shared: &MlaShared) -> crate::Result<Self> {
        let (hidden, eps) = (config.hidden_size, config.rms_norm_eps);
        let name = format!("model.layers.{layer}");
        let mlp = format!("{name}.mlp");
        Ok(Self {
            input_layernorm: RmsNorm::load(weights, &format!("{name}.input_layernorm"), hidden, eps)?,
            self_attn: Mla::load(weights, &format!("{name}.self_attn"), hidden, shared)?,
            post_attention_layernorm: RmsNorm::load(weights, &format!("{name}.post_attention_layernorm"), hidden, eps)?,
            mlp: if layer < config.fields.optional_size("first_k_dense_replace")? {
                FeedForward::Mlp(Mlp::load(weights, &mlp, hidden, Mlp::read_width(&config.fields)?)?)
            } else {
                FeedForward::Moe(Box::new(Moe::load(weights, &mlp, config)?))
            },
        })
    }

    /// Takes the last layer's branch and the residual stream, which it is added to; returns its own of both.
    fn forward(
        &self,
        cx: &mut Context<'_, ForwardBatch>,
        branch: Option<Tensor>,
        residual: Tensor,
        inputs: &TokenInputs,
        kv: &LayerKv,
    ) -> Result<(Tensor, Tensor)> {
        let (x, residual) = self.input_layernorm.forward_branch(cx, branch, residual)?;
        let attended = self.self_attn.forward(cx, &x, inputs, kv)?;
        drop(x);
        let (x, residual) = self.post_attention_layernorm.forward_add(cx, &attended, &residual)?;
        drop(attended);
        Ok((self.mlp.forward(cx, &x, &inputs.num_valid)?, residual))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TempDir;
    use serde_json::{Value, json};
    use std::path::{Path, PathBuf};

    fn geometry(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../models").join(name)
    }

    /// The parameters of a model, tied ones counted once.
    fn num_parameters(config: &ModelConfig) -> usize {
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
    fn the_geometries_have_the_published_numbers() {
        for (name, parameters, layout, score_scale) in [
            // The model card says 15.7 billion; DeepSeek-V3 is cut to six layers.
            ("geometries/deepseek-v2-lite", 15_706_484_224, (27, 16), 1.2608f32.powi(2)),
            ("geometries/deepseek-v3-6-layers", 38_125_674_240, (6, 128), 1.368_89f32.powi(2)),
        ] {
            let config = ModelConfig::load(&geometry(name)).expect(name);
            assert_eq!(num_parameters(&config), parameters, "{name}");
            let got = Deepseek::cache_layout(&config).expect("a layout");
            let (kv_layers, q_heads) = layout;
            assert_eq!(got, CacheLayout { kv_layers, k: [1, 512], v: [1, 64], q_heads, states: None });
            let rotary = RotaryScaling::read(&config.fields, 64).expect("YaRN");
            assert!((rotary.score_scale - score_scale).abs() < 1e-4, "{name}: {}", rotary.score_scale);
        }
        let tiny = geometry("tiny-deepseek-v3");
        let header = std::fs::read(tiny.join("model.safetensors")).expect("the tiny checkpoint");
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&header).expect("a header");
        let stored: usize = metadata.tensors().values().map(|info| info.shape.iter().product::<usize>()).sum();
        assert_eq!(num_parameters(&ModelConfig::load(&tiny).expect("a configuration")), stored);
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        let read = std::fs::read(geometry("tiny-deepseek-v3/config.json")).expect("a configuration");
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
}
