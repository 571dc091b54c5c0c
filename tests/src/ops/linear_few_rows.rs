//! `linear` of few rows in bf16, which has a kernel of its own on CUDA.

use bcg_kernels as ops;
use bcg_runtime::{DType, Device};

use super::fixture::{Fixture, Known, epsilon};

/// A matrix of numbers in -1..1, aligned to 16 bytes, between columns of NaN.
fn random_aligned(fixture: &mut Fixture, rows: usize, columns: usize) -> Known {
    let mut wide = vec![];
    for _ in 0..rows {
        wide.extend([f64::NAN; 8]);
        wide.extend(fixture.numbers(columns));
        wide.extend([f64::NAN; 16]);
    }
    let known = fixture.floats(&[rows, columns + 24], DType::Bf16, &wide);
    Known {
        tensor: known.tensor.columns(8..8 + columns).expect("a column range"),
        values: known.values.into_iter().filter(|v| !v.is_nan()).collect(),
    }
}

/// Asserts that `actual` is the product of rows `x` with the rows of `weight`, summed in f32 and rounded once.
fn assert_product(what: &str, actual: &[f64], x: &[f64], weight: &[f64], depth: usize, dtype: DType) {
    let outputs = weight.len() / depth;
    assert_eq!(actual.len() * depth, x.len() * outputs, "{what}: length");
    for (row, sums) in x.chunks(depth).zip(actual.chunks(outputs)) {
        for (n, (column, got)) in weight.chunks(depth).zip(sums).enumerate() {
            let (mut sum, mut size) = (0.0, 0.0);
            for (x, w) in row.iter().zip(column) {
                sum += x * w;
                size += (x * w).abs();
            }
            let bound = epsilon(dtype) * sum.abs() + 1e-6 * size + 1e-7;
            assert!((got - sum).abs() <= bound, "{what} to {dtype}, output {n}: {sum}, got {got}");
        }
    }
}

/// `linear` of 1 to 33 rows sums products in f32 and rounds once, to bf16 and to f32, for sizes that fill no tile.
pub(super) fn linear_of_few_rows_matches_the_formula(device: &Device) {
    let mut fixture = Fixture::new(device);
    for (outputs, depth) in [(1, 8), (40, 72), (130, 1032), (2200, 24), (7000, 8)] {
        let weight = random_aligned(&mut fixture, outputs, depth);
        for rows in [1, 2, 3, 8, 9, 15, 16, 17, 33] {
            let x = random_aligned(&mut fixture, rows, depth);
            for dtype in [DType::Bf16, DType::F32] {
                let out = fixture.run(|cx| ops::linear_to(cx, &x.tensor, &weight.tensor, dtype));
                let what = format!("[{rows}, {depth}] x [{outputs}, {depth}]");
                assert_product(&what, &fixture.read(&out), &x.values, &weight.values, depth, dtype);
            }
        }
    }
}

/// Up to 16 rows, a row's result is the same bits whatever stands in the other rows and however many there are.
pub(super) fn linear_of_few_rows_has_the_same_bits_for_any_number_of_rows(device: &Device) {
    let mut fixture = Fixture::new(device);
    let depth = 1544;
    for outputs in [70, 2200, 6400] {
        let weight = random_aligned(&mut fixture, outputs, depth);
        let x = fixture.random(&[16, depth], DType::Bf16);
        let whole = fixture.run(|cx| ops::linear(cx, &x.tensor, &weight.tensor));
        let whole = fixture.read(&whole);
        for rows in [1, 2, 3, 8, 9, 15] {
            let mut values = x.values[..rows * depth].to_vec();
            values[(rows - 1) * depth..].fill(f64::NAN);
            let part = fixture.floats(&[rows, depth], DType::Bf16, &values);
            let out = fixture.run(|cx| ops::linear(cx, &part.tensor, &weight.tensor));
            let (same, last) = ((rows - 1) * outputs, rows * outputs);
            let out = fixture.read(&out);
            assert_eq!(out[..same], whole[..same], "{rows} rows of {outputs}");
            assert!(out[same..last].iter().all(|v| v.is_nan()), "{rows} rows of {outputs}: NaN stays in its row");
        }
    }
}

/// A weight that the kernel before wrote is read after that kernel.
pub(super) fn linear_of_few_rows_waits_for_a_computed_weight(device: &Device) {
    let mut fixture = Fixture::new(device);
    let (outputs, depth) = (400, 520);
    let (a, b) = (fixture.random(&[outputs, 64], DType::Bf16), fixture.random(&[depth, 64], DType::Bf16));
    let x = fixture.random(&[5, depth], DType::Bf16);
    let (weight, out) = fixture.run(|cx| {
        let weight = ops::linear(cx, &a.tensor, &b.tensor)?;
        let out = ops::linear_to(cx, &x.tensor, &weight, DType::F32)?;
        Ok((weight, out))
    });
    let (weight, out) = (fixture.read(&weight), fixture.read(&out));
    assert_product("a computed weight", &out, &x.values, &weight, depth, DType::F32);
}
