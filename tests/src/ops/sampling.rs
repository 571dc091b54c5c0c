//! `argmax` and `sample`.

use bcg_kernels::{self as ops, SampleInputs};
use bcg_runtime::{DType, Device, Tensor};

use super::fixture::Fixture;

/// `argmax` takes the lowest index of the largest value; NaN never wins.
pub(super) fn argmax_takes_the_first_of_the_largest(device: &Device) {
    let mut fixture = Fixture::new(device);
    for (rows, columns) in [(5, 1), (5, 31), (300, 1000), (2, 151_936), (1, 70_001)] {
        for logits in fixture.random_rows(rows, columns, DType::F32) {
            let out = fixture.run(|cx| ops::argmax(cx, &logits.tensor));
            let expected: Vec<i32> = logits.values.chunks(columns).map(first_largest).collect();
            assert_eq!(fixture.read_i32(&out), expected, "{columns} columns");
        }
        // Few different values, so that there are many ties, and NaN among them.
        let mut values: Vec<f64> = fixture.numbers(rows * columns).into_iter().map(|v| (v * 3.0).round()).collect();
        values.iter_mut().step_by(5).for_each(|v| *v = f64::NAN);
        let ties = fixture.floats(&[rows, columns], DType::F32, &values);
        let out = fixture.run(|cx| ops::argmax(cx, &ties.tensor));
        let expected: Vec<i32> = ties.values.chunks(columns).map(first_largest).collect();
        assert_eq!(fixture.read_i32(&out), expected, "{columns} columns with ties");
    }
    let nothing =
        fixture.floats(&[2, 3], DType::F32, &[f64::NAN, f64::NAN, f64::NAN, f64::NAN, f64::NEG_INFINITY, 0.0]);
    let out = fixture.run(|cx| ops::argmax(cx, &nothing.tensor));
    assert_eq!(fixture.read_i32(&out), [0, 2]);
}

fn first_largest(row: &[f64]) -> i32 {
    let most = row.iter().copied().filter(|v| !v.is_nan()).fold(f64::NEG_INFINITY, f64::max);
    row.iter().position(|v| *v == most).unwrap_or(0) as i32
}

/// The parameters of one row.
#[derive(Clone, Copy, Debug)]
struct Row {
    temperature: f32,
    top_k: i32,
    top_p: f32,
    min_p: f32,
    seed: i64,
    step: i64,
}

const PLAIN: Row = Row { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0, step: 0 };

fn draw(fixture: &mut Fixture, logits: &Tensor, rows: &[Row]) -> Vec<i32> {
    let device = fixture.device.clone();
    let floats = |of: fn(&Row) -> f32| {
        device.tensor(&[rows.len()], &rows.iter().map(of).collect::<Vec<f32>>()).expect("a tensor")
    };
    let longs = |of: fn(&Row) -> i64| {
        device.tensor(&[rows.len()], &rows.iter().map(of).collect::<Vec<i64>>()).expect("a tensor")
    };
    let inputs = SampleInputs {
        temperature: &floats(|row| row.temperature),
        top_k: &fixture.ints(&rows.iter().map(|row| row.top_k).collect::<Vec<i32>>()),
        top_p: &floats(|row| row.top_p),
        min_p: &floats(|row| row.min_p),
        seed: &longs(|row| row.seed),
        step: &longs(|row| row.step),
    };
    let out = fixture.run(|cx| ops::sample(cx, logits, &inputs));
    fixture.read_i32(&out)
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The kept tokens with their scores in f64, best first, by sorting.
fn scores(logits: &[f64], row: Row) -> Vec<(usize, f64)> {
    let golden = 0x9e37_79b9_7f4a_7c15u64;
    let stream = mix((row.seed as u64).wrapping_add(golden.wrapping_mul(row.step as u64 + 1)));
    let gumbel = |token: usize| {
        let bits = mix(stream.wrapping_add(golden.wrapping_mul(token as u64 + 1))) >> 41;
        -(-((bits as f64 + 0.5) / 8_388_608.0).ln()).ln()
    };
    let scaled: Vec<f64> = logits.iter().map(|v| f64::from(*v as f32 / row.temperature)).collect();
    let mut order: Vec<usize> = (0..scaled.len()).collect();
    order.sort_by(|a, b| scaled[*b].total_cmp(&scaled[*a]));
    if row.top_k > 0 {
        order.truncate(row.top_k as usize);
    }
    let most = scaled[order[0]];
    let weights: Vec<f64> = order.iter().map(|token| (scaled[*token] - most).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut before = 0.0;
    let mut kept = vec![];
    for (token, weight) in order.into_iter().zip(weights) {
        let in_top_p = before == 0.0 || row.top_p >= 1.0 || before < f64::from(row.top_p) * total;
        before += weight;
        if in_top_p && weight >= f64::from(row.min_p) {
            kept.push((token, scaled[token] + gumbel(token)));
        }
    }
    kept.sort_by(|a, b| b.1.total_cmp(&a.1));
    kept
}

/// Each draw is the best of the kept tokens by `logit / temperature + gumbel`, as computed in f64 by sorting; the same
/// on every device.
pub(super) fn sample_draws_what_the_formula_draws(device: &Device) {
    let mut fixture = Fixture::new(device);
    let filters = [
        PLAIN,
        Row { temperature: 0.7, ..PLAIN },
        Row { top_k: 1, ..PLAIN },
        Row { temperature: 1.5, top_k: 40, ..PLAIN },
        Row { top_p: 0.9, ..PLAIN },
        Row { top_p: 0.0, ..PLAIN },
        Row { min_p: 0.2, ..PLAIN },
        Row { temperature: 0.6, top_k: 20, top_p: 0.95, min_p: 0.01, ..PLAIN },
        Row { top_k: 1_000_000, ..PLAIN },
    ];
    // The vocabulary of Qwen3, and rows that do not fit in the memory of their blocks.
    let few = [filters[4], filters[7]];
    for (columns, filters) in [(1, &filters[..]), (50, &filters), (3000, &filters), (151_936, &few), (200_001, &few)] {
        let times = if columns > 10_000 { 1 } else { 20 };
        let seeded = |i: i64| filters.iter().map(move |row| Row { seed: i * 31 - 100, step: i % 3, ..*row });
        let rows: Vec<Row> = (0..times).flat_map(seeded).collect();
        let mut values = fixture.numbers(rows.len() * columns);
        values.iter_mut().for_each(|v| *v *= 6.0);
        let logits = fixture.floats(&[rows.len(), columns], DType::F32, &values);
        let drawn = draw(&mut fixture, &logits.tensor, &rows);
        let alone = draw(&mut fixture, &logits.tensor.rows(0..1).expect("a row range"), &rows[..1]);
        assert_eq!(alone, drawn[..1], "a draw does not depend on other rows");
        for ((row, logits), token) in rows.iter().zip(logits.values.chunks(columns)).zip(drawn) {
            let scores = scores(logits, *row);
            let tied = scores.get(1).is_some_and(|second| scores[0].1 - second.1 < 1e-4);
            assert!(
                token as usize == scores[0].0 || tied,
                "{columns} columns, {row:?}: {token}, expected {:?}",
                scores[0]
            );
        }
    }
}

/// Tokens are drawn as often as their probabilities say, a draw repeats with its counters, and temperature 0 is argmax.
pub(super) fn sample_follows_the_probabilities(device: &Device) {
    let mut fixture = Fixture::new(device);
    let probabilities = [0.5, 0.25, 0.125, 0.125];
    let draws = 8000;
    let logits: Vec<f64> = probabilities.iter().map(|p: &f64| p.ln()).collect();
    let logits = fixture.floats(&[draws, 4], DType::F32, &logits.repeat(draws));
    let rows: Vec<Row> = (0..draws as i64).map(|i| Row { seed: i / 100, step: i % 100, ..PLAIN }).collect();
    let drawn = draw(&mut fixture, &logits.tensor, &rows);
    for (token, probability) in probabilities.iter().enumerate() {
        let count = drawn.iter().filter(|drawn| **drawn == token as i32).count() as f64;
        let (mean, deviation) = (draws as f64 * probability, (draws as f64 * probability * (1.0 - probability)).sqrt());
        assert!((count - mean).abs() < 5.0 * deviation, "token {token}: {count} draws, expected {mean} ± {deviation}");
    }
    assert_eq!(draw(&mut fixture, &logits.tensor, &rows), drawn, "a draw depends on its counters only");
    let greedy: Vec<Row> = rows.iter().map(|row| Row { temperature: 0.0, ..*row }).collect();
    assert!(draw(&mut fixture, &logits.tensor, &greedy).iter().all(|token| *token == 0));
}
