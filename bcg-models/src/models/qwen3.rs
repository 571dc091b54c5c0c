//! Qwen3, dense: grouped-query attention with query and key norms, and a gated MLP.

use bcg_runtime::{Context, OpStream, Result, Tensor};

use crate::batch::{ForwardBatch, TokenInputs};
use crate::config::ModelConfig;
use crate::layers::{Attention, FeedForward, Heads, Linear, Mlp, RmsNorm, Rotary, rope_theta};
use crate::ops;
use crate::registry::Model;
use crate::state::{CacheLayout, Caches, LayerKv};
use crate::weights::Weights;

/// `Qwen3ForCausalLM`.
#[derive(Debug)]
pub struct Qwen3 {
    embed_tokens: Tensor,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    lm_head: Linear,
}

#[derive(Debug)]
struct DecoderLayer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: FeedForward,
}

impl Qwen3 {
    /// Keys and values of every layer.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for what the layers cannot honour.
    pub fn cache_layout(config: &ModelConfig) -> crate::Result<CacheLayout> {
        rope_theta(&config.fields)?;
        Mlp::read_width(&config.fields)?;
        Ok(Heads::read(config)?.cache_layout(config.fields.count("num_hidden_layers")?))
    }

    /// Takes the model's weights.
    ///
    /// # Errors
    /// Those of [`Weights::take`].
    pub fn load(config: &ModelConfig, weights: &mut Weights<'_>) -> crate::Result<Self> {
        let width = Mlp::read_width(&config.fields)?;
        Self::load_with(config, weights, |weights, _, name| {
            Ok(FeedForward::Mlp(Mlp::load(weights, name, config.hidden_size, width)?))
        })
    }

    /// Takes the weights of a model that differs in its MLPs: `load_mlp` takes that of a layer, under a name.
    pub(super) fn load_with(
        config: &ModelConfig,
        weights: &mut Weights<'_>,
        load_mlp: impl Fn(&mut Weights<'_>, usize, &str) -> crate::Result<FeedForward>,
    ) -> crate::Result<Self> {
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let rotary = Rotary::new(weights.device(), config, Heads::read(config)?.dim)?;
        let embed_tokens = weights.take("model.embed_tokens.weight", &[vocab, hidden])?;
        let layers = (0..config.fields.count("num_hidden_layers")?)
            .map(|layer| {
                let name = format!("model.layers.{layer}");
                let mlp = load_mlp(weights, layer, &format!("{name}.mlp"))?;
                DecoderLayer::load(config, weights, &name, &rotary, mlp)
            })
            .collect::<crate::Result<_>>()?;
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

impl Model for Qwen3 {
    fn forward(&self, cx: &mut Context<'_, ForwardBatch>, inputs: &TokenInputs, caches: &Caches) -> Result<Tensor> {
        let mut residual = ops::gather_rows(cx, &self.embed_tokens, &inputs.token_ids)?; // [T, C]
        let mut branch = None;
        let last = self.layers.len().saturating_sub(1);
        for (i, (layer, kv)) in self.layers.iter().zip(caches.kv.layers()).enumerate() {
            let out = layer.forward(cx, (branch, residual), inputs, kv, i == last)?;
            (branch, residual) = (Some(out.0), out.1);
        }
        Ok(self.norm.forward_branch(cx, branch, residual)?.0)
    }

    fn logits(&self, cx: &mut OpStream, hidden: &Tensor) -> Result<Tensor> {
        self.lm_head.forward_f32(cx, hidden)
    }
}

impl DecoderLayer {
    fn load(
        config: &ModelConfig,
        weights: &mut Weights<'_>,
        name: &str,
        rotary: &Rotary,
        mlp: FeedForward,
    ) -> crate::Result<Self> {
        let (hidden, eps) = (config.hidden_size, config.rms_norm_eps);
        Ok(Self {
            input_layernorm: RmsNorm::load(weights, &format!("{name}.input_layernorm"), hidden, eps)?,
            self_attn: Attention::load(weights, &format!("{name}.self_attn"), config, rotary)?,
            post_attention_layernorm: RmsNorm::load(weights, &format!("{name}.post_attention_layernorm"), hidden, eps)?,
            mlp,
        })
    }

    /// Takes the branch of the layer before and the residual stream, which it is added to; returns its own of both.
    fn forward(
        &self,
        cx: &mut Context<'_, ForwardBatch>,
        (branch, residual): (Option<Tensor>, Tensor),
        inputs: &TokenInputs,
        kv: &LayerKv,
        is_last: bool,
    ) -> Result<(Tensor, Tensor)> {
        let (x, residual) = self.input_layernorm.forward_branch(cx, branch, residual)?;
        let mut attended = self.self_attn.forward(cx, &x, inputs, kv)?;
        drop(x);
        let mut residual = residual;
        if is_last {
            // No row looks at another one from here on: those that nobody wants end.
            (attended, residual) = (inputs.keep_wanted(cx, attended)?, inputs.keep_wanted(cx, residual)?);
        }
        let (x, residual) = self.post_attention_layernorm.forward_add(cx, &attended, &residual)?;
        drop(attended);
        Ok((self.mlp.forward(cx, &x, &inputs.num_valid)?, residual))
    }
}
