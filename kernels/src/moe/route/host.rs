//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::MoeRouteArgs;
use crate::float::row;

/// Writes experts and weights, and returns the experts.
pub(super) fn host(a: &MoeRouteArgs, memory: &HostMemory<'_>) -> Result<Vec<i32>> {
    let (num_experts, chosen) = (a.num_experts as usize, a.chosen as usize);
    let bias = if a.bias.is_null() { None } else { Some(memory.load::<f32>(a.bias, num_experts)?) };
    let num_valid = memory.load::<i32>(a.num_valid, 1)?[0];
    let mut experts = vec![-1; a.tokens as usize * chosen];
    let mut weights = vec![0.0; experts.len()];
    for t in 0..a.tokens as usize {
        if (a.first_row as usize + t) as i32 >= num_valid {
            break;
        }
        let logits = row::<f32>(memory, a.logits, a.logits_stride, t, num_experts)?;
        let logits: Vec<f32> = logits.iter().map(std::cell::Cell::get).collect();
        let (picked, picked_weights) = choose(a, &logits, bias.as_deref());
        for (k, (expert, weight)) in picked.into_iter().zip(picked_weights).enumerate() {
            experts[t * chosen + k] = expert as i32;
            weights[t * chosen + k] = weight;
        }
    }
    memory.store(a.experts, &experts)?;
    memory.store(a.weights, &weights)?;
    Ok(experts)
}

pub(super) fn host_fused(a: &MoeRouteArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let experts = host(a, memory)?;
    a.plan.write(memory, &experts)
}

/// The experts of one row, best first, and their weights.
pub(super) fn choose(a: &MoeRouteArgs, logits: &[f32], bias: Option<&[f32]>) -> (Vec<usize>, Vec<f32>) {
    let scores: Vec<f32> = match bias {
        Some(bias) => logits.iter().zip(bias).map(|(logit, bias)| sigmoid(*logit) + bias).collect(),
        None => logits.to_vec(),
    };
    let group_size = logits.len() / a.groups as usize;
    let group_scores: Vec<f32> = (0..a.groups as usize)
        .map(|g| {
            let best = best_first(&scores, g * group_size..(g + 1) * group_size);
            if bias.is_some() && group_size > 1 { scores[best[0]] + scores[best[1]] } else { scores[best[0]] }
        })
        .collect();
    let mut groups = best_first(&group_scores, 0..group_scores.len());
    groups.truncate(a.kept_groups as usize);
    let mut experts = best_first(&scores, (0..logits.len()).filter(|expert| groups.contains(&(expert / group_size))));
    experts.truncate(a.chosen as usize);

    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mass: f32 = logits.iter().map(|logit| (logit - max).exp()).sum();
    let weight = |logit: f32| if bias.is_some() { sigmoid(logit) } else { (logit - max).exp() / mass };
    let mut weights: Vec<f32> = experts.iter().map(|expert| weight(logits[*expert])).collect();
    if a.is_renormalised != 0 {
        let sum = weights.iter().sum::<f32>() + if bias.is_some() { 1e-20 } else { 0.0 };
        weights.iter_mut().for_each(|weight| *weight /= sum);
    }
    weights.iter_mut().for_each(|weight| *weight *= a.scale);
    (experts, weights)
}

/// Orders candidates by descending score, equals by index, NaN last.
pub(super) fn best_first(scores: &[f32], candidates: impl IntoIterator<Item = usize>) -> Vec<usize> {
    let mut order: Vec<usize> = candidates.into_iter().collect();
    // -0.0 + 0.0 is 0.0, so both zeros are equal.
    let key = |index: usize| if scores[index].is_nan() { None } else { Some(scores[index] + 0.0) };
    order.sort_by(|a, b| match (key(*a), key(*b)) {
        (Some(a), Some(b)) => b.total_cmp(&a),
        (a, b) => b.is_some().cmp(&a.is_some()),
    });
    order
}

pub(super) fn sigmoid(logit: f32) -> f32 {
    1.0 / (1.0 + (-logit).exp())
}
