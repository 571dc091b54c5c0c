//! `linear` and `linear_to`.

use bcg_models::ops;
use bcg_runtime::{DType, Device};

use super::fixture::{FLOATS, Fixture, epsilon};

/// `linear` sums products in f32 and rounds once, for any shape, to its own dtype and to f32.
pub(super) fn linear_matches_the_formula(device: &Device) {
    let mut fixture = Fixture::new(device);
    let shapes = [(1, 1, 1), (3, 5, 7), (64, 64, 64), (70, 130, 100), (9, 600, 33), (2, 3, 2000)];
    for dtype in FLOATS {
        for (rows, outputs, depth) in shapes {
            let x = fixture.random_sliced(rows, depth, dtype);
            let weight = fixture.random_sliced(outputs, depth, dtype);
            for out_dtype in [dtype, DType::F32] {
                let out = fixture.run(|cx| ops::linear_to(cx, &x.tensor, &weight.tensor, out_dtype));
                assert_eq!((out.shape(), out.dtype()), (&[rows, outputs][..], out_dtype));
                let actual = fixture.read(&out);
                for (t, row) in x.values.chunks(depth).enumerate() {
                    for (n, column) in weight.values.chunks(depth).enumerate() {
                        let products = row.iter().zip(column).map(|(x, w)| x * w);
                        let (sum, size) =
                            products.fold((0.0, 0.0), |(sum, size): (f64, f64), p| (sum + p, size + p.abs()));
                        let bound = epsilon(out_dtype) * sum.abs() + 1e-6 * size + 1e-7;
                        let got = actual[t * outputs + n];
                        assert!((got - sum).abs() <= bound, "{dtype} to {out_dtype} [{t}, {n}]: {sum}, got {got}");
                    }
                }
            }
        }
    }
}

/// A row's result is the same bits whatever stands in the other rows and however many there are: so padding a batch
/// to a capture size changes no token.
pub(super) fn linear_rows_do_not_depend_on_other_rows(device: &Device) {
    let mut fixture = Fixture::new(device);
    let (depth, outputs) = (300, 70);
    for dtype in FLOATS {
        let x = fixture.random(&[40, depth], dtype);
        let weight = fixture.random(&[outputs, depth], dtype);
        let whole = fixture.run(|cx| ops::linear(cx, &x.tensor, &weight.tensor));
        let whole = fixture.read(&whole);
        for rows in [1, 2, 7, 8, 9, 16, 33] {
            let part = x.tensor.rows(0..rows).expect("a row range");
            let out = fixture.run(|cx| ops::linear(cx, &part, &weight.tensor));
            assert_eq!(fixture.read(&out), whole[..rows * outputs], "{dtype}: {rows} rows alone");
        }
        let mut padded = x.values.clone();
        padded[5 * depth..].fill(f64::NAN);
        let padded = fixture.floats(&[40, depth], dtype, &padded);
        let out = fixture.run(|cx| ops::linear(cx, &padded.tensor, &weight.tensor));
        let out = fixture.read(&out);
        assert_eq!(out[..5 * outputs], whole[..5 * outputs], "{dtype}: NaN below");
        assert!(out[5 * outputs..].iter().all(|v| v.is_nan()), "{dtype}: NaN stays in its rows");
    }
}
