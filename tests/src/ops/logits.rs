//! `logit_bias`, `token_mask` and `top_logprobs`.

use bcg_kernels as ops;
use bcg_runtime::{DType, Device, Tensor};

use super::fixture::{Fixture, assert_close};

/// Rows and columns, and what surrounds a row of logits: nothing, or columns at addresses that are multiples of 16
/// bytes or not.
const SHAPES: [(usize, usize); 6] = [(1, 1), (5, 31), (3, 64), (40, 1000), (3, 70_001), (2, 151_936)];
const AROUND: [(usize, usize); 3] = [(0, 0), (3, 5), (8, 8)];

/// Logits with all that stands around them.
struct Logits {
    whole: Tensor,
    /// The logits, and what `whole` holds.
    tensor: Tensor,
    values: Vec<f64>,
    left: usize,
    width: usize,
}

impl Logits {
    /// Makes logits in -3..3 with ties, infinities and NaN among them.
    fn new(fixture: &mut Fixture, rows: usize, columns: usize, (left, right): (usize, usize)) -> Self {
        let width = left + columns + right;
        let mut values = fixture.numbers(rows * width);
        values.iter_mut().for_each(|v| *v *= 3.0);
        values.iter_mut().step_by(3).for_each(|v| *v = (*v * 4.0).round() / 4.0);
        values.iter_mut().skip(1).step_by(7).for_each(|v| *v = f64::NEG_INFINITY);
        values.iter_mut().skip(2).step_by(11).for_each(|v| *v = f64::NAN);
        let known = fixture.floats(&[rows, width], DType::F32, &values);
        let tensor = known.tensor.columns(left..left + columns).expect("a column range");
        Self { whole: known.tensor, tensor, values: known.values, left, width }
    }

    fn at(&mut self, row: usize, column: usize) -> &mut f64 {
        &mut self.values[row * self.width + self.left + column]
    }

    fn row(&self, row: usize) -> &[f64] {
        let first = row * self.width + self.left;
        &self.values[first..first + self.tensor.dim(1)]
    }

    /// Asserts that the device holds the values, around the logits too.
    fn check(&self, fixture: &mut Fixture, what: &str) {
        let actual = fixture.read(&self.whole);
        let same = |(a, e): (&f64, &f64)| a == e || (a.is_nan() && e.is_nan());
        if let Some(place) = actual.iter().zip(&self.values).position(|pair| !same(pair)) {
            let (row, column) = (place / self.width, place % self.width);
            panic!("{what}: [{row}, {column}] is {}, expected {}", actual[place], self.values[place]);
        }
    }
}

/// `logit_bias` adds each value to its logit once and touches nothing else.
pub(super) fn logit_bias_adds_each_value_once(device: &Device) {
    let mut fixture = Fixture::new(device);
    for (rows, columns) in SHAPES {
        for around in AROUND {
            let mut logits = Logits::new(&mut fixture, rows, columns, around);
            let mut places = fixture.shuffled(rows * columns);
            places.truncate(700);
            let mut of_rows: Vec<i32> = places.iter().map(|place| (place / columns) as i32).collect();
            let mut tokens: Vec<i32> = places.iter().map(|place| (place % columns) as i32).collect();
            let mut values = fixture.numbers(places.len());
            for (row, token) in [(-1, 0), (rows as i32, 0), (0, -1), (0, columns as i32), (i32::MIN, i32::MAX)] {
                of_rows.push(row);
                tokens.push(token);
                values.push(1000.0);
            }
            values[0] = f64::NEG_INFINITY;
            let values = fixture.floats(&[values.len()], DType::F32, &values);
            for (place, value) in places.iter().zip(&values.values) {
                let logit = logits.at(place / columns, place % columns);
                *logit = f64::from(*logit as f32 + *value as f32);
            }
            let (of_rows, tokens) = (fixture.ints(&of_rows), fixture.ints(&tokens));
            fixture.run(|cx| ops::logit_bias(cx, &logits.tensor, &of_rows, &tokens, &values.tensor));
            logits.check(&mut fixture, &format!("{rows} x {columns} in {around:?}"));
        }
    }
    let logits = Logits::new(&mut fixture, 2, 5, (0, 0));
    let (nothing, no_values) = (fixture.ints(&[]), fixture.floats(&[0], DType::F32, &[]));
    fixture.run(|cx| ops::logit_bias(cx, &logits.tensor, &nothing, &nothing, &no_values.tensor));
    logits.check(&mut fixture, "no entries");
}

/// `token_mask` leaves the tokens whose bits are set; what is left is what `argmax` then finds.
pub(super) fn token_mask_excludes_the_tokens_without_a_bit(device: &Device) {
    let mut fixture = Fixture::new(device);
    for (rows, columns) in SHAPES {
        for around in AROUND {
            let mut logits = Logits::new(&mut fixture, rows, columns, around);
            let words = columns.div_ceil(32);
            let mut masked: Vec<i32> = fixture.shuffled(rows).into_iter().map(|row| row as i32).collect();
            masked.truncate(rows.div_ceil(2));
            masked.extend([-1, rows as i32, i32::MIN]);
            let mut mask: Vec<i32> = fixture.shuffled(masked.len() * words).into_iter().map(|i| i as i32).collect();
            mask.iter_mut().for_each(|word| *word = word.wrapping_mul(-1_640_531_527)); // bits of all places
            mask[..words].fill(0); // excludes all
            if let Some(one) = mask.get_mut(words..2 * words) {
                one.fill(0);
                one[words - 1] = 1 << ((columns - 1) % 32); // leaves the last
            }
            let (of_rows, masks) = (fixture.ints(&masked), fixture.ints(&mask));
            let masks = masks.reshape(&[masked.len(), words]).expect("a matrix");
            for (row, mask) in masked.iter().zip(mask.chunks(words)) {
                let Ok(row) = usize::try_from(*row) else { continue };
                for column in (0..columns).filter(|column| row < rows && mask[column / 32] >> (column % 32) & 1 == 0) {
                    *logits.at(row, column) = f64::NEG_INFINITY;
                }
            }
            fixture.run(|cx| ops::token_mask(cx, &logits.tensor, &of_rows, &masks));
            logits.check(&mut fixture, &format!("{rows} x {columns} in {around:?}"));
            let best = fixture.run(|cx| ops::argmax(cx, &logits.tensor));
            let best = fixture.read_i32(&best);
            assert_eq!(best[masked[0] as usize], 0, "nothing is left, and the first token stands for it");
            assert!(best.iter().all(|token| (0..columns as i32).contains(token)), "{best:?}");
        }
    }
    let logits = Logits::new(&mut fixture, 2, 40, (0, 0));
    let (nothing, no_mask) = (fixture.ints(&[]), device.zeros(&[0, 2], DType::I32).expect("an empty tensor"));
    fixture.run(|cx| ops::token_mask(cx, &logits.tensor, &nothing, &no_mask));
    logits.check(&mut fixture, "no masks");
}

/// The tokens of a row with their log probabilities in f64, best first, by sorting.
fn by_probability(row: &[f64]) -> Vec<(i32, f64)> {
    let numbers = || row.iter().copied().enumerate().filter(|(_, v)| !v.is_nan());
    let most = numbers().map(|(_, v)| v).fold(f64::NEG_INFINITY, f64::max);
    let below = |v: f64| if v == most { 0.0 } else { v - most };
    let log_sum = numbers().map(|(_, v)| below(v).exp()).sum::<f64>().ln();
    let mut tokens: Vec<(usize, f64)> = numbers().collect();
    tokens.sort_by(|a, b| b.1.partial_cmp(&a.1).expect("no NaN").then(a.0.cmp(&b.0)));
    tokens.into_iter().map(|(i, v)| (i as i32, below(v) - log_sum)).collect()
}

/// Asserts that `top_logprobs` lists what sorting lists.
fn check_top(fixture: &mut Fixture, logits: &Logits, rows: &[i32], n: usize) {
    let (num, columns) = (logits.tensor.dim(0), logits.tensor.dim(1));
    let mut chosen: Vec<i32> = (0..num).map(|_| fixture.below(columns) as i32).collect();
    chosen[num - 1] = columns as i32; // no token
    let (of_rows, of_chosen) = (fixture.ints(rows), fixture.ints(&chosen));
    let (ids, logprobs) = fixture.run(|cx| ops::top_logprobs(cx, &logits.tensor, &of_rows, &of_chosen, n));
    let (ids, logprobs) = (fixture.read_i32(&ids), fixture.read(&logprobs));
    let what = format!("{num} x {columns}, {n} tokens");
    let (mut expected_ids, mut expected) = (vec![], vec![]);
    for row in rows {
        let row = usize::try_from(*row).ok().filter(|row| *row < num);
        let tokens = row.map_or_else(Vec::new, |row| by_probability(logits.row(row)));
        let first = row.map_or(-1, |row| chosen[row]);
        let of_first = tokens.iter().find(|(token, _)| *token == first).map_or(f64::NEG_INFINITY, |(_, v)| *v);
        let rest = tokens.into_iter().chain(std::iter::repeat((-1, f64::NEG_INFINITY))).take(n);
        for (id, logprob) in std::iter::once((first, of_first)).chain(rest) {
            expected_ids.push(id);
            expected.push(logprob);
        }
    }
    assert_eq!(ids, expected_ids, "{what}");
    let finite = |values: Vec<f64>| -> Vec<f64> { values.into_iter().map(|v| v.max(-1e30)).collect() };
    assert!(logprobs.iter().all(|v| *v <= 0.0), "{what}: {logprobs:?}");
    assert_close(&what, &finite(logprobs), &finite(expected), DType::F32, 4.0, 4.0);
}

/// `top_logprobs` gives the chosen token and the likeliest ones with their log probabilities; of equals the first.
pub(super) fn top_logprobs_lists_what_sorting_lists(device: &Device) {
    let mut fixture = Fixture::new(device);
    for (num, columns) in SHAPES {
        for around in AROUND {
            let logits = Logits::new(&mut fixture, num, columns, around);
            let mut rows: Vec<i32> = fixture.shuffled(num).into_iter().map(|row| row as i32).collect();
            rows.extend([-1, 0, num as i32]);
            for n in [0, 1, 5, 20] {
                check_top(&mut fixture, &logits, &rows, n);
            }
            check_top(&mut fixture, &logits, &[], 5);
        }
    }
    let (inf, nan) = (f64::INFINITY, f64::NAN);
    let odd = [
        [nan, nan, nan, nan, nan, nan],
        [-inf, -inf, -inf, -inf, -inf, -inf],
        [nan, -inf, nan, -inf, nan, -inf],
        [0.0, inf, 1.0, inf, -inf, nan],
        [0.0, -0.0, 0.0, -0.0, 0.0, -0.0],
        [1e30, -1e30, 3e38, 3e38, 0.0, 1.0],
    ];
    let known = fixture.floats(&[6, 6], DType::F32, odd.as_flattened());
    let logits = Logits { whole: known.tensor.clone(), tensor: known.tensor, values: known.values, left: 0, width: 6 };
    for n in [0, 3, 9] {
        check_top(&mut fixture, &logits, &[0, 1, 2, 3, 4, 5], n);
    }
}
