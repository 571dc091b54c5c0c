//! Self-attention with grouped queries and a paged KV cache; queries and keys are normalised and rotated, or left as
//! they are.
//!
//! Projections, norms, rotation and the KV write are captured: they read positions and slots from static buffers. In a
//! prefill [`attend`] is a break, because sequences and page table depend on the live batch; its launch has the same
//! arguments and geometry for every batch of a padded size. In a decode attention is captured too: what it reads lies
//! in static buffers.

use bcg_kernels::{self as ops, AttentionPrefill, PagedKv, QkNormRopeKvWrite};
use bcg_runtime::{Context, Device, Eager, OpStream, Result, Tensor, eager_on_graph};
use serde_json::Value;

use super::{Linear, RmsNorm};
use crate::batch::{ForwardBatch, TokenInputs};
use crate::config::{Fields, ModelConfig};
use crate::state::{CacheLayout, LayerKv};
use crate::weights::{Divided, Section, Shard, Weights};

/// The heads of grouped-query attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads, Hq.
    pub q: usize,
    /// Key-value heads, Hkv.
    pub kv: usize,
    /// Dimensions of each head, D.
    pub dim: usize,
}

impl Heads {
    /// Reads `num_attention_heads`, `num_key_value_heads` and `head_dim` (or `attention_head_dim`), and refuses
    /// attention that [`Attention`] does not compute.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) names the field.
    pub fn read(config: &ModelConfig) -> crate::Result<Self> {
        let fields = &config.fields;
        let q = fields.count("num_attention_heads")?;
        let kv = fields.optional_count("num_key_value_heads")?.unwrap_or(q);
        let dim = fields.optional_count("head_dim")?.or(fields.optional_count("attention_head_dim")?);
        let dim = dim.unwrap_or(config.hidden_size / q);
        if !q.is_multiple_of(kv) {
            let expected = format!("a divisor of num_attention_heads = {q}");
            return Err(fields.error("num_key_value_heads", expected, kv, "check the checkpoint's conversion"));
        }
        if !ops::takes_head_dim(dim) {
            let expected = format!("a multiple of 32 up to {}", ops::HEAD_DIM_MAX);
            return Err(fields.error("head_dim", expected, dim, "the attention kernels take no other head dimension"));
        }
        fields.refuse_flag("use_sliding_window", "sliding-window attention is not implemented")?;
        fields.refuse_flag("attention_bias", "biased projections are not implemented")?;
        let mut kinds = fields.get("layer_types").and_then(Value::as_array).into_iter().flatten();
        match kinds.find(|kind| kind.as_str() != Some("full_attention")) {
            Some(other) => {
                Err(fields.error("layer_types", "`full_attention` only", other, "no other kind is implemented"))
            }
            None => Ok(Self { q, kv, dim }),
        }
    }

    /// The heads that one rank has: its share of the query heads, and the key-value heads that these read.
    pub fn share(self, shard: Shard) -> Self {
        Self { q: shard.share(self.q), kv: shard.share(self.kv), ..self }
    }

    /// What ranks divide of such attention. Several ranks may keep one key-value head.
    pub fn divided(self) -> [Divided; 2] {
        let kv = Divided { is_shared: true, ..Divided::new("num_key_value_heads", self.kv) };
        [Divided::new("num_attention_heads", self.q), kv]
    }

    /// What `kv_layers` layers of such attention keep of a token.
    pub fn cache_layout(self, kv_layers: usize) -> CacheLayout {
        let shape = [self.kv, self.dim];
        CacheLayout { kv_layers, k: shape, v: shape, q_heads: self.q, states: None }
    }
}

/// Reads the base of the rotary frequencies: `rope_parameters.rope_theta` (transformers 5) or `rope_theta`. Scaled
/// variants are refused.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) names the field.
pub fn rope_theta(fields: &Fields) -> crate::Result<f64> {
    for field in ["rope_parameters.rope_type", "rope_scaling.rope_type", "rope_scaling.type"] {
        fields.refuse_other(field, "default", "scaled rotary embeddings are not implemented")?;
    }
    rope_base(fields)
}

/// Reads the base of the rotary frequencies, whatever their scaling.
pub(super) fn rope_base(fields: &Fields) -> crate::Result<f64> {
    for field in ["rope_parameters.rope_theta", "rope_theta"] {
        if let Some(theta) = fields.number(field)? {
            return Ok(theta);
        }
    }
    let remedy = "add `rope_theta` or `rope_parameters.rope_theta`";
    Err(fields.error("rope_theta", "a positive number", "nothing", remedy))
}

/// The rotary frequencies, shared by all layers.
#[derive(Debug, Clone)]
pub struct Rotary {
    /// The angle per position of each pair of dimensions, `[D / 2]` f32.
    pub inv_freq: Tensor,
}

impl Rotary {
    /// Computes the frequencies for heads of `dim` dimensions.
    ///
    /// # Errors
    /// Those of [`rope_theta`]; the device's.
    pub fn new(device: &Device, config: &ModelConfig, dim: usize) -> crate::Result<Self> {
        let inv_freq = ops::rope_inv_freq(rope_theta(&config.fields)?, dim);
        Ok(Self { inv_freq: device.tensor(&[inv_freq.len()], &inv_freq)? })
    }
}

/// One layer's self-attention.
#[derive(Debug)]
pub struct Attention {
    qkv_proj: Linear,
    o_proj: Linear,
    norm_rope: Option<NormRope>,
    /// Those of this rank.
    heads: Heads,
    scale: f32,
}

/// What is done to queries and keys before they meet.
#[derive(Debug)]
struct NormRope {
    q_norm: RmsNorm,
    k_norm: RmsNorm,
    rotary: Rotary,
    eps: f32,
}

impl Attention {
    /// Takes `q_proj`, `k_proj` and `v_proj`, as one matrix, `o_proj`, `q_norm` and `k_norm` under `name`.
    ///
    /// # Errors
    /// Those of [`Heads::read`] and of [`Weights::take`].
    pub fn load(weights: &mut Weights<'_>, name: &str, config: &ModelConfig, rotary: &Rotary) -> crate::Result<Self> {
        let plain = Self::load_plain(weights, name, config)?;
        let (head_dim, eps) = (plain.heads.dim, config.rms_norm_eps);
        let norm_rope = NormRope {
            q_norm: RmsNorm::load(weights, &format!("{name}.q_norm"), head_dim, eps)?,
            k_norm: RmsNorm::load(weights, &format!("{name}.k_norm"), head_dim, eps)?,
            rotary: rotary.clone(),
            eps,
        };
        Ok(Self { norm_rope: Some(norm_rope), ..plain })
    }

    /// Takes `q_proj`, `k_proj` and `v_proj`, as one matrix, and `o_proj` under `name`, for attention that knows no
    /// positions.
    ///
    /// # Errors
    /// Those of [`Heads::read`] and of [`Weights::take`].
    pub fn load_plain(weights: &mut Weights<'_>, name: &str, config: &ModelConfig) -> crate::Result<Self> {
        let (heads, hidden) = (Heads::read(config)?, config.hidden_size);
        let [q, kv] = [heads.q, heads.kv].map(|units| [Section { units, rows: heads.dim }]);
        let qkv: [(String, &[Section]); 3] =
            [(format!("{name}.q_proj"), &q), (format!("{name}.k_proj"), &kv), (format!("{name}.v_proj"), &kv)];
        Ok(Self {
            qkv_proj: Linear::column_fused(weights, &qkv, hidden)?,
            o_proj: Linear::row(weights, &format!("{name}.o_proj"), hidden, heads.q * heads.dim)?,
            norm_rope: None,
            heads: heads.share(weights.shard()),
            scale: (heads.dim as f32).sqrt().recip(),
        })
    }

    /// `[T, C]` to partial sums, `[T, C]`; writes the keys and values of the new tokens.
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
        let qkv = self.qkv_proj.forward(cx, x)?; // [T, (Hq + 2 Hkv) D], of this rank's heads
        let q = match &self.norm_rope {
            Some(norm_rope) => norm_rope.forward(cx, &qkv, inputs, kv)?,
            None => {
                let (q, k) = (self.heads.q * self.heads.dim, (self.heads.q + self.heads.kv) * self.heads.dim);
                let (keys, values) = (qkv.columns(q..k)?, qkv.columns(k..qkv.dim(1))?);
                ops::kv_write(cx, &keys, &values, &inputs.slot_mapping, &kv.k, &kv.v)?;
                qkv.columns(0..q)?
            }
        }; // [T, Hq D]
        drop(qkv);
        let attended = match &inputs.decode {
            None => attend(cx, &q, kv, self.scale)?,
            Some(decode) => {
                let kv = PagedKv { k_cache: &kv.k, v_cache: &kv.v, page_table: &decode.page_table };
                ops::attention_decode(cx, &q, &kv, &decode.kv_lens, &decode.plan, self.scale)?
            }
        }; // [T, Hq D]
        self.o_proj.forward(cx, &attended) // partial sums
    }
}

impl NormRope {
    /// Normalises and rotates queries and keys of `qkv`, `[T, (Hq + 2 Hkv) D]`, writes keys and values; returns the
    /// queries.
    fn forward(&self, cx: &mut OpStream, qkv: &Tensor, inputs: &TokenInputs, kv: &LayerKv) -> Result<Tensor> {
        let input = QkNormRopeKvWrite {
            qkv,
            q_weight: &self.q_norm.weight,
            k_weight: &self.k_norm.weight,
            inv_freq: &self.rotary.inv_freq,
            positions: &inputs.positions,
            slots: &inputs.slot_mapping,
            k_cache: &kv.k,
            v_cache: &kv.v,
            eps: self.eps,
        };
        ops::qk_norm_rope_kv_write(cx, &input)
    }
}

/// Attends with `q`, `[T, Hq D]`, to the keys and values of the live batch's sequences; returns `[T, Hq D]`.
#[eager_on_graph]
fn attend(cx: &mut Eager<'_, ForwardBatch>, q: &Tensor, kv: &LayerKv, scale: f32) -> Result<Tensor> {
    let batch = cx.live();
    batch.push_kv(cx, kv)?;
    let kv = PagedKv { k_cache: &kv.k, v_cache: &kv.v, page_table: &batch.page_table };
    let out = cx.empty(q.shape(), q.dtype())?;
    let (mut cu_seqlens_q, mut plan) = (&batch.cu_seqlens_q, &batch.prefill_plan);
    if let Some(split) = &batch.split {
        // The decodes first: of the rows that this writes, prompts write theirs again.
        let rows = 0..split.decode_kv_lens.dim(0);
        let (out, q) = (out.rows(rows.clone())?, q.rows(rows)?);
        ops::attention_decode_to(cx, &out, &q, &kv, &split.decode_kv_lens, &split.decode_plan, scale)?;
        (cu_seqlens_q, plan) = (&split.prompt_starts, &split.prompt_plan);
    }
    let prompts = AttentionPrefill { q, kv: &kv, cu_seqlens_q, kv_lens: &batch.kv_lens, plan, scale };
    ops::attention_prefill_to(cx, &out, &prompts)?;
    Ok(out)
}
