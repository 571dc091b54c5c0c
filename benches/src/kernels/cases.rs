//! What is timed: each op at each shape, with the bytes and operations that it cannot do without.

use anyhow::Result;
use bcg_kernels::{self as ops, QkNormRopeKvWrite, SampleInputs};
use bcg_models::ModelConfig;
use bcg_models::layers::{Heads, rope_theta};
use bcg_runtime::{DType, DeviceKind, Tensor};

use super::KernelsArgs;
use super::lab::{Lab, Launch};
use super::{attention, latent, mamba, moe};

/// Makes this many launches of an op, each with buffers of its own.
pub(super) type Prepare = Box<dyn Fn(&mut Lab, usize) -> Result<Vec<Launch>>>;

/// Tokens of a page.
pub(super) const PAGE: usize = 16;

/// One op at one shape.
pub(super) struct Case {
    /// The op's name.
    pub(super) op: &'static str,
    /// Whose shapes these are.
    pub(super) model: String,
    /// What differs between the cases of an op and a model.
    pub(super) shape: String,
    /// Bytes of the inputs and outputs, each counted once.
    pub(super) bytes: usize,
    /// Floating-point operations of the matrix products.
    pub(super) flops: usize,
    /// Whether the launches are captured. A copy that is not goes another way through the chip, which is faster.
    pub(super) in_graph: bool,
    /// Rows for which matrix products are tuned before.
    pub(super) tuned_rows: Option<usize>,
    /// Makes the launches.
    pub(super) prepare: Prepare,
}

impl Case {
    /// The name under which a peer reports the same work.
    pub(super) fn key(&self) -> String {
        format!("{}/{}/{}", self.op, self.model, self.shape)
    }
}

/// Makes a list of launches by calling `launch` once for each.
pub(super) fn each(launch: impl Fn(&mut Lab) -> Result<Launch> + 'static) -> Prepare {
    Box::new(move |lab, count| (0..count).map(|_| launch(lab)).collect())
}

/// Bytes of the ceiling's copy, and rows, columns and depth of its product.
const COPY_BYTES: usize = 1 << 30;
const PRODUCT: usize = 8192;

/// A copy of 1 GiB within the device (1 MiB on the host device).
pub(super) fn large_copy() -> Case {
    Case {
        op: "copy",
        model: "ceiling".to_owned(),
        shape: "1 GiB".to_owned(),
        bytes: 2 * COPY_BYTES,
        flops: 0,
        in_graph: false,
        tuned_rows: None,
        prepare: each(|lab| {
            let len = if lab.device().kind() == DeviceKind::Host { 1 << 20 } else { COPY_BYTES };
            let (from, to) = (lab.random(&[len / 2], DType::Bf16)?, lab.device().empty(&[len / 2], DType::Bf16)?);
            Ok(Box::new(move |cx| cx.copy(&to, &from).map(|()| Vec::new())))
        }),
    }
}

/// A product of two bf16 matrices of 8192 x 8192 (64 x 64 on the host device).
pub(super) fn large_product() -> Case {
    Case {
        op: "linear",
        model: "ceiling".to_owned(),
        shape: "8192x8192x8192".to_owned(),
        bytes: 3 * 2 * PRODUCT * PRODUCT,
        flops: 2 * PRODUCT * PRODUCT * PRODUCT,
        in_graph: true,
        tuned_rows: Some(PRODUCT),
        prepare: each(|lab| {
            let side = if lab.device().kind() == DeviceKind::Host { 64 } else { PRODUCT };
            let (x, weight) = (lab.random(&[side, side], DType::Bf16)?, lab.random(&[side, side], DType::Bf16)?);
            Ok(Box::new(move |cx| Ok(vec![ops::linear(cx, &x, &weight)?])))
        }),
    }
}

/// The cases of one model: those of every model, and those of the layers that it has.
///
/// # Errors
/// [`bcg_models::Error::Config`] for a field of those layers that is absent.
pub(super) fn of_model(name: &str, config: &ModelConfig, args: &KernelsArgs) -> Result<Vec<Case>> {
    let model = Shapes { name: name.to_owned(), config: config.clone() };
    let has = |field| config.fields.get(field).is_some();
    let mut cases = Vec::new();
    for &tokens in &args.tokens {
        cases.extend([model.gather_rows(tokens), model.rms_norm(tokens), model.add_rms_norm(tokens)]);
    }
    if has("kv_lora_rank") {
        cases.extend(latent::cases(&model, args)?);
    } else {
        cases.extend(model.attention(args)?);
    }
    if has("mamba_num_heads") {
        cases.extend(mamba::cases(&model, args)?);
    } else if has("num_experts_per_tok") {
        cases.extend(moe::cases(&model, args)?);
    } else {
        cases.extend(model.mlp(args)?);
    }
    for &rows in &args.logits {
        cases.extend([model.lm_head(rows), model.argmax(rows), model.sample(rows)]);
    }
    Ok(cases)
}

/// A model's name and geometry.
#[derive(Clone)]
pub(super) struct Shapes {
    pub(super) name: String,
    pub(super) config: ModelConfig,
}

impl Shapes {
    pub(super) fn case(&self, op: &'static str, shape: String, bytes: usize, flops: usize, prepare: Prepare) -> Case {
        Case { op, model: self.name.clone(), shape, bytes, flops, in_graph: true, tuned_rows: None, prepare }
    }

    /// A count in `config.json`.
    pub(super) fn count(&self, field: &str) -> Result<usize> {
        Ok(self.config.fields.count(field)?)
    }

    /// Grouped-query attention with its projections.
    fn attention(&self, args: &KernelsArgs) -> Result<Vec<Case>> {
        let (hidden, heads) = (self.config.hidden_size, Heads::read(&self.config)?);
        let (q_width, kv_width) = (heads.q * heads.dim, heads.kv * heads.dim);
        let mut cases = Vec::new();
        for &tokens in &args.tokens {
            if let Ok(theta) = rope_theta(&self.config.fields) {
                cases.push(self.qk_norm_rope_kv_write(tokens, heads, theta));
            }
            cases.push(self.projection("qkv_proj", [tokens, q_width + 2 * kv_width, hidden]));
            cases.push(self.projection("o_proj", [tokens, hidden, q_width]));
        }
        cases.extend(args.prefill.iter().map(|shape| attention::prefill(self, heads, *shape)));
        cases.extend(args.decode.iter().map(|shape| attention::decode(self, heads, *shape)));
        Ok(cases)
    }

    /// The gated MLP.
    fn mlp(&self, args: &KernelsArgs) -> Result<Vec<Case>> {
        let (hidden, inner) = (self.config.hidden_size, self.count("intermediate_size")?);
        let of_rows = |&tokens: &usize| {
            [
                self.silu_mul(tokens, inner),
                self.projection("gate_up_proj", [tokens, 2 * inner, hidden]),
                self.projection("down_proj", [tokens, hidden, inner]),
            ]
        };
        Ok(args.tokens.iter().flat_map(of_rows).collect())
    }

    /// A projection of a layer: rows, outputs and depth.
    pub(super) fn projection(&self, name: &str, sides: [usize; 3]) -> Case {
        self.product(format!("{name} T={}", sides[0]), sides, self.config.dtype)
    }

    /// Bytes of an element.
    pub(super) fn size(&self) -> usize {
        self.config.dtype.size_bytes()
    }

    fn gather_rows(&self, tokens: usize) -> Case {
        let ModelConfig { vocab_size, hidden_size, dtype, .. } = self.config;
        let bytes = tokens * (4 + 2 * hidden_size * self.size());
        let prepare: Prepare = Box::new(move |lab, count| {
            let table = lab.random(&[vocab_size, hidden_size], dtype)?;
            let launch = |lab: &Lab, index: usize| -> Result<Launch> {
                let id = |row: usize| (((index * tokens + row) * 7919) % vocab_size) as i32;
                let (ids, table) = (lab.tensor(&(0..tokens).map(id).collect::<Vec<_>>())?, table.clone());
                Ok(Box::new(move |cx| Ok(vec![ops::gather_rows(cx, &table, &ids)?])))
            };
            (0..count).map(|index| launch(lab, index)).collect()
        });
        self.case("gather_rows", format!("T={tokens}"), bytes, 0, prepare)
    }

    fn rms_norm(&self, tokens: usize) -> Case {
        let ModelConfig { hidden_size, dtype, rms_norm_eps: eps, .. } = self.config;
        let bytes = (2 * tokens + 1) * hidden_size * self.size();
        let prepare = each(move |lab| {
            let (x, weight) = (lab.random(&[tokens, hidden_size], dtype)?, lab.random(&[hidden_size], dtype)?);
            Ok(Box::new(move |cx| Ok(vec![ops::rms_norm(cx, &x, &weight, eps)?])))
        });
        self.case("rms_norm", format!("T={tokens}"), bytes, 0, prepare)
    }

    fn add_rms_norm(&self, tokens: usize) -> Case {
        let ModelConfig { hidden_size, dtype, rms_norm_eps: eps, .. } = self.config;
        let bytes = (4 * tokens + 1) * hidden_size * self.size();
        let prepare = each(move |lab| {
            let shape = [tokens, hidden_size];
            let (x, residual) = (lab.random(&shape, dtype)?, lab.random(&shape, dtype)?);
            let weight = lab.random(&[hidden_size], dtype)?;
            Ok(Box::new(move |cx| {
                let (normed, sum) = ops::add_rms_norm(cx, &x, &residual, &weight, eps)?;
                Ok(vec![normed, sum])
            }))
        });
        self.case("add_rms_norm", format!("T={tokens}"), bytes, 0, prepare)
    }

    fn silu_mul(&self, tokens: usize, inner: usize) -> Case {
        let dtype = self.config.dtype;
        let bytes = 3 * tokens * inner * self.size();
        let prepare = each(move |lab| {
            let gate_up = lab.random(&[tokens, 2 * inner], dtype)?;
            Ok(Box::new(move |cx| Ok(vec![ops::silu_mul(cx, &gate_up)?])))
        });
        self.case("silu_mul", format!("T={tokens}"), bytes, 0, prepare)
    }

    fn qk_norm_rope_kv_write(&self, tokens: usize, heads: Heads, theta: f64) -> Case {
        let Heads { q: q_heads, kv: kv_heads, dim: head_dim } = heads;
        let ModelConfig { rms_norm_eps: eps, dtype, .. } = self.config;
        let width = (q_heads + 2 * kv_heads) * head_dim;
        // Everything that is read is written, as queries or into the cache.
        let bytes = tokens * (2 * width * self.size() + 8) + 2 * head_dim * self.size() + 2 * head_dim;
        let prepare = each(move |lab| {
            let qkv = lab.random(&[tokens, width], dtype)?;
            let (q_weight, k_weight) = (lab.random(&[head_dim], dtype)?, lab.random(&[head_dim], dtype)?);
            let inv_freq = lab.tensor(&ops::rope_inv_freq(theta, head_dim))?;
            let pages = [tokens.div_ceil(PAGE), PAGE, kv_heads, head_dim];
            let (k_cache, v_cache) = (lab.device().empty(&pages, dtype)?, lab.device().empty(&pages, dtype)?);
            let positions = lab.tensor(&(0..tokens as i32).collect::<Vec<_>>())?;
            let slots = positions.clone();
            Ok(Box::new(move |cx| {
                let inputs = QkNormRopeKvWrite {
                    qkv: &qkv,
                    q_weight: &q_weight,
                    k_weight: &k_weight,
                    inv_freq: &inv_freq,
                    positions: &positions,
                    slots: &slots,
                    k_cache: &k_cache,
                    v_cache: &v_cache,
                    eps,
                };
                Ok(vec![ops::qk_norm_rope_kv_write(cx, &inputs)?])
            }))
        });
        self.case("qk_norm_rope_kv_write", format!("T={tokens}"), bytes, 0, prepare)
    }

    fn lm_head(&self, rows: usize) -> Case {
        let sides = [rows, self.config.vocab_size, self.config.hidden_size];
        self.product(format!("lm_head T={rows}"), sides, DType::F32)
    }

    fn product(&self, shape: String, [rows, outputs, depth]: [usize; 3], out: DType) -> Case {
        let dtype = self.config.dtype;
        let bytes = (rows + outputs) * depth * self.size() + rows * outputs * out.size_bytes();
        let prepare = each(move |lab| {
            let (x, weight) = (lab.random(&[rows, depth], dtype)?, lab.random(&[outputs, depth], dtype)?);
            Ok(Box::new(move |cx| Ok(vec![ops::linear_to(cx, &x, &weight, out)?])))
        });
        let case = self.case("linear", shape, bytes, 2 * rows * outputs * depth, prepare);
        Case { tuned_rows: Some(rows), ..case }
    }

    fn argmax(&self, rows: usize) -> Case {
        let vocab = self.config.vocab_size;
        let prepare = each(move |lab| {
            let logits = lab.random(&[rows, vocab], DType::F32)?;
            Ok(Box::new(move |cx| Ok(vec![ops::argmax(cx, &logits)?])))
        });
        self.case("argmax", format!("B={rows}"), rows * (vocab + 1) * 4, 0, prepare)
    }

    fn sample(&self, rows: usize) -> Case {
        let vocab = self.config.vocab_size;
        let prepare = each(move |lab| {
            let logits = lab.random(&[rows, vocab], DType::F32)?;
            let all = |lab: &Lab, value: f32| lab.tensor(&vec![value; rows]);
            let (temperature, top_p, min_p) = (all(lab, 0.7)?, all(lab, 0.95)?, all(lab, 0.0)?);
            let top_k: Tensor = lab.tensor(&vec![50_i32; rows])?;
            let (seed, step) = (lab.tensor(&vec![1_i64; rows])?, lab.tensor(&vec![0_i64; rows])?);
            Ok(Box::new(move |cx| {
                let inputs = SampleInputs {
                    temperature: &temperature,
                    top_k: &top_k,
                    top_p: &top_p,
                    min_p: &min_p,
                    seed: &seed,
                    step: &step,
                };
                Ok(vec![ops::sample(cx, &logits, &inputs)?])
            }))
        });
        self.case("sample", format!("B={rows}"), rows * (vocab + 1) * 4, 0, prepare)
    }
}
