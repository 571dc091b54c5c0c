//! `grouped_gate_up` and `grouped_linear` in bf16, which have kernels of their own on CUDA: for up to 16 tokens, and for
//! more.

use bcg_kernels::{self as ops, ExpertPlan};
use bcg_runtime::{DType, Device, Runner, RunnerOptions};

use super::fixture::{Fixture, Known, epsilon};

/// An expert number of padded pairs.
const NONE: usize = usize::MAX;

/// Experts, and the sizes of their matrices.
#[derive(Clone, Copy)]
struct Sizes {
    experts: usize,
    hidden: usize,
    intermediate: usize,
}

/// The matrices of experts.
struct Weights {
    sizes: Sizes,
    gate_up: Known,
    down: Known,
}

impl Weights {
    fn new(fixture: &mut Fixture, sizes: Sizes) -> Self {
        let Sizes { experts, hidden, intermediate } = sizes;
        let gate_up = fixture.random(&[experts, 2 * intermediate, hidden], DType::Bf16);
        let down = fixture.random(&[experts, hidden, intermediate], DType::Bf16);
        Self { sizes, gate_up, down }
    }
}

/// The expert that each place belongs to, the pair of token and choice in it, and the plan that says so.
struct Places {
    experts: Vec<usize>,
    pairs: Vec<usize>,
    chosen: usize,
    plan: ExpertPlan,
}

impl Places {
    /// Orders the pairs `t * chosen + k`, of which each says its expert.
    fn new(fixture: &Fixture, choices: &[usize], chosen: usize, num_experts: usize) -> Self {
        let mut pairs: Vec<usize> = (0..choices.len()).filter(|pair| choices[*pair] != NONE).collect();
        pairs.sort_by_key(|pair| choices[*pair]);
        let experts: Vec<usize> = pairs.iter().map(|pair| choices[*pair]).collect();
        let before = |expert| experts.iter().filter(|other| **other < expert).count() as i32;
        let offsets: Vec<i32> = (0..=num_experts).map(before).collect();
        let (mut rows, mut places) = (vec![-1; choices.len()], vec![-1; choices.len()]);
        for (place, pair) in pairs.iter().enumerate() {
            rows[place] = *pair as i32;
            places[*pair] = place as i32;
        }
        let places = fixture.device.tensor(&[choices.len() / chosen, chosen], &places).expect("a tensor");
        let (offsets, rows) = (fixture.ints(&offsets), fixture.ints(&rows));
        let plan = ExpertPlan { offsets, rows, places, chosen_among: num_experts };
        Self { experts, pairs, chosen, plan }
    }
}

/// A matrix of bf16 numbers in -1..1, in which the rows that are not `used` hold NaN.
fn rows_of(fixture: &mut Fixture, rows: usize, columns: usize, used: impl Fn(usize) -> bool) -> Known {
    let mut values = fixture.numbers(rows * columns);
    for (row, values) in values.chunks_mut(columns).enumerate() {
        if !used(row) {
            values.fill(f64::NAN);
        }
    }
    fixture.floats(&[rows, columns], DType::Bf16, &values)
}

/// A dot product in f64, and the sum of its terms' sizes.
fn dot(x: &[f64], weight: &[f64]) -> (f64, f64) {
    let terms = x.iter().zip(weight).map(|(x, w)| x * w);
    terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()))
}

/// The row of a matrix of an expert.
fn weight_row(weight: &Known, expert: usize, row: usize) -> &[f64] {
    let shape = weight.tensor.shape();
    let (rows, columns) = (shape[1], shape[2]);
    &weight.values[(expert * rows + row) * columns..][..columns]
}

/// Asserts that `out` holds the gated products of the rows in use, and is untouched behind them.
fn assert_gate_up(what: &str, out: &[f64], x: &Known, weights: &Weights, places: &Places) {
    let Sizes { hidden, intermediate, .. } = weights.sizes;
    let eps = epsilon(DType::Bf16);
    let silu = |g: f64| g / (1.0 + (-g).exp());
    for (place, (expert, pair)) in places.experts.iter().zip(&places.pairs).enumerate() {
        let x = &x.values[pair / places.chosen * hidden..][..hidden];
        for i in 0..intermediate {
            let (g, g_size) = dot(x, weight_row(&weights.gate_up, *expert, i));
            let (u, u_size) = dot(x, weight_row(&weights.gate_up, *expert, intermediate + i));
            let (expected, got) = (silu(g) * u, out[place * intermediate + i]);
            // Four roundings, one of them of the argument of SiLU, whose slope is below 1.1; and the f32 sums.
            let rounded = eps * (3.1 * expected.abs() + 1.1 * (g * u).abs());
            let bound = rounded + 1e-6 * (1.1 * g_size * u.abs() + u_size * silu(g).abs()) + 1e-6;
            assert!((got - expected).abs() <= bound, "{what}: place {place}, output {i}: {expected}, got {got}");
        }
    }
    assert!(out[places.pairs.len() * intermediate..].iter().all(|v| v.is_nan()), "{what}: rows without a place");
}

/// Asserts that `out` holds the products of the rows in use, and is untouched behind them.
fn assert_linear(what: &str, out: &[f64], x: &Known, weights: &Weights, places: &Places) {
    let Sizes { hidden, intermediate, .. } = weights.sizes;
    for (place, expert) in places.experts.iter().enumerate() {
        let x = &x.values[place * intermediate..][..intermediate];
        for n in 0..hidden {
            let ((sum, size), got) = (dot(x, weight_row(&weights.down, *expert, n)), out[place * hidden + n]);
            let bound = epsilon(DType::Bf16) * sum.abs() + 1e-6 * size + 1e-7;
            assert!((got - sum).abs() <= bound, "{what}: place {place}, output {n}: {sum}, got {got}");
        }
    }
    assert!(out[places.pairs.len() * hidden..].iter().all(|v| v.is_nan()), "{what}: rows without a place");
}

/// Runs both products on random rows, and NaN in the rows that the plan does not use, and asserts the results.
fn assert_products(fixture: &mut Fixture, weights: &Weights, choices: &[usize], chosen: usize) {
    let Sizes { experts, hidden, intermediate } = weights.sizes;
    let places = Places::new(fixture, choices, chosen, experts);
    let is_valid = |t: usize| choices[t * chosen..][..chosen].iter().any(|expert| *expert != NONE);
    let x = rows_of(fixture, choices.len() / chosen, hidden, is_valid);
    let permuted = rows_of(fixture, choices.len(), intermediate, |place| place < places.pairs.len());
    let (gated, out) = fixture.run(|cx| {
        let gated = ops::grouped_gate_up(cx, &x.tensor, &weights.gate_up.tensor, &places.plan)?;
        let out = ops::grouped_linear(cx, &permuted.tensor, &weights.down.tensor, &places.plan)?;
        Ok((gated, out))
    });
    let what = format!("{} of {experts} experts of [{intermediate}, {hidden}]", choices.len() / chosen);
    assert_gate_up(&what, &fixture.read(&gated), &x, weights, &places);
    assert_linear(&what, &fixture.read(&out), &permuted, weights, &places);
}

/// A fixture in which new memory holds NaN.
fn poisoned(device: &Device) -> Fixture {
    let mut fixture = Fixture::new(device);
    let mut options = RunnerOptions::default();
    options.poison = true;
    fixture.runner = Runner::new(device, options).expect("a runner");
    fixture
}

/// Different random experts for each token; every 7th token is padding.
fn random_choices(fixture: &mut Fixture, tokens: usize, chosen: usize, num_experts: usize) -> Vec<usize> {
    let mut choices = vec![];
    for t in 0..tokens {
        let experts = fixture.shuffled(num_experts);
        choices.extend(experts[..chosen].iter().map(|expert| if t % 7 == 6 { NONE } else { *expert }));
    }
    choices
}

/// The products of experts match the formula for few and many tokens, for sizes that fill no tile, and write nothing else.
pub(super) fn products_of_experts_match_the_formula(device: &Device) {
    let mut fixture = poisoned(device);
    let cases: [([usize; 3], usize, &[usize]); 6] = [
        ([8, 128, 128], 2, &[1, 2, 7, 16, 17, 40, 64, 200, 300]),
        ([20, 136, 72], 3, &[1, 5, 9, 16, 17, 300]),
        ([128, 64, 24], 8, &[1, 3, 16, 17, 100]),
        ([2, 2048, 40], 1, &[2, 15, 33, 90]),
        ([3, 72, 768], 2, &[8, 11, 40, 70]),
        ([3, 72, 1408], 2, &[2, 14, 29]),
    ];
    for ([experts, hidden, intermediate], chosen, tokens) in cases {
        let weights = Weights::new(&mut fixture, Sizes { experts, hidden, intermediate });
        for tokens in tokens {
            let choices = random_choices(&mut fixture, *tokens, chosen, experts);
            assert_products(&mut fixture, &weights, &choices, chosen);
        }
    }
}

/// So they do whatever the experts' shares are: none, few, all, and around each size of a tile.
pub(super) fn products_of_experts_serve_any_shares(device: &Device) {
    let mut fixture = poisoned(device);
    let cases: [(usize, usize, &[usize]); 7] = [
        (5, 2, &[0, 0, 0, 0, 0]),
        (5, 2, &[0, 0, 31, 0, 1]),
        (40, 2, &[7, 0, 0, 1, 0, 8]),
        (5, 1, &[0, 0, 300, 0, 0]),
        (5, 1, &[1, 0, 0, 0, 600]),
        (24, 1, &[0, 1, 8, 9, 0, 16, 17, 32, 33, 63, 64, 65, 130]),
        (12, 1, &[1, 16, 17, 33, 50, 70, 90, 100, 120, 128, 129, 260]),
    ];
    for (experts, chosen, shares) in cases {
        let weights = Weights::new(&mut fixture, Sizes { experts, hidden: 72, intermediate: 136 });
        let pairs = shares.iter().enumerate().flat_map(|(expert, share)| vec![expert; *share]);
        let mut choices: Vec<usize> = pairs.collect();
        choices.resize((choices.len() + 1).next_multiple_of(chosen), NONE);
        let order = fixture.shuffled(choices.len());
        let choices: Vec<usize> = order.iter().map(|pair| choices[*pair]).collect();
        assert_products(&mut fixture, &weights, &choices, chosen);
    }
}

/// Up to 16 tokens, and for more, a row has the same bits whatever the other tokens and however many there are.
pub(super) fn products_of_experts_have_the_same_bits_in_any_batch(device: &Device) {
    let mut fixture = Fixture::new(device);
    let sizes = Sizes { experts: 6, hidden: 328, intermediate: 200 };
    let weights = Weights::new(&mut fixture, sizes);
    let (chosen, most) = (2, 300);
    let choices: Vec<usize> = (0..most).flat_map(|t| [t % 5, (t % 5 + 1 + t / 5 % 4) % 5]).collect();
    let x = fixture.random(&[most, sizes.hidden], DType::Bf16);
    for batches in [[1, 2, 7, 16], [17, 40, 90, most]] {
        let mut rows: Vec<Vec<f64>> = vec![];
        for tokens in batches {
            let choices = &choices[..tokens * chosen];
            let places = Places::new(&fixture, choices, chosen, sizes.experts);
            let x = x.tensor.rows(0..tokens).expect("a row range");
            let out = fixture.run(|cx| {
                let gated = ops::grouped_gate_up(cx, &x, &weights.gate_up.tensor, &places.plan)?;
                ops::grouped_linear(cx, &gated, &weights.down.tensor, &places.plan)
            });
            let out = fixture.read(&out);
            let mut by_pair = vec![vec![]; choices.len()];
            for (pair, row) in places.pairs.iter().zip(out.chunks(sizes.hidden)) {
                by_pair[*pair] = row.to_vec();
            }
            assert_eq!(rows[..], by_pair[..rows.len()], "{tokens} tokens");
            rows = by_pair;
        }
    }
}
