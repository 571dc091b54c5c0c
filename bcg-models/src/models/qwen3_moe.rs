//! Qwen3-MoE: Qwen3 with mixtures of experts in place of MLPs.

use super::qwen3;
use crate::Result;
use crate::config::{DenseLayers, ModelConfig};
use crate::layers::{Decoder, Heads, Mixer, Mlp, Moe, MoeConfig};
use crate::state::CacheLayout;
use crate::weights::{Divided, Experts, Weights};

/// Keys and values of every layer.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) for what the layers cannot honour.
pub fn cache_layout(config: &ModelConfig) -> Result<CacheLayout> {
    MoeConfig::read(config)?;
    DenseLayers::read(&config.fields)?;
    qwen3::cache_layout(config)
}

/// What the ranks divide.
///
/// # Errors
/// Those of [`cache_layout`].
pub fn divided(config: &ModelConfig, experts: Experts) -> Result<Vec<Divided>> {
    let mut divided = Vec::from(Heads::read(config)?.divided());
    divided.extend(MoeConfig::read(config)?.divided(experts));
    let dense = DenseLayers::read(&config.fields)?;
    if (0..config.fields.count("num_hidden_layers")?).any(|layer| dense.has(layer)) {
        divided.push(Divided::new("intermediate_size", Mlp::read_width(&config.fields)?));
    }
    Ok(divided)
}

/// Takes the model's weights.
///
/// # Errors
/// Those of [`Weights::take`].
pub fn load(config: &ModelConfig, weights: &mut Weights<'_>) -> Result<Decoder> {
    let dense = DenseLayers::read(&config.fields)?;
    qwen3::load_with(config, weights, |weights, layer, name| match dense.has(layer) {
        true => Mlp::load(weights, name, config).map(Mixer::Mlp),
        false => Moe::load(weights, name, config).map(|moe| Mixer::Moe(Box::new(moe))),
    })
}
