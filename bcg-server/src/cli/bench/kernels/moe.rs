//! Mixture of experts: the products of the experts, each with the rows that chose it.

use anyhow::Result;
use bcg_models::ops::{self, ExpertPlan};

use super::KernelsArgs;
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
        [gate_up(model, &choice, inner), down(model, &choice, inner)]
    };
    Ok(args.tokens.iter().flat_map(of_rows).collect())
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
