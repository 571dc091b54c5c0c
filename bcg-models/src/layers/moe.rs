//! A mixture of experts in place of an MLP.
//!
//! Everything is captured: a router's choice stays on the device, and launches depend on the number of padded rows
//! alone. Padded rows choose no expert.
//!
//! Of several ranks each has a share of every expert, or some experts, whole. All have all rows, so what a rank's experts
//! make of them is a partial sum, and the next norm adds up those of all ranks. The ways in which rows are sent instead give
//! the same bits as long as the router does, which on GPUs may depend on the number of rows that it is given at once.

use std::ops::Range;

use bcg_kernels::{self as ops, Choices, Routing, Scores, Scoring};
use bcg_runtime::{Context, Eager, OpStream, Result, Tensor, eager_on_graph};

use super::{Linear, Mlp};
use crate::batch::ForwardBatch;
use crate::config::{Fields, ModelConfig};
use crate::weights::{Divided, Experts, MoeA2a, Part, Section, Split, Weights};

/// The most experts that the kernels choose among, and the most that they choose for a token.
const EXPERTS_MAX: usize = 512;
const CHOSEN_MAX: usize = 32;

/// A mixture of experts, as a configuration describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeConfig {
    /// Experts, E.
    pub num_experts: usize,
    /// The field that has E.
    pub num_experts_field: &'static str,
    /// Experts chosen for each token, K.
    pub chosen: usize,
    /// The width of an expert, I.
    pub inner: usize,
    /// The width of the experts that every token has, as one MLP; `None` if there are none.
    pub shared_inner: Option<usize>,
    /// Groups of experts, and how many of them a token's experts are chosen from.
    pub groups: [usize; 2],
    /// Whether scores are sigmoids with a correction bias (`noaux_tc`), or else a softmax.
    pub is_sigmoid: bool,
    /// Whether weights are divided by their sum.
    pub is_renormalised: bool,
    /// Multiplies the weights.
    pub scale: f32,
}

impl MoeConfig {
    /// Reads the fields of Qwen3-MoE's or of DeepSeek's configuration, and refuses what the layer cannot honour.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) names the field.
    pub fn read(config: &ModelConfig) -> crate::Result<Self> {
        let fields = &config.fields;
        fields.refuse_other("hidden_act", "silu", "no other activation is implemented")?;
        let inner = fields.count("moe_intermediate_size")?;
        let is_sigmoid = is_sigmoid(config)?;
        let scale = match fields.number("routed_scaling_factor")? {
            None if is_sigmoid => {
                let remedy = "the file is cut short";
                return Err(fields.error("routed_scaling_factor", "a positive number", "nothing", remedy));
            }
            scale => scale.unwrap_or(1.0) as f32,
        };
        let (num_experts_field, num_experts) = num_experts(fields)?;
        let read = Self {
            num_experts,
            num_experts_field,
            chosen: fields.count("num_experts_per_tok")?,
            inner,
            shared_inner: fields.optional_count("n_shared_experts")?.map(|experts| experts * inner),
            groups: groups(fields, is_sigmoid)?,
            is_sigmoid,
            is_renormalised: fields.flag("norm_topk_prob")?,
            scale,
        };
        read.check(fields)?;
        Ok(read)
    }

    /// What ranks divide of a mixture: the channels of each expert, or the experts, and then the channels of shared ones only.
    pub fn divided(&self, experts: Experts) -> Vec<Divided> {
        let channels = Divided::new("moe_intermediate_size", self.inner);
        let whole = Divided::new(self.num_experts_field, self.num_experts);
        match (experts, self.shared_inner) {
            (Experts::ByChannels, _) => vec![channels],
            (Experts::Whole(_), None) => vec![whole],
            (Experts::Whole(_), Some(_)) => vec![whole, channels],
        }
    }

    /// Refuses numbers that do not fit together.
    fn check(&self, fields: &Fields) -> crate::Result<()> {
        const REMEDY: &str = "check the checkpoint's conversion";
        let [groups, kept] = self.groups;
        let least = if self.is_sigmoid && groups > 1 { 2 } else { 1 };
        if !self.num_experts.is_multiple_of(groups) || self.num_experts / groups < least {
            let expected = format!("groups of equal size, of at least {least} of {} experts", self.num_experts);
            return Err(fields.error("n_group", expected, groups, REMEDY));
        }
        if kept > groups {
            return Err(fields.error("topk_group", format!("at most n_group = {groups}"), kept, REMEDY));
        }
        let most = CHOSEN_MAX.min(self.num_experts / groups * kept);
        if self.chosen > most {
            return Err(fields.error("num_experts_per_tok", format!("at most {most}"), self.chosen, REMEDY));
        }
        Ok(())
    }
}

/// E, and the name that the family has for it.
fn num_experts(fields: &Fields) -> crate::Result<(&'static str, usize)> {
    const NAMES: [&str; 3] = ["num_experts", "num_local_experts", "n_routed_experts"];
    let name = NAMES.into_iter().find(|name| fields.get(name).is_some()).unwrap_or(NAMES[0]);
    let count = fields.count(name)?;
    if count > EXPERTS_MAX {
        let remedy = "the routing kernel chooses among no more";
        return Err(fields.error(name, format!("at most {EXPERTS_MAX}"), count, remedy));
    }
    Ok((name, count))
}

/// Whether the router's scores are biased sigmoids. DeepSeek-V3 is known by its name: transformers writes neither its
/// `topk_method` nor its `scoring_func`.
fn is_sigmoid(config: &ModelConfig) -> crate::Result<bool> {
    let fields = &config.fields;
    let is_v3 = config.architecture == "DeepseekV3ForCausalLM";
    let is_sigmoid = match fields.get("topk_method").map(|method| (method, method.as_str())) {
        None => is_v3,
        Some((_, Some("noaux_tc"))) => true,
        Some((_, Some("greedy" | "group_limited_greedy"))) if !is_v3 => false,
        Some((method, _)) => {
            let expected = if is_v3 { "\"noaux_tc\"" } else { "\"greedy\", \"group_limited_greedy\" or \"noaux_tc\"" };
            return Err(fields.error("topk_method", expected, method, "no other choice is implemented"));
        }
    };
    let function = if is_sigmoid { "sigmoid" } else { "softmax" };
    fields.refuse_other("scoring_func", function, "no other scores go with this `topk_method`")?;
    if config.architecture == "DeepseekV2ForCausalLM" {
        fields.refuse_flag("norm_topk_prob", "implementations of this family disagree about it")?;
    }
    Ok(is_sigmoid)
}

/// `n_group` and `topk_group`, where the router has groups.
fn groups(fields: &Fields, is_sigmoid: bool) -> crate::Result<[usize; 2]> {
    let has_groups = fields.get("topk_method").and_then(|method| method.as_str()) == Some("group_limited_greedy");
    if !is_sigmoid && !has_groups {
        return Ok([1, 1]);
    }
    let groups = fields.count("n_group")?;
    if groups > 32 {
        return Err(fields.error("n_group", "at most 32", groups, "the routing kernel knows no more groups"));
    }
    Ok([groups, fields.count("topk_group")?])
}

/// One layer's router, the same on every rank, and experts: of each, a rank has its share of the channels, or else it has its
/// share of the experts.
#[derive(Debug)]
pub struct Moe {
    gate: Linear,
    scoring: Scoring,
    /// The experts that this rank has anything of, of so many.
    own: Range<usize>,
    num_experts: usize,
    a2a: MoeA2a,
    /// `[E, 2 I, C]` of these E experts: of each the channels of this rank, first those of `gate_proj`, then those of
    /// `up_proj`.
    gate_up_proj: Tensor,
    /// `[E, C, I]`.
    down_proj: Tensor,
    shared_experts: Option<Mlp>,
}

impl Moe {
    /// Takes `gate`, the `experts` and, where the configuration has them, `shared_experts` under `name`.
    ///
    /// # Errors
    /// Those of [`MoeConfig::read`] and of [`Weights::take`].
    pub fn load(weights: &mut Weights<'_>, name: &str, config: &ModelConfig) -> crate::Result<Self> {
        let moe = MoeConfig::read(config)?;
        let (num_experts, hidden, inner) = (moe.num_experts, config.hidden_size, moe.inner);
        let gate = Linear::load(weights, &format!("{name}.gate"), num_experts, hidden)?;
        let scores = if moe.is_sigmoid {
            Scores::Sigmoid { bias: weights.take_f32(&format!("{name}.gate.e_score_correction_bias"), &[num_experts])? }
        } else {
            Scores::Softmax
        };
        let [groups, kept_groups] = moe.groups;
        let (is_renormalised, scale) = (moe.is_renormalised, moe.scale);
        let shared_experts = format!("{name}.shared_experts");
        let shared = moe.shared_inner.map(|inner| Mlp::load_sized(weights, &shared_experts, hidden, inner));
        let shard = weights.shard();
        let channels = [Section { units: inner, rows: 1 }];
        let (own, a2a, rows, columns) = match shard.experts {
            Experts::ByChannels => (0..num_experts, MoeA2a::None, Split::Rows(&channels), Split::Columns),
            Experts::Whole(a2a) => (shard.range(num_experts), a2a, Split::Whole, Split::Whole),
        };
        let mut take = |matrices: &[&str], shape, split| {
            take_experts(weights, name, (num_experts, &own), matrices, (shape, split))
        };
        let gate_up_proj = take(&["gate_proj", "up_proj"], [inner, hidden], rows)?;
        let down_proj = take(&["down_proj"], [hidden, inner], columns)?;
        Ok(Self {
            gate,
            scoring: Scoring { scores, chosen: moe.chosen, groups, kept_groups, is_renormalised, scale },
            own,
            num_experts,
            a2a,
            gate_up_proj,
            down_proj,
            shared_experts: shared.transpose()?,
        })
    }

    /// `[T, C]` to partial sums, `[T, C]`; rows from `num_valid`, `[1]` i32, on become zeros.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn forward(&self, cx: &mut Context<'_, ForwardBatch>, x: &Tensor, num_valid: &Tensor) -> Result<Tensor> {
        let num_ranks = cx.world_size();
        // Rows that the ranks cannot share evenly are not pushed: they are few, or the last ones of a prompt.
        let is_shared = num_ranks > 1 && x.dim(0).is_multiple_of(num_ranks);
        match self.a2a {
            MoeA2a::Push if is_shared => self.forward_pushed(cx, x, num_valid),
            MoeA2a::Break => self.forward_in_break(cx, x, num_valid),
            _ => self.forward_own(cx, x, num_valid),
        }
    }

    /// What this rank's experts make of all rows, none of which is sent.
    fn forward_own(&self, cx: &mut OpStream, x: &Tensor, num_valid: &Tensor) -> Result<Tensor> {
        let logits = self.gate.forward_f32(cx, x)?; // [T, E]
        let routing = ops::moe_route(cx, &logits, &self.scoring, num_valid, self.own.clone())?;
        drop(logits);
        let y = self.experts(cx, x, &routing)?; // [T K, C]
        let shared = self.shared(cx, x)?;
        ops::moe_combine(cx, &y, &routing, shared.as_ref())
    }

    /// Sends each row to the ranks that own its experts, and takes the sums that come back.
    fn forward_pushed(&self, cx: &mut OpStream, x: &Tensor, num_valid: &Tensor) -> Result<Tensor> {
        let (own_rows, sent) = self.choose_for_share(cx, x, num_valid)?;
        let (rows, choices) = ops::moe_dispatch(cx, &own_rows, &sent, self.num_experts)?; // [T, C]
        let routing = self.order(cx, choices, num_valid)?;
        let y = self.experts(cx, &rows, &routing)?; // [T K, C]
        drop(rows);
        let shared = self.shared(cx, x)?;
        ops::moe_return(cx, &y, &routing, &sent, shared.as_ref())
    }

    /// The same with two breaks, in each of which every rank sends every other one as much, whatever was chosen. Every number of
    /// rows has them, since the graphs of all sizes must have the same breaks: rows are added that the ranks can share.
    fn forward_in_break(&self, cx: &mut Context<'_, ForwardBatch>, x: &Tensor, num_valid: &Tensor) -> Result<Tensor> {
        let num_rows = x.dim(0);
        let wide = num_rows.next_multiple_of(cx.world_size());
        let mut x = x.clone();
        if wide > num_rows {
            let added = cx.empty(&[wide, x.dim(1)], x.dtype())?;
            cx.copy(&added.rows(0..num_rows)?, &x)?;
            x = added;
        }
        let (own_rows, sent) = self.choose_for_share(cx, &x, num_valid)?;
        let message = ops::moe_pack(cx, &own_rows, &sent, self.num_experts)?;
        let came = exchange_rows(cx, &message)?;
        drop(message);
        let (rows, choices) = ops::moe_unpack(cx, &came, x.dim(1), self.scoring.chosen)?; // [T, C]
        drop(came);
        let routing = self.order(cx, choices, num_valid)?;
        let y = self.experts(cx, &rows, &routing)?; // [T K, C]
        drop(rows);
        let shared = self.shared(cx, &x)?;
        let parts = ops::moe_combine(cx, &y, &routing, shared.as_ref())?; // [T, C]
        drop(y);
        let parts = exchange_rows(cx, &parts)?;
        ops::moe_place(cx, &parts)?.rows(0..num_rows)
    }

    /// This rank's share of the rows, and the experts that these choose.
    fn choose_for_share(&self, cx: &mut OpStream, x: &Tensor, num_valid: &Tensor) -> Result<(Tensor, Choices)> {
        let share = x.dim(0) / cx.world_size();
        let first = cx.rank() * share;
        let rows = x.rows(first..first + share)?; // [T / W, C]
        let logits = self.gate.forward_f32(cx, &rows)?; // [T / W, E]
        let choices = ops::moe_choose(cx, &logits, &self.scoring, num_valid, first)?;
        Ok((rows, choices))
    }

    /// Orders choices that came from all ranks.
    fn order(&self, cx: &mut OpStream, choices: Choices, num_valid: &Tensor) -> Result<Routing> {
        let plan = ops::moe_permute(cx, &choices.experts, self.num_experts, self.own.clone())?;
        Ok(Routing { choices, plan, num_valid: num_valid.clone() })
    }

    /// What this rank's experts make of rows, in the order of the plan.
    fn experts(&self, cx: &mut OpStream, x: &Tensor, routing: &Routing) -> Result<Tensor> {
        let gated = ops::grouped_gate_up(cx, x, &self.gate_up_proj, &routing.plan)?; // [T K, I]
        ops::grouped_linear(cx, &gated, &self.down_proj, &routing.plan)
    }

    /// This rank's part of what the shared experts make of all rows, `[T, C]`.
    fn shared(&self, cx: &mut OpStream, x: &Tensor) -> Result<Option<Tensor>> {
        self.shared_experts.as_ref().map(|mlp| mlp.forward(cx, x)).transpose()
    }
}

/// Sends each rank its part of the rows `[W N, M]`, and returns those that come.
fn exchange_rows(cx: &mut Context<'_, ForwardBatch>, rows: &Tensor) -> Result<Tensor> {
    let [count, columns] = [rows.dim(0), rows.dim(1)];
    exchange(cx, &rows.reshape(&[1, count, columns])?)?.reshape(&[count, columns])
}

/// Sends each rank its part of the rows `[1, W N, M]`, and returns those that come. They are not in the order of the batch, so
/// what comes has a dimension ahead, lest the runtime zeroes the last of them as padded rows.
#[eager_on_graph(rank_coupled, stub = undefined)]
fn exchange(cx: &mut Eager<'_, ForwardBatch>, rows: &Tensor) -> Result<Tensor> {
    let came = ops::all_to_all(cx, &rows.reshape(&rows.shape()[1..])?)?;
    came.reshape(rows.shape())
}

/// What comes of an exchange, not yet defined: while ranks capture, nothing runs.
fn undefined(cx: &mut Eager<'_, ForwardBatch>, rows: &Tensor) -> Result<Tensor> {
    cx.empty(rows.shape(), rows.dtype())
}

/// Takes this rank's share of matrices of its `own` experts, those of one expert on top of each other, as
/// `[E, rows, columns]`, and leaves out those of the others.
fn take_experts(
    weights: &mut Weights<'_>,
    name: &str,
    (num_experts, own): (usize, &Range<usize>),
    matrices: &[&str],
    (shape, split): ([usize; 2], Split<'_>),
) -> crate::Result<Tensor> {
    let names = |experts: Range<usize>| -> Vec<String> {
        let of_expert = |expert| matrices.iter().map(move |matrix| format!("{name}.experts.{expert}.{matrix}.weight"));
        experts.flat_map(of_expert).collect()
    };
    names(0..own.start).iter().for_each(|name| weights.skip(name));
    let names_of_own = names(own.clone());
    let parts: Vec<_> = names_of_own.iter().map(|name| Part { name, shape: &shape, split }).collect();
    let taken = weights.take_rows(&parts)?;
    names(own.end..num_experts).iter().for_each(|name| weights.skip(name));
    Ok(taken.reshape(&[own.len(), taken.dim(0) / own.len(), taken.dim(1)])?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bcg_runtime::DType;
    use serde_json::{Value, json};

    fn read(architecture: &str, changes: &Value) -> crate::Result<MoeConfig> {
        let mut root = json!({"moe_intermediate_size": 96, "num_experts_per_tok": 2, "norm_topk_prob": true});
        for (key, value) in changes.as_object().expect("an object") {
            root[key] = value.clone();
        }
        MoeConfig::read(&ModelConfig {
            architecture: architecture.to_owned(),
            dtype: DType::Bf16,
            hidden_size: 64,
            vocab_size: 8,
            max_position_embeddings: 8,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: false,
            eos_token_ids: vec![],
            fields: Fields::new("config.json", root),
        })
    }

    const QWEN3: &str = "Qwen3MoeForCausalLM";
    const V2: &str = "DeepseekV2ForCausalLM";
    const V3: &str = "DeepseekV3ForCausalLM";

    #[test]
    fn each_family_has_its_router() {
        let softmax = MoeConfig {
            num_experts: 8,
            num_experts_field: "num_experts",
            chosen: 2,
            inner: 96,
            shared_inner: None,
            groups: [1, 1],
            is_sigmoid: false,
            is_renormalised: true,
            scale: 1.0,
        };
        for name in ["num_experts", "num_local_experts"] {
            let expected = MoeConfig { num_experts_field: name, ..softmax.clone() };
            assert_eq!(read(QWEN3, &json!({name: 8})).expect(name), expected);
        }
        let softmax = MoeConfig { num_experts_field: "n_routed_experts", ..softmax };
        let v2 = json!({"n_routed_experts": 8, "topk_method": "greedy", "scoring_func": "softmax", "n_group": 4,
            "topk_group": 2, "n_shared_experts": 2, "norm_topk_prob": false, "routed_scaling_factor": 16.0});
        let greedy = MoeConfig { shared_inner: Some(192), is_renormalised: false, scale: 16.0, ..softmax.clone() };
        assert_eq!(read(V2, &v2).expect("greedy"), greedy);
        let mut grouped = v2;
        grouped["topk_method"] = json!("group_limited_greedy");
        assert_eq!(read(V2, &grouped).expect("grouped"), MoeConfig { groups: [4, 2], ..greedy });
        let v3 = json!({"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
            "routed_scaling_factor": 2.5});
        let sigmoid =
            MoeConfig { shared_inner: Some(96), groups: [4, 2], is_sigmoid: true, scale: 2.5, ..softmax.clone() };
        assert_eq!(read(V3, &v3).expect("sigmoid"), sigmoid);
    }

    #[test]
    fn what_cannot_be_honoured_is_refused() {
        let v3 = |field: &str, value: Value| {
            let mut root = json!({"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.0});
            root[field] = value;
            (V3, field.to_owned(), root)
        };
        for (architecture, field, root) in [
            (QWEN3, "num_experts".to_owned(), json!({})),
            (QWEN3, "num_experts".to_owned(), json!({"num_experts": 513})),
            (QWEN3, "num_experts_per_tok".to_owned(), json!({"num_experts": 1})),
            (QWEN3, "hidden_act".to_owned(), json!({"num_experts": 8, "hidden_act": "gelu"})),
            (QWEN3, "scoring_func".to_owned(), json!({"num_experts": 8, "scoring_func": "sigmoid"})),
            (V2, "norm_topk_prob".to_owned(), json!({"num_experts": 8})),
            (V2, "topk_method".to_owned(), json!({"num_experts": 8, "topk_method": "random"})),
            v3("topk_method", json!("greedy")),
            v3("n_group", json!(3)),
            v3("n_group", json!(8)),
            v3("topk_group", json!(5)),
            v3("topk_group", Value::Null),
            v3("routed_scaling_factor", Value::Null),
        ] {
            let error = read(architecture, &root).expect_err(&field).to_string();
            assert!(error.contains(&format!("field `{field}`")), "{error}");
        }
    }
}
