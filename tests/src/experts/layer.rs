//! A layer of experts behind its router, in every way in which rows come to experts.

use bcg_kernels::{self as ops, Routing, Scores, Scoring};
use bcg_runtime::{OpStream, Result, Tensor};

use super::case::Inputs;

/// How rows come to experts that other ranks own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    None,
    Push,
    AllToAll,
}

impl Way {
    pub(super) const ALL: [Self; 3] = [Self::None, Self::Push, Self::AllToAll];
}

/// A plain softmax router.
pub(super) fn scoring(chosen: usize) -> Scoring {
    Scoring { scores: Scores::Softmax, chosen, groups: 1, kept_groups: 1, is_renormalised: true, scale: 1.0 }
}

/// The partial sums of this rank, `[T, C]`.
pub(super) fn layer(cx: &mut OpStream, way: Way, inputs: &Inputs, chosen: usize) -> Result<Tensor> {
    let (num_experts, num_ranks, rank) = (inputs.logits.dim(1), cx.world_size(), cx.rank());
    let own = rank * num_experts / num_ranks..(rank + 1) * num_experts / num_ranks;
    let scoring = scoring(chosen);
    let Inputs { x, logits, num_valid, .. } = inputs;
    if way == Way::None {
        let routing = ops::moe_route(cx, logits, &scoring, num_valid, own)?;
        let y = products(cx, x, inputs, &routing)?;
        return ops::moe_combine(cx, &y, &routing, inputs.shared.as_ref());
    }
    let share = x.dim(0) / num_ranks;
    let rows = rank * share..(rank + 1) * share;
    let (own_rows, logits) = (x.rows(rows.clone())?, logits.rows(rows.clone())?);
    let sent = ops::moe_choose(cx, &logits, &scoring, num_valid, rows.start)?;
    let (rows, choices) = if way == Way::Push {
        ops::moe_dispatch(cx, &own_rows, &sent, num_experts)?
    } else {
        let message = ops::moe_pack(cx, &own_rows, &sent, num_experts)?;
        let came = ops::all_to_all(cx, &message)?;
        ops::moe_unpack(cx, &came, x.dim(1), chosen)?
    };
    let plan = ops::moe_permute(cx, &choices.experts, num_experts, own)?;
    let routing = Routing { choices, plan, num_valid: num_valid.clone() };
    let y = products(cx, &rows, inputs, &routing)?;
    if way == Way::Push {
        return ops::moe_return(cx, &y, &routing, &sent, inputs.shared.as_ref());
    }
    let parts = ops::moe_combine(cx, &y, &routing, inputs.shared.as_ref())?;
    let parts = ops::all_to_all(cx, &parts)?;
    ops::moe_place(cx, &parts)
}

/// What this rank's experts make of rows, in the order of the plan.
pub(super) fn products(cx: &mut OpStream, x: &Tensor, inputs: &Inputs, routing: &Routing) -> Result<Tensor> {
    let gated = ops::grouped_gate_up(cx, x, &inputs.gate_up, &routing.plan)?;
    ops::grouped_linear(cx, &gated, &inputs.down, &routing.plan)
}
