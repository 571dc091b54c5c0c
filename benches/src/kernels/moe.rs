//! Mixture of experts: the products of the experts, each with the rows that chose it.

use anyhow::Result;
use bcg_kernels::{self as ops, Choices, ExpertPlan, Routing, Scores, Scoring};
use bcg_runtime::DType;

use super::KernelsArgs;
use super::attention::as_i32;
use super::cases::{Case, Shapes, each};
use super::lab::Lab;

/// Which experts each token has, drawn at random, and what that touches.
#[derive(Clone)]
struct Choice {
    tokens: usize,
    chosen: usize,
    /// `[T, K]`.
    experts: Vec<usize>,
    num_experts: usize,
}

impl Choice {
    fn new(tokens: usize, chosen: usize, num_experts: usize) -> Self {
        let (mut experts, mut state) = (Vec::with_capacity(tokens * chosen), 1_u64);
        for _ in 0..tokens {
            let first = experts.len();
            while experts.len() < first + chosen {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let expert = (state >> 33) as usize % num_experts;
                if !experts[first..].contains(&expert) {
                    experts.push(expert);
                }
            }
        }
        Self { tokens, chosen, experts, num_experts }
    }

    /// Experts that some token has.
    fn num_touched(&self) -> usize {
        (0..self.num_experts).filter(|expert| self.experts.contains(expert)).count()
    }

    /// What the router would make of it.
    fn plan(&self, lab: &Lab) -> Result<ExpertPlan> {
        let mut rows: Vec<i32> = (0..self.experts.len() as i32).collect();
        rows.sort_by_key(|&row| self.experts[row as usize]);
        let mut places = vec![0; rows.len()];
        rows.iter().enumerate().for_each(|(place, &row)| places[row as usize] = place as i32);
        let before = |expert| self.experts.iter().filter(|&&chosen| chosen < expert).count() as i32;
        let offsets: Vec<i32> = (0..=self.num_experts).map(before).collect();
        Ok(ExpertPlan {
            offsets: lab.tensor(&offsets)?,
            rows: lab.tensor(&rows)?,
            places: lab.tensor(&places)?.reshape(&[self.tokens, self.chosen])?,
            chosen_among: self.num_experts,
        })
    }
}

/// The cases of a model with such layers.
pub(super) fn cases(model: &Shapes, args: &KernelsArgs) -> Result<Vec<Case>> {
    let count = |fields: [&str; 2]| model.count(fields[0]).or_else(|_| model.count(fields[1]));
    let (num_experts, chosen) = (count(["num_experts", "n_routed_experts"])?, model.count("num_experts_per_tok")?);
    let inner = model.count("moe_intermediate_size")?;
    let of_rows = |&tokens: &usize| {
        let choice = Choice::new(tokens, chosen, num_experts);
        [route(model, &choice), gate_up(model, &choice, inner), down(model, &choice, inner), combine(model, &choice)]
    };
    Ok(args.tokens.iter().flat_map(of_rows).collect())
}

/// The choice of experts and their order, as one op.
fn route(model: &Shapes, choice: &Choice) -> Case {
    let &Choice { tokens, chosen, num_experts, .. } = choice;
    let bytes = (tokens * (num_experts + 4 * chosen) + num_experts) * size_of::<f32>();
    let prepare = each(move |lab| {
        let (logits, num_valid) = (lab.random(&[tokens, num_experts], DType::F32)?, lab.tensor(&[tokens as i32])?);
        let (groups, kept_groups) = (1, 1);
        let (scores, is_renormalised, scale) = (Scores::Softmax, true, 1.0);
        let scoring = Scoring { scores, chosen, groups, kept_groups, is_renormalised, scale };
        Ok(Box::new(move |cx| {
            let Routing { choices, plan, .. } = ops::moe_route(cx, &logits, &scoring, &num_valid, 0..num_experts)?;
            Ok(vec![choices.experts, choices.weights, plan.offsets, plan.rows, plan.places])
        }))
    });
    model.case("moe_route", format!("T={tokens}"), bytes, 0, prepare)
}

fn combine(model: &Shapes, choice: &Choice) -> Case {
    let (choice, dtype, hidden) = (choice.clone(), model.config.dtype, model.config.hidden_size);
    let (tokens, rows) = (choice.tokens, choice.experts.len());
    let bytes = (tokens + rows) * hidden * model.size() + 2 * rows * size_of::<f32>();
    let prepare = each(move |lab| {
        let y = lab.random(&[rows, hidden], dtype)?;
        let experts = lab.tensor(&as_i32(&choice.experts))?.reshape(&[tokens, choice.chosen])?;
        let weights = lab.random(&[tokens, choice.chosen], DType::F32)?;
        let num_valid = lab.tensor(&[tokens as i32])?;
        let routing = Routing { choices: Choices { experts, weights }, plan: choice.plan(lab)?, num_valid };
        Ok(Box::new(move |cx| Ok(vec![ops::moe_combine(cx, &y, &routing, None)?])))
    });
    model.case("moe_combine", format!("T={tokens}"), bytes, 0, prepare)
}

fn gate_up(model: &Shapes, choice: &Choice, inner: usize) -> Case {
    let (choice, dtype, hidden) = (choice.clone(), model.config.dtype, model.config.hidden_size);
    let (tokens, rows) = (choice.tokens, choice.experts.len());
    let weights = choice.num_touched() * 2 * inner * hidden;
    let bytes = (weights + tokens * hidden + rows * inner) * model.size();
    let flops = 4 * rows * inner * hidden;
    let prepare = each(move |lab| {
        let x = lab.random(&[tokens, hidden], dtype)?;
        let weight = lab.random(&[choice.num_experts, 2 * inner, hidden], dtype)?;
        let plan = choice.plan(lab)?;
        Ok(Box::new(move |cx| Ok(vec![ops::grouped_gate_up(cx, &x, &weight, &plan)?])))
    });
    model.case("grouped_gate_up", format!("T={tokens}"), bytes, flops, prepare)
}

fn down(model: &Shapes, choice: &Choice, inner: usize) -> Case {
    let (choice, dtype, hidden) = (choice.clone(), model.config.dtype, model.config.hidden_size);
    let (tokens, rows) = (choice.tokens, choice.experts.len());
    let bytes = (choice.num_touched() * inner * hidden + rows * (inner + hidden)) * model.size();
    let flops = 2 * rows * inner * hidden;
    let prepare = each(move |lab| {
        let x = lab.random(&[rows, inner], dtype)?;
        let weight = lab.random(&[choice.num_experts, hidden, inner], dtype)?;
        let plan = choice.plan(lab)?;
        Ok(Box::new(move |cx| Ok(vec![ops::grouped_linear(cx, &x, &weight, &plan)?])))
    });
    model.case("grouped_linear", format!("T={tokens}"), bytes, flops, prepare)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_has_different_experts() {
        let choice = Choice::new(40, 8, 16);
        for experts in choice.experts.chunks(8) {
            let mut sorted = experts.to_vec();
            sorted.sort_unstable();
            sorted.dedup();
            assert_eq!(sorted.len(), 8);
        }
        assert_eq!((choice.num_touched(), Choice::new(1, 8, 128).num_touched()), (16, 8));
    }
}
