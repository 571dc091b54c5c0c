//! `linear` and `linear_to`.

use bcg_kernels as ops;
use bcg_runtime::{BreakableCudaGraph, DType, Device, DeviceKind};

use super::fixture::{FLOATS, Fixture, epsilon};

/// `linear` sums products in f32 and rounds once, for any shape, to its own dtype and to f32.
pub(super) fn linear_matches_the_formula(device: &Device) {
    let mut fixture = Fixture::new(device);
    let shapes =
        [(1, 1, 1), (3, 5, 7), (64, 64, 64), (70, 130, 100), (9, 600, 33), (2, 3, 2000), (5, 1, 64), (1, 700, 48)];
    for dtype in FLOATS {
        for (rows, outputs, depth) in shapes {
            let x = fixture.random_sliced(rows, depth, dtype);
            let weight = fixture.random_sliced(outputs, depth, dtype);
            for out_dtype in [dtype, DType::F32] {
                let out = fixture.run(|cx| ops::linear_to(cx, &x.tensor, &weight.tensor, out_dtype));
                assert_eq!((out.shape(), out.dtype()), (&[rows, outputs][..], out_dtype));
                let actual = fixture.read(&out);
                for (index, (sum, size)) in product(&x.values, &weight.values, depth).into_iter().enumerate() {
                    let bound = epsilon(out_dtype) * sum.abs() + 1e-6 * size + 1e-7;
                    let (t, n, got) = (index / outputs, index % outputs, actual[index]);
                    assert!((got - sum).abs() <= bound, "{dtype} to {out_dtype} [{t}, {n}]: {sum}, got {got}");
                }
            }
        }
    }
}

/// A row's result is the same bits whatever stands in the other rows, so what padding holds changes no token; on the host
/// device, also however many rows there are. On CUDA the algorithm, and with it the order of a sum, depends on their number.
pub(super) fn linear_rows_do_not_depend_on_other_rows(device: &Device) {
    let mut fixture = Fixture::new(device);
    let (rows, depth, outputs) = (40, 300, 70);
    for dtype in FLOATS {
        let x = fixture.random(&[rows, depth], dtype);
        let weight = fixture.random(&[outputs, depth], dtype);
        let whole = fixture.run(|cx| ops::linear(cx, &x.tensor, &weight.tensor));
        let whole = fixture.read(&whole);
        for valid in [1, 2, 7, 8, 9, 16, 33] {
            let mut padded = x.values.clone();
            padded[valid * depth..].fill(f64::NAN);
            let padded = fixture.floats(&[rows, depth], dtype, &padded);
            let out = fixture.run(|cx| ops::linear(cx, &padded.tensor, &weight.tensor));
            let out = fixture.read(&out);
            assert_eq!(out[..valid * outputs], whole[..valid * outputs], "{dtype}: NaN below {valid} rows");
            assert!(out[valid * outputs..].iter().all(|v| v.is_nan()), "{dtype}: NaN stays in its rows");
            if device.kind() == DeviceKind::Host {
                let part = x.tensor.rows(0..valid).expect("a row range");
                let out = fixture.run(|cx| ops::linear(cx, &part, &weight.tensor));
                assert_eq!(fixture.read(&out), whole[..valid * outputs], "{dtype}: {valid} rows alone");
            }
        }
    }
}

/// The same product gives the same bits each time, eagerly and at replay, before and after other products and other memory.
pub(super) fn linear_gives_the_same_bits_each_time(device: &Device) {
    let mut fixture = Fixture::new(device);
    // Few rows and a deep sum: where a library splits sums among blocks.
    for (rows, outputs, depth) in [(1, 64, 8192), (16, 256, 4096), (130, 70, 1000)] {
        for dtype in FLOATS {
            let x = fixture.random(&[rows, depth], dtype).tensor;
            let weight = fixture.random(&[outputs, depth], dtype).tensor;
            let first = fixture.run(|cx| ops::linear(cx, &x, &weight));
            let first = fixture.read(&first);
            for _ in 0..3 {
                let again = fixture.run(|cx| {
                    let _moved = cx.empty(&[1000], DType::U8)?;
                    ops::linear_to(cx, &x, &weight, DType::F32)?;
                    ops::linear(cx, &x, &weight)
                });
                assert_eq!(fixture.read(&again), first, "{dtype}, [{rows}, {outputs}, {depth}], eagerly");
            }
            let mut graph = BreakableCudaGraph::new("linear");
            let captured = graph.capture(&mut fixture.runner, &(), move |cx| ops::linear(cx, &x, &weight));
            let captured = captured.expect("a capture");
            assert_eq!(fixture.read(&captured), first, "{dtype}, [{rows}, {outputs}, {depth}], captured");
            for _ in 0..3 {
                let replayed = graph.replay(&mut fixture.runner, &()).expect("a replay");
                assert_eq!(fixture.read(&replayed), first, "{dtype}, [{rows}, {outputs}, {depth}], replayed");
            }
        }
    }
}

/// Without rows nothing is computed, and a sum of nothing is zero.
pub(super) fn linear_of_nothing_is_zero(device: &Device) {
    let mut fixture = Fixture::new(device);
    for dtype in FLOATS {
        let weight = fixture.random(&[5, 8], dtype).tensor;
        let (none, hollow) = fixture.run(|cx| {
            let x = cx.empty(&[3, 8], dtype)?;
            let none = ops::linear(cx, &x.rows(0..0)?, &weight)?;
            let hollow = ops::linear(cx, &x.columns(0..0)?, &weight.columns(0..0)?)?;
            Ok((none, hollow))
        });
        assert_eq!((none.shape(), fixture.read(&none).len()), (&[0, 5][..], 0));
        assert_eq!(fixture.read(&hollow), [0.0; 15], "{dtype}");
    }
}

/// Products that were tuned are still right, give the same bits each time, and are not timed again.
pub(super) fn tuned_products_match_the_formula(device: &Device) {
    let mut fixture = Fixture::new(device);
    let (outputs, depth) = (384, 512);
    let rows = [1, 16, 64];
    let x = fixture.random(&[64, depth], DType::Bf16);
    let weight = fixture.random(&[outputs, depth], DType::Bf16);
    fixture.run(|cx| ops::linear(cx, &x.tensor, &weight.tensor));
    let mut steps = Vec::new();
    let tuning = device.tune_matmuls(&rows, &mut |done, total| steps.push((done, total))).expect("tuning");
    assert!(steps.last().is_none_or(|(done, total)| done == total), "{steps:?}");
    assert_eq!(tuning.num_left, 0);
    if device.kind() == DeviceKind::Cuda {
        assert!(tuning.timed.len() + tuning.num_known >= rows.len(), "{tuning:?}");
    }
    for rows in rows {
        let part = x.tensor.rows(0..rows).expect("a row range");
        let out = fixture.run(|cx| ops::linear(cx, &part, &weight.tensor));
        let out = fixture.read(&out);
        let expected = product(&x.values[..rows * depth], &weight.values, depth);
        for (got, (sum, size)) in out.iter().zip(expected) {
            let bound = epsilon(DType::Bf16) * sum.abs() + 1e-6 * size + 1e-7;
            assert!((got - sum).abs() <= bound, "{rows} rows: {sum}, got {got}");
        }
        let again = fixture.run(|cx| ops::linear(cx, &part, &weight.tensor));
        assert_eq!(fixture.read(&again), out, "{rows} rows");
    }
    let again = device.tune_matmuls(&rows, &mut |_, _| panic!("nothing is left to time")).expect("tuning");
    assert!(again.timed.is_empty(), "{again:?}");
}

/// `x weightᵀ` in f64, and for each element the sum of its terms' sizes.
fn product(x: &[f64], weight: &[f64], depth: usize) -> Vec<(f64, f64)> {
    let rows = x.chunks(depth).flat_map(|row| weight.chunks(depth).map(move |column| (row, column)));
    rows.map(|(row, column)| {
        let terms = row.iter().zip(column).map(|(x, w)| x * w);
        terms.fold((0.0, 0.0), |(sum, size): (f64, f64), term| (sum + term, size + term.abs()))
    })
    .collect()
}
