//! The stack that all models share: embedding table, sublayers along a residual stream, final norm, LM head.
//!
//! A sublayer reads the stream normalised. What it returns, its branch, is added to the stream by the next norm, in the
//! same kernel, which also adds up the partial sums that the branches of several ranks are. So every rank has the same
//! stream. Embedding table and LM head are divided by the vocabulary; the logits of all tokens come to every rank. Rows no longer look at each other after the last sublayer that mixes them: rows whose hidden states
//! nobody wants end there.

use bcg_kernels as ops;
use bcg_runtime::{Context, Error, OpStream, Result, Tensor};

use super::{Attention, Linear, Mamba2, Mla, Mlp, Moe, Relu2Mlp, RmsNorm};
use crate::batch::{ForwardBatch, TokenInputs};
use crate::config::ModelConfig;
use crate::registry::Model;
use crate::state::Caches;
use crate::weights::{Shard, Weights};

/// A decoder: from token ids to hidden states, and from these to logits.
#[derive(Debug)]
pub struct Decoder {
    /// A row for each token of this rank's share of the vocabulary.
    embed_tokens: Tensor,
    first_token: usize,
    sublayers: Vec<Sublayer>,
    norm: RmsNorm,
    lm_head: Linear,
    shard: Shard,
}

/// A norm, and what reads the normalised stream. Most families have two in each layer: attention, then a feed-forward.
#[derive(Debug)]
pub struct Sublayer {
    /// Adds the branch of the sublayer before to the stream, and normalises the sum.
    pub norm: RmsNorm,
    /// Turns the normalised stream into a branch.
    pub mixer: Mixer,
}

/// What a sublayer mixes: rows of a sequence with each other, or the channels of each row.
#[derive(Debug)]
pub enum Mixer {
    /// Attention over keys and values. Mixes rows.
    Attention(Box<Attention>),
    /// Attention over latents. Mixes rows.
    Mla(Box<Mla>),
    /// A state-space recurrence. Mixes rows.
    Mamba2(Mamba2),
    /// A gated MLP.
    Mlp(Mlp),
    /// An MLP with a squared ReLU.
    Relu2Mlp(Relu2Mlp),
    /// A mixture of experts.
    Moe(Box<Moe>),
}

impl Mixer {
    fn mixes_rows(&self) -> bool {
        match self {
            Self::Attention(_) | Self::Mla(_) | Self::Mamba2(_) => true,
            Self::Mlp(_) | Self::Relu2Mlp(_) | Self::Moe(_) => false,
        }
    }
}

impl Sublayer {
    /// Takes the norm `name`, of the model's width, and joins it with `mixer`.
    ///
    /// # Errors
    /// Those of [`Weights::take`].
    pub fn load(weights: &mut Weights<'_>, name: &str, config: &ModelConfig, mixer: Mixer) -> crate::Result<Self> {
        Ok(Self { norm: RmsNorm::load(weights, name, config.hidden_size, config.rms_norm_eps)?, mixer })
    }
}

impl Decoder {
    /// Takes a model whose layers `model.layers.{i}` have attention and a feed-forward each, with the usual two norms.
    /// `load_mixers` takes both of a layer, given its number and its name.
    ///
    /// # Errors
    /// Those of `load_mixers` and of [`Weights::take`].
    pub fn load_paired(
        config: &ModelConfig,
        weights: &mut Weights<'_>,
        load_mixers: impl Fn(&mut Weights<'_>, usize, &str) -> crate::Result<[Mixer; 2]>,
    ) -> crate::Result<Self> {
        let num_layers = config.fields.count("num_hidden_layers")?;
        Self::load(config, weights, ["model.embed_tokens", "model.norm"], config.tie_word_embeddings, |weights| {
            let mut sublayers = Vec::with_capacity(2 * num_layers);
            for layer in 0..num_layers {
                let name = format!("model.layers.{layer}");
                let [attention, feed_forward] = load_mixers(weights, layer, &name)?;
                for (norm, mixer) in [("input_layernorm", attention), ("post_attention_layernorm", feed_forward)] {
                    sublayers.push(Sublayer::load(weights, &format!("{name}.{norm}"), config, mixer)?);
                }
            }
            Ok(sublayers)
        })
    }

    /// Takes the embedding table and the final norm, under these names, the sublayers, and `lm_head`. Where `is_tied`,
    /// the embedding table is the LM head.
    ///
    /// # Errors
    /// Those of `load_sublayers` and of [`Weights::take`].
    pub fn load(
        config: &ModelConfig,
        weights: &mut Weights<'_>,
        [embed_tokens, norm]: [&str; 2],
        is_tied: bool,
        load_sublayers: impl FnOnce(&mut Weights<'_>) -> crate::Result<Vec<Sublayer>>,
    ) -> crate::Result<Self> {
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embed_tokens = Linear::column(weights, embed_tokens, vocab, hidden)?;
        let sublayers = load_sublayers(weights)?;
        let norm = RmsNorm::load(weights, norm, hidden, config.rms_norm_eps)?;
        let lm_head = if is_tied {
            weights.skip("lm_head.weight"); // some checkpoints repeat the table
            embed_tokens.clone()
        } else {
            Linear::column(weights, "lm_head", vocab, hidden)?
        };
        let shard = weights.shard();
        let first_token = shard.range(vocab).start;
        Ok(Self { embed_tokens: embed_tokens.weight, first_token, sublayers, norm, lm_head, shard })
    }

    /// Refuses to run on another rank than the one that the weights are of.
    fn check_rank(&self, cx: &OpStream) -> Result<()> {
        let Shard { rank, num_ranks, .. } = self.shard;
        if (rank, num_ranks) == (cx.rank(), cx.world_size()) {
            return Ok(());
        }
        let runs = format!("it runs as rank {} of {}", cx.rank(), cx.world_size());
        Err(Error::other(format!("the model has the weights of rank {rank} of {num_ranks}, and {runs}; load its own")))
    }

    /// The embeddings of tokens, `[T, C]`. A rank has zeros for those that are not its own.
    fn embed(&self, cx: &mut OpStream, token_ids: &Tensor) -> Result<Tensor> {
        let own = ops::gather_rows_from(cx, &self.embed_tokens, self.first_token, token_ids)?;
        ops::all_reduce(cx, &own)
    }
}

impl Model for Decoder {
    fn forward(&self, cx: &mut Context<'_, ForwardBatch>, inputs: &TokenInputs, caches: &Caches) -> Result<Tensor> {
        let (mut kvs, mut states) = (caches.kv.layers().iter(), caches.states.layers().iter());
        let last_mixing = self.sublayers.iter().rposition(|sublayer| sublayer.mixer.mixes_rows());
        let mut num_valid = &inputs.num_valid;
        self.check_rank(cx)?;
        let mut residual = self.embed(cx, &inputs.token_ids)?; // [T, C]
        let mut branch: Option<Tensor> = None;
        for (index, Sublayer { norm, mixer }) in self.sublayers.iter().enumerate() {
            let (x, sum) = norm.forward_branch(cx, branch.take(), residual)?;
            residual = sum;
            let mut mixed = match mixer {
                Mixer::Attention(mixer) => mixer.forward(cx, &x, inputs, next(&mut kvs))?,
                Mixer::Mla(mixer) => mixer.forward(cx, &x, inputs, next(&mut kvs))?,
                Mixer::Mamba2(mixer) => mixer.forward(cx, &x, inputs, next(&mut states))?,
                Mixer::Mlp(mixer) => mixer.forward(cx, &x)?,
                Mixer::Relu2Mlp(mixer) => mixer.forward(cx, &x)?,
                Mixer::Moe(mixer) => mixer.forward(cx, &x, num_valid)?,
            };
            drop(x);
            if Some(index) == last_mixing {
                (mixed, residual) = (inputs.keep_wanted(cx, mixed)?, inputs.keep_wanted(cx, residual)?); // [Bmax, C]
                num_valid = inputs.num_wanted();
            }
            branch = Some(mixed);
        }
        Ok(self.norm.forward_branch(cx, branch, residual)?.0)
    }

    fn logits(&self, cx: &mut OpStream, hidden: &Tensor) -> Result<Tensor> {
        self.check_rank(cx)?;
        let own = self.lm_head.forward_f32(cx, hidden)?; // [B, V / W], of W ranks
        ops::all_gather_columns(cx, &own)
    }
}

/// What the next sublayer that keeps anything between steps keeps.
fn next<'a, T>(caches: &mut std::slice::Iter<'a, T>) -> &'a T {
    caches.next().expect("the layout counts the sublayers that keep something")
}
