//! `moe_route`, `moe_permute`, `grouped_gate_up`, `grouped_linear` and `moe_combine`.

use std::ops::Range;

use bcg_kernels::{self as ops, Choices, ExpertPlan, Routing, Scores, Scoring};
use bcg_runtime::{BreakableCudaGraph, DType, Device, OpStream, Result, Tensor};

use super::fixture::{FLOATS, Fixture, Known, epsilon};

/// A plain softmax router.
fn softmax(chosen: usize) -> Scoring {
    Scoring { scores: Scores::Softmax, chosen, groups: 1, kept_groups: 1, is_renormalised: true, scale: 1.0 }
}

/// Indices among `candidates` by descending score, equals by index; NaN last.
fn best_first(scores: &[f64], candidates: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut order: Vec<usize> = candidates.collect();
    let score = |i: usize| if scores[i].is_nan() { f64::NEG_INFINITY } else { scores[i] };
    order.sort_by(|a, b| score(*b).partial_cmp(&score(*a)).expect("no NaN"));
    order
}

/// What a router must do with one row, in f64.
struct Choice {
    /// What experts are chosen by.
    scores: Vec<f64>,
    /// What they are weighted with, before normalisation.
    raw_weights: Vec<f64>,
    experts: Vec<usize>,
    /// How much better the last kept group is than the next.
    group_margin: f64,
}

impl Choice {
    fn new(logits: &[f64], bias: Option<&[f64]>, scoring: &Scoring) -> Self {
        let exps: Vec<f64> = logits.iter().map(|logit| logit.exp()).collect();
        let mass: f64 = exps.iter().sum();
        let raw_weights: Vec<f64> =
            exps.iter().map(|e| if bias.is_some() { e / (1.0 + e) } else { e / mass }).collect();
        let scores: Vec<f64> = (0..logits.len()).map(|e| raw_weights[e] + bias.map_or(0.0, |bias| bias[e])).collect();
        let size = logits.len() / scoring.groups;
        let group_score = |g: usize| {
            let best = best_first(&scores, g * size..(g + 1) * size);
            scores[best[0]] + if bias.is_some() && size > 1 { scores[best[1]] } else { 0.0 }
        };
        let group_scores: Vec<f64> = (0..scoring.groups).map(group_score).collect();
        let groups = best_first(&group_scores, 0..scoring.groups);
        let (kept, left) = groups.split_at(scoring.kept_groups);
        let group_margin =
            left.first().map_or(f64::INFINITY, |next| group_scores[kept[kept.len() - 1]] - group_scores[*next]);
        let mut experts = best_first(&scores, (0..logits.len()).filter(|e| kept.contains(&(e / size))));
        experts.truncate(scoring.chosen);
        Self { scores, raw_weights, experts, group_margin }
    }

    /// Asserts what a router chose; experts whose scores differ by no more than f32 can tell may be in another order.
    fn assert(&self, what: &str, scoring: &Scoring, experts: &[i32], weights: &[f64]) {
        if self.group_margin < 1e-6 {
            return;
        }
        for (got, expected) in experts.iter().zip(&self.experts) {
            let got = usize::try_from(*got).unwrap_or_else(|_| panic!("{what}: {got}"));
            let gap = (self.scores[got] - self.scores[*expected]).abs();
            assert!(gap < 1e-6, "{what}: experts {experts:?}, expected {:?}", self.experts);
            assert_eq!(experts.iter().filter(|other| **other == got as i32).count(), 1, "{what}: {experts:?}");
        }
        let raw: Vec<f64> = experts.iter().map(|expert| self.raw_weights[*expert as usize]).collect();
        let sum = if scoring.is_renormalised { raw.iter().sum() } else { 1.0 };
        for (weight, raw) in weights.iter().zip(raw) {
            let expected = raw / sum * f64::from(scoring.scale);
            assert!((weight - expected).abs() <= 1e-5 * expected, "{what}: weight {weight}, expected {expected}");
        }
    }
}

/// Routers of published models, and smaller ones: experts, chosen, groups, groups to choose from, sigmoid.
const ROUTERS: [(usize, usize, usize, usize, bool); 12] = [
    (8, 1, 1, 1, false),
    (8, 8, 1, 1, false),
    (8, 2, 2, 1, true),
    (12, 3, 3, 2, false),
    (33, 5, 1, 1, true),
    (64, 6, 1, 1, false),
    (60, 4, 1, 1, false),
    (128, 8, 1, 1, false),
    (160, 6, 8, 3, false),
    (256, 8, 8, 4, true),
    (256, 8, 1, 1, true),
    (512, 10, 1, 1, false),
];

/// A router's choices are those of the formula, for softmax and sigmoid scores, with and without groups, for any number of
/// rows and of valid ones; padded rows, which hold NaN, have no experts and no weight.
pub(super) fn moe_route_chooses_what_the_formula_chooses(device: &Device) {
    let mut fixture = Fixture::new(device);
    for (num_experts, chosen, groups, kept_groups, is_sigmoid) in ROUTERS {
        for (tokens, valid) in [(1, 1), (2, 0), (5, 3), (16, 16), (40, 39), (70, 0), (70, 70), (300, 211), (1030, 1030)]
        {
            let bias = is_sigmoid.then(|| fixture.random(&[num_experts], DType::F32));
            let scoring = Scoring {
                scores: bias.as_ref().map_or(Scores::Softmax, |b| Scores::Sigmoid { bias: b.tensor.clone() }),
                groups,
                kept_groups,
                is_renormalised: tokens % 2 == 0,
                scale: if tokens == 5 { 2.5 } else { 1.0 },
                ..softmax(chosen)
            };
            let mut values: Vec<f64> = fixture.numbers(tokens * num_experts).iter().map(|v| 4.0 * v).collect();
            values[valid * num_experts..].fill(f64::NAN);
            let wide: Vec<f64> = values.chunks(num_experts).flat_map(|row| [row, &[f64::NAN; 3]].concat()).collect();
            let logits = fixture.floats(&[tokens, num_experts + 3], DType::F32, &wide).tensor;
            let num_valid = fixture.ints(&[valid as i32]);
            let own = some_range(&mut fixture, num_experts);
            let routing = fixture
                .run(|cx| ops::moe_route(cx, &logits.columns(0..num_experts)?, &scoring, &num_valid, own.clone()));
            let (experts, weights) =
                (fixture.read_i32(&routing.choices.experts), fixture.read(&routing.choices.weights));
            assert!(experts[valid * chosen..].iter().all(|expert| *expert == -1), "padded rows: {experts:?}");
            assert!(weights[valid * chosen..].iter().all(|weight| *weight == 0.0), "padded rows: {weights:?}");
            for t in 0..valid {
                let row: Vec<f64> =
                    values[t * num_experts..][..num_experts].iter().map(|v| f64::from(*v as f32)).collect();
                let choice = Choice::new(&row, bias.as_ref().map(|bias| &bias.values[..]), &scoring);
                let what = format!("{num_experts} experts, {groups} groups, {tokens} rows, row {t}");
                let own = t * chosen..(t + 1) * chosen;
                choice.assert(&what, &scoring, &experts[own.clone()], &weights[own]);
            }
            assert_plan(&mut fixture, &routing.plan, &experts, own);
        }
    }
}

/// All experts, or some that stand together.
fn some_range(fixture: &mut Fixture, num_experts: usize) -> Range<usize> {
    match fixture.below(3) {
        0 => 0..num_experts,
        _ => {
            let first = fixture.below(num_experts);
            first..first + 1 + fixture.below(num_experts - first)
        }
    }
}

/// Among equal scores the lower index is first, in groups too; NaN and infinite logits still give K different experts.
pub(super) fn moe_route_takes_the_first_of_equals(device: &Device) {
    let mut fixture = Fixture::new(device);
    let (tokens, num_experts) = (6, 64);
    let mut logits = vec![0.0; tokens * num_experts];
    let row = |t: usize| t * num_experts..(t + 1) * num_experts;
    logits[row(1)][7..].fill(1.0);
    logits[row(2)][..40].fill(-0.0); // equal to the zeros behind them
    logits[row(3)].fill(f64::NAN);
    logits[row(3)][50] = -1.0;
    logits[row(4)].fill(f64::NEG_INFINITY);
    logits[row(5)][..8].fill(f64::INFINITY);
    let logits = fixture.floats(&[tokens, num_experts], DType::F32, &logits).tensor;
    let num_valid = fixture.ints(&[tokens as i32]);
    let bias = fixture.floats(&[num_experts], DType::F32, &vec![0.0; num_experts]).tensor;
    for (scores, groups, kept_groups) in [
        (Scores::Softmax, 1, 1),
        (Scores::Softmax, 8, 3),
        (Scores::Sigmoid { bias: bias.clone() }, 1, 1),
        (Scores::Sigmoid { bias }, 8, 3),
    ] {
        let what = format!("{scores:?}, {groups} groups");
        let scoring = Scoring { scores, groups, kept_groups, ..softmax(4) };
        let routing = fixture.run(|cx| ops::moe_route(cx, &logits, &scoring, &num_valid, 0..num_experts));
        let experts = fixture.read_i32(&routing.choices.experts);
        assert_eq!(experts[0..4], [0, 1, 2, 3], "{what}");
        // A group with one expert of 1 is as good as others where the best one counts, and worse where two do.
        let first = if groups == 8 && what.starts_with("Sigmoid") { 8 } else { 7 };
        assert_eq!(experts[4..8], [first, first + 1, first + 2, first + 3], "{what}");
        assert_eq!(experts[8..12], [0, 1, 2, 3], "{what}");
        if groups == 1 {
            assert_eq!(experts[12..16], [50, 0, 1, 2], "{what}: NaN comes last");
        }
        for row in experts[12..].chunks(4) {
            let is_fine = |(k, expert): (usize, &i32)| (0..64).contains(expert) && !row[..k].contains(expert);
            assert!(row.iter().enumerate().all(is_fine), "{what}: {row:?}");
        }
        assert_plan(&mut fixture, &routing.plan, &experts, 0..num_experts);
    }
}

/// Asserts that a plan is the stable order of those `experts` that are its `own`.
fn assert_plan(fixture: &mut Fixture, plan: &ExpertPlan, experts: &[i32], own: Range<usize>) {
    let own = own.start as i32..own.end as i32;
    let (mut offsets, mut rows, mut places) = (vec![0i32], vec![], vec![-1; experts.len()]);
    let mut order: Vec<usize> = (0..experts.len()).filter(|pair| own.contains(&experts[*pair])).collect();
    order.sort_by_key(|pair| experts[*pair]);
    for (place, pair) in order.into_iter().enumerate() {
        places[pair] = place as i32;
        rows.push(pair as i32);
    }
    rows.resize(experts.len(), -1);
    let mut counts = vec![0; own.len()];
    let of_plan = experts.iter().filter(|expert| own.contains(expert));
    of_plan.for_each(|expert| counts[(expert - own.start) as usize] += 1);
    for count in counts {
        offsets.push(offsets[offsets.len() - 1] + count);
    }
    let what = format!("{} pairs, experts {own:?}", experts.len());
    assert_eq!(fixture.read_i32(&plan.offsets), offsets, "{what}: offsets");
    assert_eq!(fixture.read_i32(&plan.places), places, "{what}: places");
    assert_eq!(fixture.read_i32(&plan.rows), rows, "{what}: rows");
}

/// `moe_permute` orders pairs by expert and keeps the order within one, up to its largest size; with empty experts, all
/// pairs on one expert, no pair at all, padded rows, and plans of some experts only.
pub(super) fn moe_permute_keeps_the_order_within_an_expert(device: &Device) {
    let mut fixture = Fixture::new(device);
    let sizes = [(1, 1), (1, 8), (7, 3), (32, 1), (33, 1), (70, 8), (300, 6), (1025, 1), (4096, 8), (8192, 8)];
    for (tokens, chosen) in sizes {
        for num_experts in [1, 8, 33, 128, 256, 512] {
            let mut random: Vec<i32> = (0..tokens * chosen).map(|_| fixture.below(num_experts) as i32).collect();
            let one = vec![num_experts as i32 - 1; tokens * chosen];
            let none = vec![-1; tokens * chosen];
            // Some experts are empty, and the last rows are padded.
            random.iter_mut().filter(|expert| **expert % 5 == 1).for_each(|expert| *expert = 0);
            random[(tokens - tokens / 3) * chosen..].fill(-1);
            for experts in [random, one, none] {
                let tensor = fixture.ints(&experts).reshape(&[tokens, chosen]).expect("the same elements");
                let own = some_range(&mut fixture, num_experts);
                let plan = fixture.run(|cx| ops::moe_permute(cx, &tensor, num_experts, own.clone()));
                assert_plan(&mut fixture, &plan, &experts, own);
            }
        }
    }
}

/// How tokens spread over experts.
#[derive(Debug, Clone, Copy)]
enum Spread {
    Even,
    One,
    Few,
}

/// Experts of `valid` rows, different ones in a row; the rest of the rows is padded.
fn spread(fixture: &mut Fixture, shape: [usize; 3], spread: Spread) -> Vec<i32> {
    let [tokens, chosen, valid] = shape;
    let num_experts = EXPERTS;
    let mut experts = vec![];
    for t in 0..tokens {
        let row: Vec<usize> = match spread {
            _ if t >= valid => vec![usize::MAX; chosen],
            Spread::Even => fixture.shuffled(num_experts),
            Spread::One => (0..num_experts).map(|i| (i + 3) % num_experts).collect(),
            Spread::Few => fixture.shuffled(chosen + 1).into_iter().map(|e| num_experts - 1 - e).collect(),
        };
        experts.extend(row[..chosen].iter().map(|e| i32::try_from(*e).unwrap_or(-1)));
    }
    experts
}

const EXPERTS: usize = 9;

/// The plan of the `own` ones of a `[T, K]` choice, in memory that outlives a run.
fn lasting_plan(fixture: &mut Fixture, experts: &Tensor, own: Range<usize>) -> ExpertPlan {
    let plan = fixture.run(|cx| ops::moe_permute(cx, experts, EXPERTS, own));
    let [offsets, rows, places] = [&plan.offsets, &plan.rows, &plan.places].map(|tensor| fixture.read_i32(tensor));
    let places = fixture.ints(&places).reshape(experts.shape()).expect("the same elements");
    ExpertPlan { offsets: fixture.ints(&offsets), rows: fixture.ints(&rows), places, chosen_among: EXPERTS }
}

/// Shapes of grouped products: tokens, valid ones, chosen experts, columns of x, outputs.
const SHAPES: [[usize; 5]; 9] = [
    [1, 1, 1, 1, 1],
    [1, 1, 2, 64, 64],
    [5, 3, 3, 40, 24],
    [7, 0, 2, 16, 8],
    [16, 16, 4, 136, 72],
    [33, 33, 1, 33, 35],
    [70, 61, 2, 128, 192],
    [70, 70, 8, 8, 16],
    [300, 290, 2, 64, 136],
];

/// Calls `f` for every shape, spread and dtype with a plan, `x` `[T, C]` (NaN in padded rows) and the choices.
fn for_each_plan(device: &Device, f: impl Fn(&mut Fixture, [usize; 5], DType, &ExpertPlan, &[i32])) {
    let mut fixture = Fixture::new(device);
    for shape in SHAPES {
        let [tokens, valid, chosen, ..] = shape;
        for kind in [Spread::Even, Spread::One, Spread::Few] {
            let experts = spread(&mut fixture, [tokens, chosen, valid], kind);
            let tensor = fixture.ints(&experts).reshape(&[tokens, chosen]).expect("the same elements");
            for dtype in FLOATS {
                let plan = lasting_plan(&mut fixture, &tensor, 0..EXPERTS);
                f(&mut fixture, shape, dtype, &plan, &experts);
            }
        }
    }
}

/// A matrix of numbers in -1..1 with NaN from row `valid` on, row-sliced between NaN.
fn padded_rows(fixture: &mut Fixture, rows: usize, valid: usize, columns: usize, dtype: DType) -> Known {
    let mut wide = vec![];
    for row in 0..rows {
        wide.extend([f64::NAN; 8]);
        wide.extend(if row < valid { fixture.numbers(columns) } else { vec![f64::NAN; columns] });
        wide.extend(vec![f64::NAN; 8 + columns.next_multiple_of(8) - columns]);
    }
    let width = wide.len() / rows;
    let known = fixture.floats(&[rows, width], dtype, &wide);
    let values = known.values.chunks(width).flat_map(|row| row[8..8 + columns].to_vec()).collect();
    Known { tensor: known.tensor.columns(8..8 + columns).expect("a column range"), values }
}

/// The sum of products and the sum of their sizes.
fn product(a: &[f64], b: &[f64]) -> (f64, f64) {
    a.iter().zip(b).fold((0.0, 0.0), |(sum, size), (a, b)| (sum + a * b, size + (a * b).abs()))
}

/// `grouped_linear` multiplies each row with its expert's matrix, sums in f32 and rounds once.
pub(super) fn grouped_linear_matches_the_formula(device: &Device) {
    for_each_plan(device, |fixture, [tokens, valid, chosen, depth, outputs], dtype, plan, experts| {
        let pairs = tokens * chosen;
        let x = padded_rows(fixture, pairs, valid * chosen, depth, dtype);
        let weight = fixture.random(&[EXPERTS, outputs, depth], dtype);
        let out = fixture.run(|cx| ops::grouped_linear(cx, &x.tensor, &weight.tensor, plan));
        assert_eq!((out.shape(), out.dtype()), (&[pairs, outputs][..], dtype));
        let (out, rows) = (fixture.read(&out), fixture.read_i32(&plan.rows));
        for place in 0..valid * chosen {
            let expert = experts[rows[place] as usize] as usize;
            for n in 0..outputs {
                let column = &weight.values[(expert * outputs + n) * depth..][..depth];
                let (sum, size) = product(&x.values[place * depth..][..depth], column);
                let (got, bound) = (out[place * outputs + n], epsilon(dtype) * sum.abs() + 1e-6 * size + 1e-7);
                let what = format!("{dtype}, {tokens} tokens, [{place}, {n}] of expert {expert}");
                assert!((got - sum).abs() <= bound, "{what}: {sum}, got {got}");
            }
        }
    });
}

/// `grouped_gate_up` multiplies each token with its expert's two matrices and applies the gated activation.
pub(super) fn grouped_gate_up_matches_the_formula(device: &Device) {
    for_each_plan(device, |fixture, [tokens, valid, chosen, depth, inner], dtype, plan, experts| {
        let x = padded_rows(fixture, tokens, valid, depth, dtype);
        let weight = fixture.random(&[EXPERTS, 2 * inner, depth], dtype);
        let out = fixture.run(|cx| ops::grouped_gate_up(cx, &x.tensor, &weight.tensor, plan));
        assert_eq!((out.shape(), out.dtype()), (&[tokens * chosen, inner][..], dtype));
        let (out, rows) = (fixture.read(&out), fixture.read_i32(&plan.rows));
        for place in 0..valid * chosen {
            let pair = rows[place] as usize;
            let (x, expert) = (&x.values[pair / chosen * depth..][..depth], experts[pair] as usize);
            for i in 0..inner {
                let column = |n: usize| &weight.values[(expert * 2 * inner + n) * depth..][..depth];
                let ((g, g_size), (u, u_size)) = (product(x, column(i)), product(x, column(inner + i)));
                let silu = g / (1.0 + (-g).exp());
                let got = out[place * inner + i];
                // Roundings of gate, up, activation and product; the slope of the activation is at most 1.1.
                let roundings = epsilon(dtype) * u.abs() * (1.1 * g.abs() + 4.0 * silu.abs());
                let bound = roundings + 2e-6 * (g_size * u.abs() + silu.abs() * u_size) + 1e-6;
                let what = format!("{dtype}, {tokens} tokens, [{place}, {i}] of expert {expert}");
                assert!((got - silu * u).abs() <= bound, "{what}: {}, got {got}", silu * u);
            }
        }
    });
}

/// `moe_combine` adds up a token's experts by weight, those that the plan has, and the shared one; padded rows are zeros
/// whatever lies there.
pub(super) fn moe_combine_matches_the_formula(device: &Device) {
    let mut fixture = Fixture::new(device);
    for (tokens, valid, chosen) in [(1, 1, 1), (1, 1, 8), (6, 4, 3), (9, 0, 2), (70, 66, 6)] {
        for columns in [1, 8, 130, 1032] {
            for dtype in FLOATS {
                let experts = spread(&mut fixture, [tokens, chosen, valid], Spread::Even);
                let experts = fixture.ints(&experts).reshape(&[tokens, chosen]).expect("the same elements");
                let mut weights = fixture.numbers(tokens * chosen);
                weights[valid * chosen..].fill(0.0);
                let weights = fixture.floats(&[tokens, chosen], DType::F32, &weights);
                let own = some_range(&mut fixture, EXPERTS);
                let plan = lasting_plan(&mut fixture, &experts, own);
                let in_use = fixture.read_i32(&plan.offsets).pop().expect("an offset") as usize;
                let places = fixture.read_i32(&plan.places);
                let mut y = fixture.numbers(tokens * chosen * columns);
                y[in_use * columns..].fill(f64::NAN);
                let y = fixture.floats(&[tokens * chosen, columns], dtype, &y);
                let shared = padded_rows(&mut fixture, tokens, valid, columns, dtype);
                let choices = Choices { experts, weights: weights.tensor };
                let routing = Routing { choices, plan, num_valid: fixture.ints(&[valid as i32]) };
                for added in [None, Some(&shared)] {
                    let out = fixture.run(|cx| ops::moe_combine(cx, &y.tensor, &routing, added.map(|s| &s.tensor)));
                    let mut expected = vec![0.0; tokens * columns];
                    for (i, expected) in expected[..valid * columns].iter_mut().enumerate() {
                        let (t, c) = (i / columns, i % columns);
                        let term = |k: usize| weights.values[k] * y.values[places[k] as usize * columns + c];
                        let placed = (t * chosen..(t + 1) * chosen).filter(|k| places[*k] >= 0);
                        *expected = placed.map(term).sum();
                        *expected += added.map_or(0.0, |shared| shared.values[i]);
                    }
                    for (i, (got, expected)) in fixture.read(&out).iter().zip(&expected).enumerate() {
                        let bound = epsilon(dtype) * expected.abs() + 1e-6;
                        let what = format!("{dtype}, {tokens} tokens of {columns} columns, element {i}");
                        assert!((got - expected).abs() <= bound, "{what}: {expected}, got {got}");
                    }
                }
            }
        }
    }
}

/// Everything between a router's logits and the sum of the experts `own`, whose weights are given.
fn mixture(
    cx: &mut OpStream,
    inputs: &[Tensor; 3],
    weights: &[Tensor; 2],
    scoring: &Scoring,
    own: Range<usize>,
) -> Result<(Tensor, Tensor)> {
    let [logits, x, num_valid] = inputs;
    let routing = ops::moe_route(cx, logits, scoring, num_valid, own)?;
    let gated = ops::grouped_gate_up(cx, x, &weights[0], &routing.plan)?;
    let y = ops::grouped_linear(cx, &gated, &weights[1], &routing.plan)?;
    Ok((ops::moe_combine(cx, &y, &routing, Some(x))?, routing.plan.offsets))
}

/// A captured mixture of experts reads the number of valid rows at each replay: what padded rows hold, NaN or another token,
/// changes neither the rows of an expert nor a bit of a valid row, and padded rows come out as zeros.
pub(super) fn a_mixture_of_experts_ignores_padded_rows(device: &Device) {
    let mut fixture = Fixture::new(device);
    let (num_experts, columns, inner) = (16, 64, 32);
    for rows in [5, 16, 70, 200] {
        for dtype in FLOATS {
            let weights = [[num_experts, 2 * inner, columns], [num_experts, columns, inner]];
            let weights = weights.map(|shape| fixture.random(&shape, dtype).tensor);
            let (logits, tokens) = (fixture.numbers(rows * num_experts), fixture.random(&[rows, columns], dtype));
            let inputs = [
                fixture.floats(&[rows, num_experts], DType::F32, &logits).tensor,
                tokens.tensor.clone(),
                fixture.ints(&[rows as i32]),
            ];
            let scoring = softmax(8);
            let whole = fixture.run(|cx| mixture(cx, &inputs, &weights, &scoring, 0..num_experts));
            let whole = fixture.read(&whole.0);
            let mut graph = BreakableCudaGraph::new("mixture");
            let static_inputs = inputs.clone();
            let forward = move |cx: &mut bcg_runtime::Context<'_, ()>| {
                mixture(cx, &static_inputs, &weights, &scoring, 0..num_experts)
            };
            graph.capture(&mut fixture.runner, &(), forward).expect("a capture");
            for valid in [0, 1, rows / 2, rows - 1, rows] {
                let mut padded = logits.iter().map(|v| *v as f32).collect::<Vec<_>>();
                padded[valid * num_experts..].fill(f32::NAN);
                fixture.runner.upload(&inputs[0], &padded).expect("an upload");
                fixture.runner.upload(&inputs[2], &[valid as i32]).expect("an upload");
                let mut values = tokens.values.clone();
                values[valid * columns..].fill(f64::NAN);
                let padded = fixture.floats(&[rows, columns], dtype, &values).tensor;
                fixture.run(|cx| cx.copy(&inputs[1], &padded));
                let (out, offsets) = graph.replay(&mut fixture.runner, &()).expect("a replay");
                let (out, offsets) = (fixture.read(&out), fixture.read_i32(&offsets));
                assert_eq!(offsets[num_experts], 8 * valid as i32, "{dtype}, {valid} of {rows} rows are routed");
                assert_eq!(out[..valid * columns], whole[..valid * columns], "{dtype}, {valid} of {rows} rows");
                assert!(out[valid * columns..].iter().all(|v| *v == 0.0), "{dtype}, {valid} of {rows}: padded rows");
            }
        }
    }
}

/// What ranks that share the experts compute adds up to what one computes with all of them: their parts differ from it by
/// roundings alone, and a row that chose no expert of a rank is zero there.
pub(super) fn the_parts_of_a_mixture_add_up(device: &Device) {
    let mut fixture = Fixture::new(device);
    let (num_experts, columns, inner, chosen) = (16, 64, 32, 3);
    for rows in [1, 16, 70, 200] {
        for dtype in FLOATS {
            let shapes = [[num_experts, 2 * inner, columns], [num_experts, columns, inner]];
            let weights = shapes.map(|shape| fixture.random(&shape, dtype).tensor);
            let logits = fixture.random(&[rows, num_experts], DType::F32).tensor;
            let x = fixture.random(&[rows, columns], dtype).tensor;
            let inputs = [logits, x.clone(), fixture.ints(&[rows as i32])];
            let scoring = softmax(chosen);
            let routing = fixture.run(|cx| ops::moe_route(cx, &inputs[0], &scoring, &inputs[2], 0..num_experts));
            let experts = fixture.read_i32(&routing.choices.experts);
            let (whole, shared) = (0..num_experts, fixture.read(&x));
            let whole = fixture.run(|cx| mixture(cx, &inputs, &weights, &scoring, whole)).0;
            let whole = fixture.read(&whole);
            for num_ranks in [2, 4] {
                let (mut sums, mut sizes) = (vec![0.0; rows * columns], vec![1.0; rows * columns]);
                for rank in 0..num_ranks {
                    let own = rank * num_experts / num_ranks..(rank + 1) * num_experts / num_ranks;
                    let of_own = [0, 1].map(|matrix| weights[matrix].rows(own.clone()).expect("some experts"));
                    let part = fixture.run(|cx| mixture(cx, &inputs, &of_own, &scoring, own.clone())).0;
                    for (i, value) in fixture.read(&part).into_iter().enumerate() {
                        let of_row = &experts[i / columns * chosen..][..chosen];
                        let chose = of_row.iter().any(|expert| own.contains(&(*expert as usize)));
                        assert!(chose || value == shared[i], "{dtype}, {rows} rows, element {i}: {value}");
                        (sums[i], sizes[i]) = (sums[i] + value, sizes[i] + value.abs());
                    }
                }
                for (i, (got, whole)) in sums.iter().zip(&whole).enumerate() {
                    // Every part has the shared expert, which stands for `x` here; the whole has it once.
                    let expected = whole + (num_ranks - 1) as f64 * shared[i];
                    let bound = 2.0 * epsilon(dtype) * (sizes[i] + expected.abs()) + 1e-5;
                    assert!(
                        (got - expected).abs() <= bound,
                        "{dtype}, {rows} rows, element {i}: {expected}, got {got}"
                    );
                }
            }
        }
    }
}
