//! DeepSeek-V2 and DeepSeek-V3: latent attention, a few dense layers, then experts with shared ones.

use crate::Result;
use crate::config::ModelConfig;
use crate::layers::{Decoder, Mixer, Mla, MlaDims, MlaShared, Mlp, Moe, MoeConfig, RotaryScaling};
use crate::state::CacheLayout;
use crate::weights::{Divided, Experts, Weights};

/// Latents and rope keys of every layer.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) for what the layers cannot honour.
pub fn cache_layout(config: &ModelConfig) -> Result<CacheLayout> {
    let fields = &config.fields;
    if let Some(quantization) = fields.get("quantization_config") {
        let remedy = "convert the checkpoint to bfloat16, and remove the field";
        return Err(fields.error("quantization_config", "nothing", quantization, remedy));
    }
    if let Some(freq) = fields.optional_count("moe_layer_freq")?.filter(|freq| *freq != 1) {
        let remedy = "dense layers among those of experts are not implemented";
        return Err(fields.error("moe_layer_freq", 1, freq, remedy));
    }
    let dims = MlaDims::read(config)?;
    RotaryScaling::read(fields, dims.rope)?;
    Mlp::read_width(fields)?;
    MoeConfig::read(config)?;
    Ok(dims.cache_layout(fields.count("num_hidden_layers")?))
}

/// What the ranks divide.
///
/// # Errors
/// Those of [`cache_layout`].
pub fn divided(config: &ModelConfig, experts: Experts) -> Result<Vec<Divided>> {
    let mut divided = Vec::from(MlaDims::read(config)?.divided());
    divided.push(Divided::new("intermediate_size", Mlp::read_width(&config.fields)?));
    divided.extend(MoeConfig::read(config)?.divided(experts));
    Ok(divided)
}

/// Takes the model's weights. The layers after the last one, which predict further tokens, are left out.
///
/// # Errors
/// Those of [`Weights::take`].
pub fn load(config: &ModelConfig, weights: &mut Weights<'_>) -> Result<Decoder> {
    let fields = &config.fields;
    let (num_layers, num_dense) = (fields.count("num_hidden_layers")?, fields.optional_size("first_k_dense_replace")?);
    for layer in num_layers..num_layers + fields.optional_size("num_nextn_predict_layers")? {
        weights.skip_all(&format!("model.layers.{layer}."));
    }
    let shared = MlaShared::load(weights, config)?;
    Decoder::load_paired(config, weights, |weights, layer, name| {
        let attention = Mla::load(weights, &format!("{name}.self_attn"), config.hidden_size, &shared)?;
        let mlp = format!("{name}.mlp");
        let feed_forward = match layer < num_dense {
            true => Mixer::Mlp(Mlp::load(weights, &mlp, config)?),
            false => Mixer::Moe(Box::new(Moe::load(weights, &mlp, config)?)),
        };
        Ok([Mixer::Mla(Box::new(attention)), feed_forward])
    })
}
