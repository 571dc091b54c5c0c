//! Architecture name to model: one line for each.

use std::fmt::Debug;
use std::sync::Arc;

use bcg_runtime::{Context, Device, Freeze, HostOptions, OpStream, Tensor};

use crate::batch::{ForwardBatch, TokenInputs};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::models::{deepseek, nemotron_h, qwen3, qwen3_moe};
use crate::state::{CacheLayout, CachedLayers, Caches};
use crate::weights::{self, Divided, Experts, Shard, Weights};

/// What the forward of a model leaves, or that of a stage of a pipeline.
#[derive(Debug, Clone, Freeze)]
pub struct StageOutput {
    /// Of the last stage, the last hidden states: `[T, C]`, or `[Bmax, C]` where the model ends the rows that nobody wants
    /// after the last layer that mixes rows, with [`TokenInputs::keep_wanted`]. Every rank of several has the same ones, bit
    /// for bit. Of another stage, the branch of its last sublayer, `[T, C]`, of which each rank has its part of the sum.
    pub hidden: Tensor,
    /// The residual stream, `[T, C]`, of a stage that is not the last.
    pub residual: Option<Tensor>,
}

/// A language model, or a stage of one, loaded.
pub trait Model: Debug + Send + Sync {
    /// Runs the layers over the batch's rows. This is what is captured.
    ///
    /// # Errors
    /// Those of the ops and breaks.
    fn forward(
        &self,
        cx: &mut Context<'_, ForwardBatch>,
        inputs: &TokenInputs,
        caches: &Caches,
    ) -> bcg_runtime::Result<StageOutput>;

    /// Turns hidden states `[B, C]` into logits `[B, V]` in f32. Runs after the captured part, on the last rows only. Every
    /// rank of several gets the logits of all tokens.
    ///
    /// # Errors
    /// Those of the ops.
    fn logits(&self, cx: &mut OpStream, hidden: &Tensor) -> bcg_runtime::Result<Tensor>;

    /// How many of its layers keep something between steps.
    fn num_cached_layers(&self) -> CachedLayers;
}

/// An architecture as `config.json` names it, what a sequence keeps between steps, the counts that ranks divide beside
/// the vocabulary, and the loader.
type Family = (&'static str, fn(&ModelConfig) -> Result<CacheLayout>, Counts, Loader);
type Counts = fn(&ModelConfig, Experts) -> Result<Vec<Divided>>;
type Loader = fn(&ModelConfig, &mut Weights<'_>) -> Result<Arc<dyn Model>>;

/// The supported architectures.
const MODELS: &[Family] = &[
    ("Qwen3ForCausalLM", qwen3::cache_layout, qwen3::divided, |c, w| Ok(Arc::new(qwen3::load(c, w)?))),
    ("Qwen3MoeForCausalLM", qwen3_moe::cache_layout, qwen3_moe::divided, |c, w| Ok(Arc::new(qwen3_moe::load(c, w)?))),
    ("NemotronHForCausalLM", nemotron_h::cache_layout, nemotron_h::divided, |c, w| {
        Ok(Arc::new(nemotron_h::load(c, w)?))
    }),
    ("DeepseekV3ForCausalLM", deepseek::cache_layout, deepseek::divided, |c, w| Ok(Arc::new(deepseek::load(c, w)?))),
    ("DeepseekV2ForCausalLM", deepseek::cache_layout, deepseek::divided, |c, w| Ok(Arc::new(deepseek::load(c, w)?))),
];

/// The names of the supported architectures.
pub fn supported() -> Vec<&'static str> {
    MODELS.iter().map(|(name, ..)| *name).collect()
}

/// Loads the share of the model that `config` names, and refuses weights that it leaves over.
///
/// # Errors
/// [`Error::Architecture`]; those of [`check_shard`]; those of [`Weights`].
pub fn load(config: &ModelConfig, mut weights: Weights<'_>) -> Result<Arc<dyn Model>> {
    let (.., load) = family(&config.architecture)?;
    let Shard { num_ranks, experts, .. } = weights.shard();
    check_shard(config, num_ranks, experts)?;
    let model = load(config, &mut weights)?;
    weights.finish()?;
    Ok(model)
}

/// The bytes of the weights of each layer of the model that `config` names, undivided; those of the embedding table count
/// to the first layer, those of the final norm and the LM head to the last one.
///
/// # Errors
/// As [`load`].
pub fn layer_bytes(config: &ModelConfig) -> Result<Vec<usize>> {
    // Nothing is read or written: memory of a host device that nobody touches is none.
    let mut options = HostOptions::default();
    options.memory_bytes = usize::MAX >> 1;
    let device = Device::host_with(options);
    let mut weights = Weights::unfilled(&device, config.dtype, Shard::WHOLE);
    (family(&config.architecture)?.3)(config, &mut weights)?;
    Ok(weights.layer_bytes())
}

/// Checks that an architecture is supported.
///
/// # Errors
/// [`Error::Architecture`], which lists those that are.
pub fn check(architecture: &str) -> Result<()> {
    family(architecture).map(|_| ())
}

/// What one rank keeps of a sequence of the model that `config` names, between steps.
///
/// With W ranks, Hkv key-value heads of D dimensions and Hq query heads, a rank keeps of each layer and token
/// `max(Hkv / W, 1)` key and as many value heads, which `Hq / W` query heads read. Latents are not divided. Of the
/// state-space layers it keeps `channels / W` channels of the convolution and the states of `H / W` heads.
///
/// # Errors
/// [`Error::Architecture`]; [`Error::Config`] for a field that is absent or that the family cannot honour; those of
/// [`check_shard`].
pub fn cache_layout(config: &ModelConfig, shard: Shard) -> Result<CacheLayout> {
    let mut layout = family(&config.architecture)?.1(config)?;
    check_shard(config, shard.num_ranks, shard.experts)?;
    for heads in [&mut layout.k[0], &mut layout.v[0], &mut layout.q_heads] {
        *heads = shard.share(*heads);
    }
    if let Some(states) = &mut layout.states {
        (states.conv[0], states.ssm[0]) = (shard.share(states.conv[0]), shard.share(states.ssm[0]));
    }
    Ok(layout)
}

/// Checks that `num_ranks` ranks can divide the model that `config` names, its experts as `experts` says. Any equal shares
/// will do: where they are no multiples of 8, products run on the slower of their kernels.
///
/// # Errors
/// [`Error::Architecture`]; [`Error::Config`] names the first field whose count the ranks cannot divide, and the numbers
/// of ranks that work, or the architecture if it has no experts to give out.
pub fn check_shard(config: &ModelConfig, num_ranks: usize, experts: Experts) -> Result<()> {
    let mut divided = family(&config.architecture)?.2(config, experts)?;
    divided.push(Divided::new("vocab_size", config.vocab_size));
    weights::check_shard(config, &divided, num_ranks)
}

fn family(architecture: &str) -> Result<&'static Family> {
    MODELS
        .iter()
        .find(|(name, ..)| *name == architecture)
        .ok_or_else(|| Error::Architecture { got: architecture.to_owned(), supported: supported() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_architecture_is_refused_with_the_supported_ones() {
        check("Qwen3ForCausalLM").expect("supported");
        let error = check("GptForCausalLM").expect_err("unsupported").to_string();
        let expected = format!("architecture `GptForCausalLM` is not supported; supported: {}", supported().join(", "));
        assert_eq!(error, expected);
    }
}
