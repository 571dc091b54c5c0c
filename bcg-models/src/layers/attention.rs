//! Self-attention with grouped queries, normalised queries and keys, rotary positions and a paged KV cache.
//!
//! Projections, norms, rotation and the KV write are captured: they read positions and slots from static buffers. In a
//! prefill [`attend`] is a break, because sequences and page table depend on the live batch; its launch has the same
//! arguments and geometry for every batch of a padded size. In a decode attention is captured too: what it reads lies in
//! static buffers.

use bcg_runtime::{Context, Device, Eager, Result, Tensor, eager_on_graph};

use super::{Linear, RmsNorm};
use crate::batch::{ForwardBatch, TokenInputs};
use crate::config::ModelConfig;
use crate::ops::{self, PagedKv, QkNormRopeKvWrite};
use crate::state::LayerKv;
use crate::weights::Weights;

/// The rotary frequencies, shared by all layers.
#[derive(Debug, Clone)]
pub struct Rotary {
    /// `[D / 2]` f32.
    pub inv_freq: Tensor,
}

impl Rotary {
    /// Computes the frequencies of a configuration.
    ///
    /// # Errors
    /// The device's.
    pub fn new(device: &Device, config: &ModelConfig) -> Result<Self> {
        let inv_freq = ops::rope_inv_freq(config.rope_theta, config.head_dim);
        Ok(Self { inv_freq: device.tensor(&[inv_freq.len()], &inv_freq)? })
    }
}

/// One layer's self-attention.
#[derive(Debug)]
pub struct Attention {
    qkv_proj: Linear,
    o_proj: Linear,
    q_norm: RmsNorm,
    k_norm: RmsNorm,
    rotary: Rotary,
    eps: f32,
    scale: f32,
}

impl Attention {
    /// Takes `q_proj`, `k_proj` and `v_proj`, as one matrix, `o_proj`, `q_norm` and `k_norm` under `name`.
    ///
    /// # Errors
    /// Those of [`Weights::take`].
    pub fn load(weights: &mut Weights<'_>, name: &str, config: &ModelConfig, rotary: &Rotary) -> crate::Result<Self> {
        let (hidden, head_dim, eps) = (config.hidden_size, config.head_dim, config.rms_norm_eps);
        let q_width = config.num_attention_heads * head_dim;
        let kv_width = config.num_key_value_heads * head_dim;
        let qkv = [
            (format!("{name}.q_proj"), q_width),
            (format!("{name}.k_proj"), kv_width),
            (format!("{name}.v_proj"), kv_width),
        ];
        Ok(Self {
            qkv_proj: Linear::load_fused(weights, &qkv, hidden)?,
            o_proj: Linear::load(weights, &format!("{name}.o_proj"), hidden, q_width)?,
            q_norm: RmsNorm::load(weights, &format!("{name}.q_norm"), head_dim, eps)?,
            k_norm: RmsNorm::load(weights, &format!("{name}.k_norm"), head_dim, eps)?,
            rotary: rotary.clone(),
            eps,
            scale: (head_dim as f32).sqrt().recip(),
        })
    }

    /// `[T, C]` to `[T, C]`; writes the keys and values of the new tokens.
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
        let qkv = self.qkv_proj.forward(cx, x)?; // [T, (Hq + 2 Hkv) D]
        let rotated = QkNormRopeKvWrite {
            qkv: &qkv,
            q_weight: &self.q_norm.weight,
            k_weight: &self.k_norm.weight,
            inv_freq: &self.rotary.inv_freq,
            positions: &inputs.positions,
            slots: &inputs.slot_mapping,
            k_cache: &kv.k,
            v_cache: &kv.v,
            eps: self.eps,
        };
        let q = ops::qk_norm_rope_kv_write(cx, &rotated)?; // [T, Hq D]
        drop(qkv);
        let attended = match &inputs.decode {
            None => attend(cx, &q, kv, self.scale)?,
            Some(decode) => {
                let kv = PagedKv { k_cache: &kv.k, v_cache: &kv.v, page_table: &decode.page_table };
                ops::attention_decode(cx, &q, &kv, &decode.kv_lens, &decode.plan, self.scale)?
            }
        }; // [T, Hq D]
        self.o_proj.forward(cx, &attended)
    }
}

/// Attends with `q`, `[T, Hq D]`, to the keys and values of the live batch's sequences; returns `[T, Hq D]`.
#[eager_on_graph]
fn attend(cx: &mut Eager<'_, ForwardBatch>, q: &Tensor, kv: &LayerKv, scale: f32) -> Result<Tensor> {
    let batch = cx.live();
    let kv = PagedKv { k_cache: &kv.k, v_cache: &kv.v, page_table: &batch.page_table };
    ops::attention_prefill(cx, q, &kv, &batch.cu_seqlens_q, &batch.kv_lens, &batch.prefill_plan, scale)
}
