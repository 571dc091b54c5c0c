//! `rms_norm`, `add_rms_norm`, `silu_mul`, `gated_rms_norm`, `relu2`.

use bcg_kernels as ops;
use bcg_runtime::Device;

use super::fixture::{FLOATS, Fixture, assert_close, rms_norm};

/// Rows and columns: one of either, widths of no whole 16 bytes, more rows than multiprocessors, rows wider than the
/// registers of a block.
const SHAPES: [(usize, usize); 8] =
    [(1, 1), (3, 128), (5, 100), (2, 4097), (300, 32), (1, 4096), (2, 16_384), (1, 20_003)];

/// `rms_norm` is `x / sqrt(mean(x²) + eps) * weight`, however the rows lie.
pub(super) fn rms_norm_matches_the_formula(device: &Device) {
    let mut fixture = Fixture::new(device);
    for dtype in FLOATS {
        for (rows, columns) in SHAPES {
            let weight = fixture.random(&[columns], dtype);
            for x in fixture.random_rows(rows, columns, dtype) {
                let out = fixture.run(|cx| ops::rms_norm(cx, &x.tensor, &weight.tensor, 1e-6));
                let expected: Vec<f64> =
                    x.values.chunks(columns).flat_map(|row| rms_norm(row, &weight.values, 1e-6)).collect();
                assert_close("rms_norm", &fixture.read(&out), &expected, dtype, 4.0, 1e-3);
            }
        }
    }
}

/// `add_rms_norm` returns the rounded sum, and the norm of that.
pub(super) fn add_rms_norm_matches_the_formula(device: &Device) {
    let mut fixture = Fixture::new(device);
    for dtype in FLOATS {
        for (rows, columns) in SHAPES {
            let residual = fixture.random(&[rows, columns], dtype);
            let weight = fixture.random(&[columns], dtype);
            for x in fixture.random_rows(rows, columns, dtype) {
                let (normed, sum) =
                    fixture.run(|cx| ops::add_rms_norm(cx, &x.tensor, &residual.tensor, &weight.tensor, 1e-6));
                let sums: Vec<f64> = x.values.iter().zip(&residual.values).map(|(x, r)| x + r).collect();
                let actual = fixture.read(&sum);
                assert_close("sum", &actual, &sums, dtype, 1.0, 0.0);
                let expected: Vec<f64> =
                    actual.chunks(columns).flat_map(|row| rms_norm(row, &weight.values, 1e-6)).collect();
                assert_close("normed", &fixture.read(&normed), &expected, dtype, 4.0, 1e-3);
            }
        }
    }
}

/// `silu_mul` is `gate * sigmoid(gate) * up`, also where the exponential overflows.
pub(super) fn silu_mul_matches_the_formula(device: &Device) {
    let mut fixture = Fixture::new(device);
    for dtype in FLOATS {
        for (rows, columns) in SHAPES {
            for x in fixture.random_rows(rows, 2 * columns, dtype) {
                let out = fixture.run(|cx| ops::silu_mul(cx, &x.tensor));
                let halves = x.values.chunks(2 * columns).map(|row| row.split_at(columns));
                let expected: Vec<f64> = halves
                    .flat_map(|(gate, up)| gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u))
                    .collect();
                assert_close("silu_mul", &fixture.read(&out), &expected, dtype, 4.0, 1e-3);
            }
        }
        let extreme = fixture.floats(&[1, 4], dtype, &[-1000.0, 1000.0, 3.0, 0.5]);
        let out = fixture.run(|cx| ops::silu_mul(cx, &extreme.tensor));
        assert_eq!(fixture.read(&out), [0.0, 500.0], "{dtype}");
    }
}

/// `gated_rms_norm` is the RMS norm of each group of columns of `y * silu(gate)`, however the rows lie.
pub(super) fn gated_rms_norm_matches_the_formula(device: &Device) {
    let mut fixture = Fixture::new(device);
    for dtype in FLOATS {
        for (rows, columns, group) in
            [(1, 4, 4), (3, 96, 32), (5, 100, 25), (300, 64, 16), (2, 8192, 1024), (2, 9216, 4608)]
        {
            let weight = fixture.random(&[columns], dtype);
            let ys = fixture.random_rows(rows, columns, dtype);
            let gates = fixture.random_rows(rows, columns, dtype);
            for (y, gate) in ys.iter().zip(&gates) {
                let out =
                    fixture.run(|cx| ops::gated_rms_norm(cx, &y.tensor, &gate.tensor, &weight.tensor, group, 1e-5));
                let gated: Vec<f64> =
                    y.values.iter().zip(&gate.values).map(|(y, g)| y * g / (1.0 + (-g).exp())).collect();
                let weights = weight.values.chunks(group).cycle();
                let expected: Vec<f64> = gated
                    .chunks(group)
                    .zip(weights)
                    .flat_map(|(group, weight)| rms_norm(group, weight, 1e-5))
                    .collect();
                assert_close("gated_rms_norm", &fixture.read(&out), &expected, dtype, 4.0, 1e-3);
            }
        }
    }
}

/// `relu2` squares what is above zero.
pub(super) fn relu2_matches_the_formula(device: &Device) {
    let mut fixture = Fixture::new(device);
    for dtype in FLOATS {
        for (rows, columns) in SHAPES {
            for x in fixture.random_rows(rows, columns, dtype) {
                let out = fixture.run(|cx| ops::relu2(cx, &x.tensor));
                let expected: Vec<f64> = x.values.iter().map(|x| x.max(0.0).powi(2)).collect();
                assert_close("relu2", &fixture.read(&out), &expected, dtype, 1.0, 1e-3);
            }
        }
    }
}
