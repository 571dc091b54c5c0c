//! Qwen3, dense: grouped-query attention with query and key norms, and a gated MLP.

use crate::Result;
use crate::config::ModelConfig;
use crate::layers::{Attention, Decoder, Heads, Mixer, Mlp, Rotary, rope_theta};
use crate::state::CacheLayout;
use crate::weights::{Divided, Experts, Weights};

/// Keys and values of every layer.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) for what the layers cannot honour.
pub fn cache_layout(config: &ModelConfig) -> Result<CacheLayout> {
    rope_theta(&config.fields)?;
    Mlp::read_width(&config.fields)?;
    Ok(Heads::read(config)?.cache_layout(config.fields.count("num_hidden_layers")?))
}

/// What the ranks divide.
///
/// # Errors
/// Those of [`cache_layout`] and of [`Experts::refuse_whole`].
pub fn divided(config: &ModelConfig, experts: Experts) -> Result<Vec<Divided>> {
    experts.refuse_whole(config)?;
    let [heads, kv_heads] = Heads::read(config)?.divided();
    Ok(vec![heads, kv_heads, Divided::new("intermediate_size", Mlp::read_width(&config.fields)?)])
}

/// Takes the model's weights.
///
/// # Errors
/// Those of [`Weights::take`].
pub fn load(config: &ModelConfig, weights: &mut Weights<'_>) -> Result<Decoder> {
    load_with(config, weights, |weights, _, name| Mlp::load(weights, name, config).map(Mixer::Mlp))
}

/// Takes the weights of a model that differs in its feed-forwards: `load_mlp` takes that of a layer, given the layer's
/// number and the feed-forward's name.
pub(super) fn load_with(
    config: &ModelConfig,
    weights: &mut Weights<'_>,
    load_mlp: impl Fn(&mut Weights<'_>, usize, &str) -> Result<Mixer>,
) -> Result<Decoder> {
    let rotary = Rotary::new(weights.device(), config, Heads::read(config)?.dim)?;
    Decoder::load_paired(config, weights, |weights, layer, name| {
        let attention = Attention::load(weights, &format!("{name}.self_attn"), config, &rotary)?;
        Ok([Mixer::Attention(Box::new(attention)), load_mlp(weights, layer, &format!("{name}.mlp"))?])
    })
}
