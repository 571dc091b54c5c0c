//! Architecture name to model: one line for each.

use std::fmt::Debug;
use std::sync::Arc;

use bcg_runtime::{Context, OpStream, Tensor};

use crate::batch::{ForwardBatch, TokenInputs};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::models::{deepseek, nemotron_h, qwen3, qwen3_moe};
use crate::state::{CacheLayout, Caches};
use crate::weights::Weights;

/// A language model, loaded.
pub trait Model: Debug + Send + Sync {
    /// Runs the layers over the batch's rows and returns the last hidden states: `[T, C]`, or `[Bmax, C]` where the
    /// model ends the rows that nobody wants after the last layer that mixes rows, with [`TokenInputs::keep_wanted`].
    /// This is what is captured.
    ///
    /// # Errors
    /// Those of the ops and breaks.
    fn forward(
        &self,
        cx: &mut Context<'_, ForwardBatch>,
        inputs: &TokenInputs,
        caches: &Caches,
    ) -> bcg_runtime::Result<Tensor>;

    /// Turns hidden states `[B, C]` into logits `[B, V]` in f32. Runs after the captured part, on the last rows only.
    ///
    /// # Errors
    /// Those of the ops.
    fn logits(&self, cx: &mut OpStream, hidden: &Tensor) -> bcg_runtime::Result<Tensor>;
}

/// An architecture as `config.json` names it, what a sequence keeps between steps, and the loader.
type Family = (&'static str, fn(&ModelConfig) -> Result<CacheLayout>, Loader);
type Loader = fn(&ModelConfig, &mut Weights<'_>) -> Result<Arc<dyn Model>>;

/// The supported architectures.
const MODELS: &[Family] = &[
    ("Qwen3ForCausalLM", qwen3::cache_layout, |c, w| Ok(Arc::new(qwen3::load(c, w)?))),
    ("Qwen3MoeForCausalLM", qwen3_moe::cache_layout, |c, w| Ok(Arc::new(qwen3_moe::load(c, w)?))),
    ("NemotronHForCausalLM", nemotron_h::cache_layout, |c, w| Ok(Arc::new(nemotron_h::load(c, w)?))),
    ("DeepseekV3ForCausalLM", deepseek::cache_layout, |c, w| Ok(Arc::new(deepseek::load(c, w)?))),
    ("DeepseekV2ForCausalLM", deepseek::cache_layout, |c, w| Ok(Arc::new(deepseek::load(c, w)?))),
];

/// The names of the supported architectures.
pub fn supported() -> Vec<&'static str> {
    MODELS.iter().map(|(name, ..)| *name).collect()
}

/// Loads the model that `config` names, and refuses weights that it leaves over.
///
/// # Errors
/// [`Error::Architecture`]; those of [`Weights`].
pub fn load(config: &ModelConfig, mut weights: Weights<'_>) -> Result<Arc<dyn Model>> {
    let (_, _, load) = family(&config.architecture)?;
    let model = load(config, &mut weights)?;
    weights.finish()?;
    Ok(model)
}

/// Checks that an architecture is supported.
///
/// # Errors
/// [`Error::Architecture`], which lists those that are.
pub fn check(architecture: &str) -> Result<()> {
    family(architecture).map(|_| ())
}

/// What a sequence of the model that `config` names keeps between steps.
///
/// # Errors
/// [`Error::Architecture`]; [`Error::Config`] for a field that is absent or that the family cannot honour.
pub fn cache_layout(config: &ModelConfig) -> Result<CacheLayout> {
    family(&config.architecture)?.1(config)
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
