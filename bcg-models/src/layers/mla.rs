//! Multi-head latent attention: all heads share one latent and one rotated rope key per token, and nothing else
//! is kept.
//!
//! Projections, norms, rotation and the cache write are captured: they read positions and slots from static buffers. In
//! a prefill [`attend`] is a break, which turns latents back into keys and values; its launches have the same arguments
//! and geometry for every batch of a padded size. In a decode the projections are absorbed into the queries and
//! outputs, and attention runs over the latents themselves, captured too.

use bcg_kernels::{self as ops, LatentKv, MlaKvWrite, MlaPrefill};
use bcg_runtime::{Context, Eager, Result, Tensor, eager_on_graph};

use super::{Linear, RmsNorm, RotaryScaling};
use crate::batch::{DecodeInputs, ForwardBatch, TokenInputs};
use crate::config::ModelConfig;
use crate::state::{CacheLayout, LayerKv};
use crate::weights::{Divided, Part, Section, Shard, Split, Weights};

/// What the norms of queries and latents add to the mean square, whatever the configuration says of other norms.
const EPS: f32 = 1e-6;
/// Bytes of the arena for decompressed keys and values: 262,144 tokens times heads of the published widths.
const WORKSPACE_BYTES: usize = 128 << 20;

/// The widths of latent attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MlaDims {
    /// Heads, H.
    pub heads: usize,
    /// The width of the compressed queries, if they are compressed.
    pub q_rank: Option<usize>,
    /// The width of the latent, L.
    pub latent: usize,
    /// The width of the part of queries and keys that has no positions, Dn.
    pub nope: usize,
    /// The width of the rotated part, R.
    pub rope: usize,
    /// The width of values, Dv.
    pub value: usize,
}

impl MlaDims {
    /// Reads the widths, and refuses attention that [`Mla`] does not compute.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) names the field.
    pub fn read(config: &ModelConfig) -> crate::Result<Self> {
        let fields = &config.fields;
        fields.refuse_flag("attention_bias", "biased projections are not implemented")?;
        let heads = fields.count("num_attention_heads")?;
        let kv_heads = fields.optional_count("num_key_value_heads")?.unwrap_or(heads);
        if kv_heads != heads {
            let remedy = "latent attention has as many key-value heads as query heads";
            return Err(fields.error("num_key_value_heads", heads, kv_heads, remedy));
        }
        let kernel_width = |field: &str, max: usize| {
            let width = fields.count(field)?;
            let is_known = width.is_multiple_of(32) && width <= max;
            let remedy = "the attention kernels cover no other width yet";
            let expected = format!("a multiple of 32 up to {max}");
            if is_known { Ok(width) } else { Err(fields.error(field, expected, width, remedy)) }
        };
        Ok(Self {
            heads,
            q_rank: fields.optional_count("q_lora_rank")?,
            latent: kernel_width("kv_lora_rank", 512)?,
            nope: fields.count("qk_nope_head_dim")?,
            rope: kernel_width("qk_rope_head_dim", 128)?,
            value: fields.count("v_head_dim")?,
        })
    }

    /// What ranks divide of such attention. Latents are not divided.
    pub fn divided(self) -> [Divided; 1] {
        [Divided::new("num_attention_heads", self.heads)]
    }

    /// The heads that one rank has, at the same widths.
    pub fn share(self, shard: Shard) -> Self {
        Self { heads: shard.share(self.heads), ..self }
    }

    /// What `kv_layers` layers of such attention keep of a token.
    pub fn cache_layout(self, kv_layers: usize) -> CacheLayout {
        CacheLayout { kv_layers, k: [1, self.latent], v: [1, self.rope], q_heads: self.heads, states: None }
    }
}

/// What all layers of latent attention share.
#[derive(Debug, Clone)]
pub struct MlaShared {
    /// Undivided.
    whole: MlaDims,
    /// Of this rank.
    dims: MlaDims,
    /// `[R / 2]` f32.
    inv_freq: Tensor,
    is_interleaved: bool,
    rope_scale: f32,
    scale: f32,
}

impl MlaShared {
    /// Reads the configuration and computes the rotary frequencies.
    ///
    /// # Errors
    /// Those of [`MlaDims::read`] and of [`RotaryScaling::read`]; the device's.
    pub fn load(weights: &Weights<'_>, config: &ModelConfig) -> crate::Result<Self> {
        let whole = MlaDims::read(config)?;
        let dims = whole.share(weights.shard());
        let rotary = RotaryScaling::read(&config.fields, dims.rope)?;
        Ok(Self {
            whole,
            dims,
            inv_freq: rotary.upload(weights.device())?,
            is_interleaved: config.fields.get("rope_interleave").is_none() || config.fields.flag("rope_interleave")?,
            rope_scale: rotary.rope_scale,
            scale: ((dims.nope + dims.rope) as f32).sqrt().recip() * rotary.score_scale,
        })
    }
}

/// One layer's latent attention.
#[derive(Debug)]
pub struct Mla {
    q: Queries,
    kv_a_layernorm: RmsNorm,
    /// `[H, Dn + Dv, L]`.
    kv_b_proj: Tensor,
    /// The keys of `kv_b_proj`, `[H, Dn, L]`.
    k_b_proj: Tensor,
    /// The values of `kv_b_proj`, `[H, Dv, L]`.
    v_b_proj: Tensor,
    o_proj: Linear,
    shared: MlaShared,
}

/// How queries, latents and rope keys come from hidden states.
#[derive(Debug)]
enum Queries {
    Direct {
        q_proj: Linear,
        kv_a_proj_with_mqa: Linear,
    },
    /// `a_proj` is `q_a_proj` and `kv_a_proj_with_mqa` as one matrix.
    Compressed {
        a_proj: Linear,
        q_a_layernorm: RmsNorm,
        q_b_proj: Linear,
    },
}

impl Mla {
    /// Takes `q_proj`, or `q_a_proj`, `q_a_layernorm` and `q_b_proj`, then `kv_a_proj_with_mqa`, `kv_a_layernorm`,
    /// `kv_b_proj` and `o_proj` under `name`.
    ///
    /// # Errors
    /// Those of [`Weights::take`].
    pub fn load(weights: &mut Weights<'_>, name: &str, hidden: usize, shared: &MlaShared) -> crate::Result<Self> {
        let MlaDims { heads, latent, nope, value, .. } = shared.dims;
        let (kv_b_name, whole_heads) = (format!("{name}.kv_b_proj.weight"), shared.whole.heads);
        let of_heads = [Section { units: whole_heads, rows: nope + value }];
        let shape = [whole_heads * (nope + value), latent];
        let kv_b_proj =
            weights.take_rows(&[Part { name: &kv_b_name, shape: &shape, split: Split::Rows(&of_heads) }])?;
        let of_heads = kv_b_proj.reshape(&[heads, (nope + value) * latent])?;
        Ok(Self {
            q: Queries::load(weights, name, hidden, shared.whole)?,
            kv_a_layernorm: RmsNorm::load(weights, &format!("{name}.kv_a_layernorm"), latent, EPS)?,
            k_b_proj: of_heads.columns(0..nope * latent)?.reshape(&[heads, nope, latent])?,
            v_b_proj: of_heads.columns(nope * latent..(nope + value) * latent)?.reshape(&[heads, value, latent])?,
            kv_b_proj: kv_b_proj.reshape(&[heads, nope + value, latent])?,
            o_proj: Linear::row(weights, &format!("{name}.o_proj"), hidden, whole_heads * value)?,
            shared: shared.clone(),
        })
    }

    /// `[T, C]` to partial sums, `[T, C]`; writes the latents and rope keys of the new tokens.
    ///
    /// # Errors
    /// Those of the ops, and of the break.
    pub fn forward(
        &self,
        cx: &mut Context<'_, ForwardBatch>,
        x: &Tensor,
        inputs: &TokenInputs,
        kv: &LayerKv,
    ) -> Result<Tensor> {
        let (q, kv_a) = self.q.forward(cx, x, self.shared.dims)?; // [T, H (Dn + R)], [T, L + R]
        let written = MlaKvWrite {
            q: &q,
            kv_a: &kv_a,
            weight: &self.kv_a_layernorm.weight,
            inv_freq: &self.shared.inv_freq,
            positions: &inputs.positions,
            slots: &inputs.slot_mapping,
            latents: &kv.k,
            rope_keys: &kv.v,
            heads: self.shared.dims.heads,
            is_interleaved: self.shared.is_interleaved,
            eps: EPS,
            rope_scale: self.shared.rope_scale,
        };
        let q_pe = ops::mla_kv_write(cx, &written)?; // [T, H R]
        drop(kv_a);
        let attended = match &inputs.decode {
            None => attend(cx, &q, &q_pe, &self.kv_b_proj, kv, self.shared.scale)?,
            Some(decode) => self.attend_absorbed(cx, &q, &q_pe, kv, decode)?,
        }; // [T, H Dv]
        self.o_proj.forward(cx, &attended)
    }

    /// Attends to the latents themselves: scores are `(q W_UK) · latent`, and `W_UV` is applied to the mean latent.
    fn attend_absorbed(
        &self,
        cx: &mut Context<'_, ForwardBatch>,
        q: &Tensor,
        q_pe: &Tensor,
        kv: &LayerKv,
        decode: &DecodeInputs,
    ) -> Result<Tensor> {
        let MlaDims { heads, nope, rope, value, .. } = self.shared.dims;
        let tokens = q.dim(0);
        let q_nope = q.reshape(&[tokens * heads, nope + rope])?.columns(0..nope)?;
        let q_latent = ops::head_linear_transposed(cx, &q_nope, &self.k_b_proj)?; // [T H, L]
        let kv = LatentKv { latents: &kv.k, rope_keys: &kv.v, page_table: &decode.page_table };
        let mean = ops::mla_decode(cx, &q_latent, q_pe, &kv, &decode.kv_lens, &decode.plan, self.shared.scale)?;
        drop(q_latent);
        ops::head_linear(cx, &mean, &self.v_b_proj)?.reshape(&[tokens, heads * value])
    }
}

impl Queries {
    /// Latents, rope keys and compressed queries are the same on every rank.
    fn load(weights: &mut Weights<'_>, name: &str, hidden: usize, dims: MlaDims) -> crate::Result<Self> {
        let q_width = dims.heads * (dims.nope + dims.rope);
        let (kv_a, kv_width) = (format!("{name}.kv_a_proj_with_mqa"), dims.latent + dims.rope);
        let Some(rank) = dims.q_rank else {
            return Ok(Self::Direct {
                q_proj: Linear::column(weights, &format!("{name}.q_proj"), q_width, hidden)?,
                kv_a_proj_with_mqa: Linear::load(weights, &kv_a, kv_width, hidden)?,
            });
        };
        let parts = [(format!("{name}.q_a_proj"), rank), (kv_a, kv_width)];
        Ok(Self::Compressed {
            a_proj: Linear::load_fused(weights, &parts, hidden)?,
            q_a_layernorm: RmsNorm::load(weights, &format!("{name}.q_a_layernorm"), rank, EPS)?,
            q_b_proj: Linear::column(weights, &format!("{name}.q_b_proj"), q_width, rank)?,
        })
    }

    /// The queries, and latents with rope keys.
    fn forward(&self, cx: &mut Context<'_, ForwardBatch>, x: &Tensor, dims: MlaDims) -> Result<(Tensor, Tensor)> {
        match self {
            Self::Direct { q_proj, kv_a_proj_with_mqa } => {
                Ok((q_proj.forward(cx, x)?, kv_a_proj_with_mqa.forward(cx, x)?))
            }
            Self::Compressed { a_proj, q_a_layernorm, q_b_proj } => {
                let a = a_proj.forward(cx, x)?; // [T, rank + L + R]
                let rank = a.dim(1) - dims.latent - dims.rope;
                let q_a = q_a_layernorm.forward(cx, &a.columns(0..rank)?)?;
                Ok((q_b_proj.forward(cx, &q_a)?, a.columns(rank..a.dim(1))?))
            }
        }
    }
}

/// Attends with `q` and `q_pe` to the keys of the live batch's sequences; returns `[T, H Dv]`.
#[eager_on_graph]
fn attend(
    cx: &mut Eager<'_, ForwardBatch>,
    q: &Tensor,
    q_pe: &Tensor,
    kv_b_proj: &Tensor,
    kv: &LayerKv,
    scale: f32,
) -> Result<Tensor> {
    let batch = cx.live();
    batch.push_kv(cx, kv)?;
    let input = MlaPrefill {
        q,
        q_pe,
        kv_b_proj,
        kv: LatentKv { latents: &kv.k, rope_keys: &kv.v, page_table: &batch.page_table },
        cu_seqlens_q: &batch.cu_seqlens_q,
        kv_lens: &batch.kv_lens,
        plan: &batch.prefill_plan,
        scale,
        workspace_bytes: WORKSPACE_BYTES,
    };
    ops::mla_prefill(cx, &input)
}
