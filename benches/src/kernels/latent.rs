//! Latent attention: decode over latents, prefill over what they are decompressed to, and the products between.

use anyhow::Result;
use bcg_kernels::{self as ops, DecodePlan, LatentKv, MlaPrefill};
use bcg_runtime::{DType, Tensor};

use super::KernelsArgs;
use super::attention::{DecodeShape, Pages, PrefillShape, as_i32};
use super::cases::{Case, PAGE, Shapes, each};
use super::lab::Lab;

/// The widths of latent attention.
#[derive(Clone, Copy)]
struct Widths {
    heads: usize,
    latent: usize,
    nope: usize,
    rope: usize,
    value: usize,
    dtype: DType,
}

impl Widths {
    fn read(model: &Shapes) -> Result<Self> {
        Ok(Self {
            heads: model.count("num_attention_heads")?,
            latent: model.count("kv_lora_rank")?,
            nope: model.count("qk_nope_head_dim")?,
            rope: model.count("qk_rope_head_dim")?,
            value: model.count("v_head_dim")?,
            dtype: model.config.dtype,
        })
    }
}

/// The latents, rope keys and page table of one launch.
struct Cache {
    latents: Tensor,
    rope_keys: Tensor,
    page_table: Tensor,
}

impl Cache {
    fn new(lab: &mut Lab, widths: Widths, lens: &[usize]) -> Result<Self> {
        let pages = Pages::new(lens);
        Ok(Self {
            latents: lab.random(&[pages.count, PAGE, 1, widths.latent], widths.dtype)?,
            rope_keys: lab.random(&[pages.count, PAGE, 1, widths.rope], widths.dtype)?,
            page_table: lab.tensor(&pages.table)?.reshape(&[lens.len(), pages.width])?,
        })
    }

    fn view(&self) -> LatentKv<'_> {
        LatentKv { latents: &self.latents, rope_keys: &self.rope_keys, page_table: &self.page_table }
    }
}

/// The cases of a model with such layers.
pub(super) fn cases(model: &Shapes, args: &KernelsArgs) -> Result<Vec<Case>> {
    let widths = Widths::read(model)?;
    let mut cases = Vec::new();
    for &tokens in &args.tokens {
        cases.extend([to_latents(model, widths, tokens), to_values(model, widths, tokens)]);
    }
    cases.extend(args.prefill.iter().map(|shape| prefill(model, widths, *shape)));
    cases.extend(args.decode.iter().map(|shape| decode(model, widths, *shape)));
    Ok(cases)
}

/// Each head's query, in the space of latents.
fn to_latents(model: &Shapes, widths: Widths, tokens: usize) -> Case {
    let Widths { heads, latent, nope, dtype, .. } = widths;
    let bytes = heads * (tokens * (nope + latent) + nope * latent) * model.size();
    let prepare = each(move |lab| {
        let (x, weight) = (lab.random(&[tokens * heads, nope], dtype)?, lab.random(&[heads, nope, latent], dtype)?);
        Ok(Box::new(move |cx| Ok(vec![ops::head_linear_transposed(cx, &x, &weight)?])))
    });
    model.case("head_linear", format!("q T={tokens}"), bytes, 2 * tokens * heads * nope * latent, prepare)
}

/// Each head's mean of latents, as values.
fn to_values(model: &Shapes, widths: Widths, tokens: usize) -> Case {
    let Widths { heads, latent, value, dtype, .. } = widths;
    let bytes = heads * (tokens * (value + latent) + value * latent) * model.size();
    let prepare = each(move |lab| {
        let (x, weight) = (lab.random(&[tokens * heads, latent], dtype)?, lab.random(&[heads, value, latent], dtype)?);
        Ok(Box::new(move |cx| Ok(vec![ops::head_linear(cx, &x, &weight)?])))
    });
    model.case("head_linear", format!("v T={tokens}"), bytes, 2 * tokens * heads * value * latent, prepare)
}

fn decode(model: &Shapes, widths: Widths, shape: DecodeShape) -> Case {
    let DecodeShape { sequences, tokens } = shape;
    let Widths { heads, latent, nope, rope, dtype, .. } = widths;
    let bytes = (sequences * heads * (2 * latent + rope) + sequences * tokens * (latent + rope)) * model.size();
    let flops = 2 * sequences * tokens * heads * (2 * latent + rope);
    let scale = ((nope + rope) as f32).sqrt().recip();
    let prepare = each(move |lab| {
        let q = lab.random(&[sequences * heads, latent], dtype)?;
        let q_pe = lab.random(&[sequences, heads * rope], dtype)?;
        let lens = vec![tokens; sequences];
        let cache = Cache::new(lab, widths, &lens)?;
        let (lens, decode_plan, mut plan) = (as_i32(&lens), DecodePlan::new(lab.device(), heads, 1), vec![]);
        decode_plan.fill(&lens, &mut plan);
        let (lens, plan) = (lab.tensor(&lens)?, lab.tensor(&plan)?.reshape(&decode_plan.shape())?);
        Ok(Box::new(move |cx| Ok(vec![ops::mla_decode(cx, &q, &q_pe, &cache.view(), &lens, &plan, scale)?])))
    });
    model.case("mla_decode", shape.to_string(), bytes, flops, prepare)
}

fn prefill(model: &Shapes, widths: Widths, shape: PrefillShape) -> Case {
    let Widths { heads, latent, nope, rope, value, dtype } = widths;
    let new = shape.lens();
    let lens: Vec<usize> = new.iter().map(|new| new + shape.prefix).collect();
    let (queries, keys) = (new.iter().sum::<usize>(), lens.iter().sum::<usize>());
    let pairs: usize = new.iter().map(|new| new * shape.prefix + new * (new + 1) / 2).sum();
    let weight = heads * (nope + value) * latent;
    let bytes = (queries * heads * (nope + rope + value) + keys * (latent + rope) + weight) * model.size();
    // Attention, and the keys and values that it attends to.
    let flops = 2 * pairs * heads * (nope + rope + value) + 2 * keys * weight;
    let scale = ((nope + rope) as f32).sqrt().recip();
    let starts: Vec<usize> = (0..=new.len()).map(|end| new[..end].iter().sum()).collect();
    let prepare = each(move |lab| {
        let q = lab.random(&[queries, heads * (nope + rope)], dtype)?;
        let q_pe = lab.random(&[queries, heads * rope], dtype)?;
        let kv_b_proj = lab.random(&[heads, nope + value, latent], dtype)?;
        let cache = Cache::new(lab, widths, &lens)?;
        let (starts, lens, mut plan) = (as_i32(&starts), as_i32(&lens), vec![]);
        ops::attention_prefill_plan(&starts, &lens, &mut plan);
        let (starts, lens, plan) = (lab.tensor(&starts)?, lab.tensor(&lens)?, lab.tensor(&plan)?);
        Ok(Box::new(move |cx| {
            let input = MlaPrefill {
                q: &q,
                q_pe: &q_pe,
                kv_b_proj: &kv_b_proj,
                kv: cache.view(),
                cu_seqlens_q: &starts,
                kv_lens: &lens,
                plan: &plan,
                scale,
                workspace_bytes: 128 << 20,
            };
            Ok(vec![ops::mla_prefill(cx, &input)?])
        }))
    });
    model.case("mla_prefill", shape.to_string(), bytes, flops, prepare)
}
