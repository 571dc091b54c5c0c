//! DeepSeek-V2 and DeepSeek-V3: latent attention, a few dense layers, then experts with shared ones.

use bcg_runtime::{CaptureStream, Context, Result, Tensor};

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
            return Err(fields.error("moe_layer_freq", 1, freq, "dense layers among those of experts are not implemented"));
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
        match branch {
            Some(branch) => Ok(self.norm.forward_add(cx, &branch, &residual)?.0),
            None => self.norm.forward(cx, &residual),
        }
    }

    fn logits(&self, cx: &mut CaptureStream, hidden: &Tensor) -> Result<Tensor> {
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
        let (x, residual) = match branch {
            Some(branch) => self.input_layernorm.forward_add(cx, &branch, &residual)?,
            None => (self.input_layernorm.forward(cx, &residual)?, residual),
        };
        let attended = self.self_attn.forward(cx, &x, inputs, kv)?;
        drop(x);
        let (x, residual) = self.post_attention_layernorm.forward_add(cx, &attended, &residual)?;
        drop(attended);
        Ok((self.mlp.forward(cx, &x, &inputs.num_valid)?, residual))
    }
}
