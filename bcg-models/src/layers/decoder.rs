//! The stack that all models share: embedding table, sublayers along a residual stream, final norm, LM head.
//!
//! A sublayer reads the stream normalised. What it returns, its branch, is added to the stream by the next norm, in the
//! same kernel, which also adds up the partial sums that the branches of several ranks are. So every rank has the same
//! stream. Embedding table and LM head are divided by the vocabulary; the logits of all tokens come to every rank. Rows no
//! longer look at each other after the last sublayer that mixes them: rows whose hidden states nobody wants end there.
//!
//! A stage of a pipeline has a range of the layers. What it hands on is the branch of its last sublayer, of each rank its
//! part of the sum, and the stream: the first norm of the next stage goes on as it would in one stage, with the same bits.
//! All rows go on until the last stage.

use bcg_kernels as ops;
use bcg_runtime::{Context, Error, OpStream, Result, Tensor};

use super::{Attention, Linear, Mamba2, Mla, Mlp, Moe, Relu2Mlp, RmsNorm};
use crate::batch::{ForwardBatch, Received, TokenInputs};
use crate::config::ModelConfig;
use crate::registry::{Model, StageOutput};
use crate::state::{CachedLayers, Caches};
use crate::weights::{Shard, Weights};

/// A decoder: from token ids to hidden states, and from these to logits. A stage of a pipeline has some of its layers.
#[derive(Debug)]
pub struct Decoder {
    /// In the first stage.
    embedding: Option<Embedding>,
    sublayers: Vec<Sublayer>,
    /// In the last stage.
    head: Option<Head>,
    shard: Shard,
}

/// A row for each token of this rank's share of the vocabulary.
#[derive(Debug)]
struct Embedding {
    table: Tensor,
    first_token: usize,
}

/// What follows the last layer.
#[derive(Debug)]
struct Head {
    norm: RmsNorm,
    lm_head: Linear,
}

/// The names of a checkpoint's tensors outside of the layers, and of the layers.
#[derive(Debug, Clone, Copy)]
pub struct DecoderNames {
    /// The embedding table.
    pub embed_tokens: &'static str,
    /// Layer i is named `{layers}.{i}`.
    pub layers: &'static str,
    /// The final norm.
    pub norm: &'static str,
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
        let names = DecoderNames { embed_tokens: "model.embed_tokens", layers: "model.layers", norm: "model.norm" };
        Self::load(config, weights, names, config.tie_word_embeddings, num_layers, |weights, layer, name| {
            let [attention, feed_forward] = load_mixers(weights, layer, name)?;
            Ok(vec![
                Sublayer::load(weights, &format!("{name}.input_layernorm"), config, attention)?,
                Sublayer::load(weights, &format!("{name}.post_attention_layernorm"), config, feed_forward)?,
            ])
        })
    }

    /// Takes the embedding table, the layers, the final norm and `lm_head`, or those of them that [`Weights::layers`] has.
    /// `load_layer` takes the sublayers of a layer, given its number and its name. Where `is_tied`, the embedding table is
    /// the LM head.
    ///
    /// # Errors
    /// Those of `load_layer` and of [`Weights::take`].
    pub fn load(
        config: &ModelConfig,
        weights: &mut Weights<'_>,
        names: DecoderNames,
        is_tied: bool,
        num_layers: usize,
        load_layer: impl Fn(&mut Weights<'_>, usize, &str) -> crate::Result<Vec<Sublayer>>,
    ) -> crate::Result<Self> {
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let own = weights.layers(num_layers);
        let (is_first, is_last) = (own.start == 0, own.end == num_layers);
        let table = if is_first || (is_last && is_tied) {
            Some(Linear::column(weights, names.embed_tokens, vocab, hidden)?)
        } else {
            weights.skip(&format!("{}.weight", names.embed_tokens));
            None
        };
        let mut sublayers = Vec::new();
        for layer in 0..num_layers {
            let name = format!("{}.{layer}", names.layers);
            if own.contains(&layer) {
                sublayers.extend(load_layer(weights, layer, &name)?);
                weights.end_layer();
            } else {
                weights.skip_all(&format!("{name}."));
            }
        }
        let head = if is_last {
            let norm = RmsNorm::load(weights, names.norm, hidden, config.rms_norm_eps)?;
            let tied = table.clone().filter(|_| is_tied);
            let lm_head = match tied {
                Some(table) => {
                    weights.skip("lm_head.weight"); // some checkpoints repeat the table
                    weights.repeat(&table.weight);
                    table
                }
                None => Linear::column(weights, "lm_head", vocab, hidden)?,
            };
            Some(Head { norm, lm_head })
        } else {
            weights.skip(&format!("{}.weight", names.norm));
            weights.skip("lm_head.weight");
            None
        };
        let shard = weights.shard();
        let first_token = shard.range(vocab).start;
        let embedding = table.filter(|_| is_first).map(|table| Embedding { table: table.weight, first_token });
        Ok(Self { embedding, sublayers, head, shard })
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

    /// The branch and the residual stream that the first sublayer takes: the embeddings of the tokens, `[T, C]`, without a
    /// branch; or what the stage before hands on.
    fn begin(&self, cx: &mut OpStream, inputs: &TokenInputs) -> Result<(Option<Tensor>, Tensor)> {
        match (&self.embedding, &inputs.received) {
            (Some(embedding), None) => Ok((None, embedding.embed(cx, &inputs.token_ids)?)),
            (None, Some(Received { branch, residual })) => Ok((Some(branch.clone()), residual.clone())),
            _ => Err(Error::other("the first stage of a pipeline reads tokens, and each other one what it received")),
        }
    }
}

impl Embedding {
    /// The embeddings of tokens, `[T, C]`. A rank has zeros for those that are not its own.
    fn embed(&self, cx: &mut OpStream, token_ids: &Tensor) -> Result<Tensor> {
        let own = ops::gather_rows_from(cx, &self.table, self.first_token, token_ids)?;
        ops::all_reduce(cx, &own)
    }
}

/// The rows of a forward that go on: all, until [`keep`](Self::keep) leaves those that are wanted.
struct GoingOn<'a> {
    inputs: &'a TokenInputs,
    branch: Option<Tensor>,
    residual: Tensor,
    num_valid: &'a Tensor,
}

impl GoingOn<'_> {
    /// Ends the rows that nobody wants: `[Bmax, C]` stay.
    fn keep(&mut self, cx: &mut OpStream) -> Result<()> {
        self.branch = self.branch.take().map(|branch| self.inputs.keep_wanted(cx, branch)).transpose()?;
        self.residual = self.inputs.keep_wanted(cx, self.residual.clone())?;
        self.num_valid = self.inputs.num_wanted();
        Ok(())
    }
}

impl Model for Decoder {
    fn forward(
        &self,
        cx: &mut Context<'_, ForwardBatch>,
        inputs: &TokenInputs,
        caches: &Caches,
    ) -> Result<StageOutput> {
        let (mut kvs, mut states) = (caches.kv.layers().iter(), caches.states.layers().iter());
        let last_mixing = self.sublayers.iter().rposition(|sublayer| sublayer.mixer.mixes_rows());
        self.check_rank(cx)?;
        let (branch, residual) = self.begin(cx, inputs)?;
        let mut rows = GoingOn { inputs, branch, residual, num_valid: &inputs.num_valid };
        let is_last = self.head.is_some();
        if is_last && last_mixing.is_none() {
            rows.keep(cx)?;
        }
        for (index, Sublayer { norm, mixer }) in self.sublayers.iter().enumerate() {
            let (x, sum) = norm.forward_branch(cx, rows.branch.take(), rows.residual)?;
            rows.residual = sum;
            let mixed = match mixer {
                Mixer::Attention(mixer) => mixer.forward(cx, &x, inputs, next(&mut kvs))?,
                Mixer::Mla(mixer) => mixer.forward(cx, &x, inputs, next(&mut kvs))?,
                Mixer::Mamba2(mixer) => mixer.forward(cx, &x, inputs, next(&mut states))?,
                Mixer::Mlp(mixer) => mixer.forward(cx, &x)?,
                Mixer::Relu2Mlp(mixer) => mixer.forward(cx, &x)?,
                Mixer::Moe(mixer) => mixer.forward(cx, &x, rows.num_valid)?,
            };
            drop(x);
            rows.branch = Some(mixed);
            if is_last && Some(index) == last_mixing {
                rows.keep(cx)?;
            }
        }
        match (&self.head, rows.branch) {
            (Some(head), branch) => {
                Ok(StageOutput { hidden: head.norm.forward_branch(cx, branch, rows.residual)?.0, residual: None })
            }
            (None, Some(hidden)) => Ok(StageOutput { hidden, residual: Some(rows.residual) }),
            (None, None) => Err(Error::other("a stage of a pipeline has at least one layer")),
        }
    }

    fn logits(&self, cx: &mut OpStream, hidden: &Tensor) -> Result<Tensor> {
        self.check_rank(cx)?;
        let Some(head) = &self.head else {
            return Err(Error::other("only the last stage of a pipeline has logits"));
        };
        let own = head.lm_head.forward_f32(cx, hidden)?; // [B, V / W], of W ranks
        ops::all_gather_columns(cx, &own)
    }

    fn num_cached_layers(&self) -> CachedLayers {
        let count = |is_one: fn(&Mixer) -> bool| self.sublayers.iter().filter(|one| is_one(&one.mixer)).count();
        CachedLayers {
            kv: count(|mixer| matches!(mixer, Mixer::Attention(_) | Mixer::Mla(_))),
            states: count(|mixer| matches!(mixer, Mixer::Mamba2(_))),
        }
    }
}

/// What the next sublayer that keeps anything between steps keeps.
fn next<'a, T>(caches: &mut std::slice::Iter<'a, T>) -> &'a T {
    caches.next().expect("the layout counts the sublayers that keep something")
}
