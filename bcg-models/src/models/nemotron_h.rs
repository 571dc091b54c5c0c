//! Nemotron-H: a stack of Mamba2 mixers, attention without positions, and MLPs, one of them in each layer.

use crate::Result;
use crate::config::{LayerKind, ModelConfig};
use crate::layers::{Attention, Decoder, DecoderNames, Heads, Mamba2, Mamba2Config, Mixer, Relu2Mlp, Sublayer};
use crate::state::CacheLayout;
use crate::weights::{Divided, Experts, Weights};

/// Keys and values of the attention layers, states of the Mamba2 layers.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) for what the layers cannot honour.
pub fn cache_layout(config: &ModelConfig) -> Result<CacheLayout> {
    let fields = &config.fields;
    fields.refuse_flag("residual_in_fp32", "the residual stream has the dtype of the weights")?;
    if let Some(window) = fields.get("sliding_window") {
        return Err(fields.error("sliding_window", "nothing", window, "sliding-window attention is not implemented"));
    }
    Relu2Mlp::read_width(fields)?;
    let kinds = LayerKind::read_all(fields)?;
    let count = |kind| kinds.iter().filter(|other| **other == kind).count();
    let states = Mamba2Config::read(fields)?.state_layout(count(LayerKind::Mamba2));
    Ok(CacheLayout { states: Some(states), ..Heads::read(config)?.cache_layout(count(LayerKind::Attention)) })
}

/// What the ranks divide.
///
/// # Errors
/// Those of [`cache_layout`] and of [`Experts::refuse_whole`].
pub fn divided(config: &ModelConfig, experts: Experts) -> Result<Vec<Divided>> {
    experts.refuse_whole(config)?;
    let mut divided = Vec::from(Heads::read(config)?.divided());
    divided.extend(Mamba2Config::read(&config.fields)?.divided());
    divided.push(Divided::new("intermediate_size", Relu2Mlp::read_width(&config.fields)?));
    Ok(divided)
}

/// Takes the model's weights.
///
/// # Errors
/// Those of [`Weights::take`].
pub fn load(config: &ModelConfig, weights: &mut Weights<'_>) -> Result<Decoder> {
    // transformers ties nothing in this family, whatever the flag says: a head of its own counts.
    let is_tied = config.tie_word_embeddings && !weights.has("lm_head.weight");
    let names =
        DecoderNames { embed_tokens: "backbone.embeddings", layers: "backbone.layers", norm: "backbone.norm_f" };
    let kinds = LayerKind::read_all(&config.fields)?;
    Decoder::load(config, weights, names, is_tied, kinds.len(), |weights, layer, name| {
        Ok(vec![load_layer(config, weights, name, kinds[layer])?])
    })
}

fn load_layer(config: &ModelConfig, weights: &mut Weights<'_>, name: &str, kind: LayerKind) -> Result<Sublayer> {
    let mixer = format!("{name}.mixer");
    let mixer = match kind {
        LayerKind::Mamba2 => Mixer::Mamba2(Mamba2::load(weights, &mixer, config)?),
        LayerKind::Attention => Mixer::Attention(Box::new(Attention::load_plain(weights, &mixer, config)?)),
        LayerKind::Mlp => Mixer::Relu2Mlp(Relu2Mlp::load(weights, &mixer, config)?),
    };
    Sublayer::load(weights, &format!("{name}.norm"), config, mixer)
}
