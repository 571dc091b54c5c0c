//! Nemotron-H: a stack of Mamba2 mixers, attention without positions, and MLPs, one of them in each layer.

use bcg_runtime::{Context, OpStream, Result, Tensor};
use serde_json::Value;

use crate::batch::{ForwardBatch, TokenInputs};
use crate::config::{Fields, ModelConfig};
use crate::layers::{Attention, Heads, Linear, Mamba2, Mamba2Config, Relu2Mlp, RmsNorm};
use crate::ops;
use crate::registry::Model;
use crate::state::{CacheLayout, Caches};
use crate::weights::Weights;

/// `NemotronHForCausalLM`.
#[derive(Debug)]
pub struct NemotronH {
    embeddings: Tensor,
    layers: Vec<Layer>,
    norm_f: RmsNorm,
    lm_head: Linear,
}

#[derive(Debug)]
struct Layer {
    norm: RmsNorm,
    mixer: Mixer,
}

#[derive(Debug)]
enum Mixer {
    Mamba2(Mamba2),
    Attention(Box<Attention>),
    Mlp(Relu2Mlp),
}

/// What a layer mixes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Mamba2,
    Attention,
    Mlp,
}

impl Kind {
    /// Reads the kind of each layer: names in `layers_block_type` (transformers 5), or letters in
    /// `hybrid_override_pattern`.
    fn read_all(fields: &Fields) -> crate::Result<Vec<Self>> {
        let (field, names) = match (fields.get("layers_block_type"), fields.get("hybrid_override_pattern")) {
            (Some(Value::Array(names)), _) => ("layers_block_type", names.clone()),
            (None, Some(Value::String(pattern))) => {
                ("hybrid_override_pattern", pattern.chars().map(|letter| letter.to_string().into()).collect())
            }
            (value, pattern) => {
                let got = value.or(pattern).unwrap_or(&Value::Null);
                let remedy = "add `layers_block_type` or `hybrid_override_pattern`";
                return Err(fields.error("layers_block_type", "the kinds of the layers", got, remedy));
            }
        };
        let kinds: Vec<Self> = names.iter().map(|name| Self::of(fields, field, name)).collect::<crate::Result<_>>()?;
        match fields.optional_count("num_hidden_layers")? {
            Some(layers) if layers != kinds.len() => {
                let expected = format!("{}, as `{field}` has", kinds.len());
                Err(fields.error("num_hidden_layers", expected, layers, "check the checkpoint's conversion"))
            }
            _ => Ok(kinds),
        }
    }

    fn of(fields: &Fields, field: &str, name: &Value) -> crate::Result<Self> {
        match name.as_str() {
            Some("linear_attention" | "mamba" | "M") => Ok(Self::Mamba2),
            Some("full_attention" | "attention" | "*") => Ok(Self::Attention),
            Some("mlp" | "-") => Ok(Self::Mlp),
            Some("moe" | "E") => {
                let remedy = "mixtures of experts are not implemented in this family";
                Err(fields.error(field, "Mamba2, attention and MLP layers", name, remedy))
            }
            _ => Err(fields.error(field, "Mamba2, attention and MLP layers", name, "no other kind is implemented")),
        }
    }
}

impl NemotronH {
    /// Keys and values of the attention layers, states of the Mamba2 layers.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for what the layers cannot honour.
    pub fn cache_layout(config: &ModelConfig) -> crate::Result<CacheLayout> {
        let fields = &config.fields;
        fields.refuse_flag("residual_in_fp32", "the residual stream has the dtype of the weights")?;
        if let Some(window) = fields.get("sliding_window") {
            let remedy = "sliding-window attention is not implemented";
            return Err(fields.error("sliding_window", "nothing", window, remedy));
        }
        Relu2Mlp::read_width(fields)?;
        let kinds = Kind::read_all(fields)?;
        let count = |kind| kinds.iter().filter(|other| **other == kind).count();
        let states = Mamba2Config::read(fields)?.state_layout(count(Kind::Mamba2));
        Ok(CacheLayout { states: Some(states), ..Heads::read(config)?.cache_layout(count(Kind::Attention)) })
    }

    /// Takes the model's weights.
    ///
    /// # Errors
    /// Those of [`Weights::take`].
    pub fn load(config: &ModelConfig, weights: &mut Weights<'_>) -> crate::Result<Self> {
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embeddings = weights.take("backbone.embeddings.weight", &[vocab, hidden])?;
        let layers = Kind::read_all(&config.fields)?
            .into_iter()
            .enumerate()
            .map(|(layer, kind)| Layer::load(config, weights, &format!("backbone.layers.{layer}"), kind))
            .collect::<crate::Result<_>>()?;
        let norm_f = RmsNorm::load(weights, "backbone.norm_f", hidden, config.rms_norm_eps)?;
        // transformers ties nothing in this family, whatever the flag says: a head of its own counts.
        let lm_head = if config.tie_word_embeddings && !weights.has("lm_head.weight") {
            Linear { weight: embeddings.clone() }
        } else {
            Linear::load(weights, "lm_head", vocab, hidden)?
        };
        Ok(Self { embeddings, layers, norm_f, lm_head })
    }
}

impl Layer {
    fn load(config: &ModelConfig, weights: &mut Weights<'_>, name: &str, kind: Kind) -> crate::Result<Self> {
        let (hidden, mixer) = (config.hidden_size, format!("{name}.mixer"));
        Ok(Self {
            norm: RmsNorm::load(weights, &format!("{name}.norm"), hidden, config.rms_norm_eps)?,
            mixer: match kind {
                Kind::Mamba2 => Mixer::Mamba2(Mamba2::load(weights, &mixer, config)?),
                Kind::Attention => Mixer::Attention(Box::new(Attention::load_plain(weights, &mixer, config)?)),
                Kind::Mlp => {
                    let inner = Relu2Mlp::read_width(&config.fields)?;
                    Mixer::Mlp(Relu2Mlp::load(weights, &mixer, hidden, inner)?)
                }
            },
        })
    }
}

impl Model for NemotronH {
    fn forward(&self, cx: &mut Context<'_, ForwardBatch>, inputs: &TokenInputs, caches: &Caches) -> Result<Tensor> {
        let (mut kvs, mut states) = (caches.kv.layers().iter(), caches.states.layers().iter());
        let mut residual = ops::gather_rows(cx, &self.embeddings, &inputs.token_ids)?; // [T, C]
        let mut branch: Option<Tensor> = None;
        for layer in &self.layers {
            let (x, sum) = layer.norm.forward_branch(cx, branch.take(), residual)?;
            residual = sum;
            branch = Some(match &layer.mixer {
                Mixer::Mamba2(mixer) => {
                    mixer.forward(cx, &x, inputs, states.next().expect("a state for each Mamba2 layer"))?
                }
                Mixer::Attention(attention) => {
                    attention.forward(cx, &x, inputs, kvs.next().expect("a cache for each attention layer"))?
                }
                Mixer::Mlp(mlp) => mlp.forward(cx, &x)?,
            });
        }
        Ok(self.norm_f.forward_branch(cx, branch, residual)?.0)
    }

    fn logits(&self, cx: &mut OpStream, hidden: &Tensor) -> Result<Tensor> {
        self.lm_head.forward_f32(cx, hidden)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::StateLayout;
    use bcg_runtime::DType;
    use serde_json::json;
    use std::path::Path;

    fn kinds(root: Value) -> crate::Result<Vec<Kind>> {
        Kind::read_all(&Fields::new("config.json", root))
    }

    #[test]
    fn both_spellings_of_the_layers_are_read() {
        let expected = [Kind::Mamba2, Kind::Mlp, Kind::Attention];
        let five = json!(["linear_attention", "mlp", "full_attention"]);
        assert_eq!(kinds(json!({"layers_block_type": five})).expect("names"), expected);
        assert_eq!(kinds(json!({"layers_block_type": ["mamba", "mlp", "attention"]})).expect("names"), expected);
        assert_eq!(
            kinds(json!({"hybrid_override_pattern": "M-*", "num_hidden_layers": 3})).expect("letters"),
            expected
        );
    }

    #[test]
    fn other_layers_are_refused_by_name() {
        for (root, says) in [
            (json!({"layers_block_type": ["mlp", "moe"]}), "got \"moe\"; mixtures of experts are not implemented"),
            (json!({"hybrid_override_pattern": "ME"}), "got \"E\"; mixtures of experts are not implemented"),
            (json!({"layers_block_type": ["conv"]}), "got \"conv\"; no other kind"),
            (json!({"hybrid_override_pattern": "M-", "num_hidden_layers": 3}), "`num_hidden_layers`: expected 2"),
            (json!({}), "add `layers_block_type` or `hybrid_override_pattern`"),
        ] {
            let error = kinds(root).expect_err(says).to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    /// The parameters of a configuration with a head of its own.
    fn num_parameters(config: &ModelConfig) -> usize {
        let (hidden, inner) = (config.hidden_size, Relu2Mlp::read_width(&config.fields).expect("a width"));
        let (heads, mixer) =
            (Heads::read(config).expect("heads"), Mamba2Config::read(&config.fields).expect("a mixer"));
        let StateLayout { conv: [channels, past], ssm: [ssm_heads, head_dim, _], .. } = mixer.state_layout(1);
        let width = ssm_heads * head_dim;
        let of_layer = |kind: &Kind| match kind {
            Kind::Mamba2 => (2 * width + channels + ssm_heads) * hidden + channels * (past + 2) + 3 * ssm_heads + width,
            Kind::Attention => 2 * hidden * (heads.q + heads.kv) * heads.dim,
            Kind::Mlp => 2 * hidden * inner,
        };
        let layers: usize =
            Kind::read_all(&config.fields).expect("kinds").iter().map(|kind| hidden + of_layer(kind)).sum();
        layers + hidden + 2 * config.vocab_size * hidden
    }

    #[test]
    fn the_geometry_has_the_published_number_of_parameters() {
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models");
        let config = ModelConfig::load(&models.join("geometries/nemotron-h-8b")).expect("config");
        assert_eq!(num_parameters(&config), 8_100_852_736);
        let ssm_dtype = DType::F32;
        let states = StateLayout { layers: 24, conv: [10_240, 3], ssm: [128, 64, 128], ssm_dtype };
        let layout = CacheLayout { kv_layers: 4, k: [8, 128], v: [8, 128], q_heads: 32, states: Some(states) };
        assert_eq!(config.cache_layout().expect("a layout"), layout);
        let tiny = models.join("tiny-nemotron-h");
        let header = std::fs::read(tiny.join("model.safetensors")).expect("the tiny checkpoint");
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&header).expect("a header");
        let stored: usize = metadata.tensors().values().map(|info| info.shape.iter().product::<usize>()).sum();
        assert_eq!(num_parameters(&ModelConfig::load(&tiny).expect("config")), stored);
    }
}
