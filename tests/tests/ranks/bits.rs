//! What collectives compute: the same bits on every rank, and those of a plain reference.

use bcg_kernels::{
    all_gather_columns, all_gather_rows, all_reduce, all_reduce_add_rms_norm, broadcast, reduce_scatter_rows,
    send_receive,
};
use bcg_runtime::{OpStream, Result, Tensor};

use crate::fixture::{LONG, Lane, SIZES, all_equal, devices, lanes};

/// The words of `x` on one rank: numbers, and whatever else a float can be but the one NaN that stands for "not written".
fn words(rank: usize, len: usize) -> Vec<u32> {
    const SPECIAL: [f32; 9] =
        [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.0, f32::MAX, f32::MIN_POSITIVE, 1e-42, -1.0];
    let value = |at: usize| match (at * 7 + rank * 3) % 16 {
        special @ 0..9 if !(at + rank).is_multiple_of(3) => SPECIAL[special],
        other => (other as f32 - 4.5) * (1 + rank) as f32 * 1.1,
    };
    (0..len).map(|at| value(at).to_bits()).collect()
}

/// Makes NaNs equal: which payload a sum of several has is nobody's promise.
fn canonical(word: u32) -> u32 {
    if f32::from_bits(word).is_nan() { f32::NAN.to_bits() } else { word }
}

fn upload(lane: &Lane, shape: [usize; 2]) -> Tensor {
    let data: Vec<f32> = words(lane.runner.rank(), shape[0] * shape[1]).into_iter().map(f32::from_bits).collect();
    lane.runner.device().tensor(&shape, &data).expect("a tensor")
}

/// Runs one collective on every rank, and returns the bits of each.
fn run(
    num_ranks: usize,
    shape: [usize; 2],
    op: impl Fn(&mut OpStream, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Vec<Vec<u32>> {
    let mut ranks = lanes(&devices(num_ranks, 7), LONG);
    let run = move |lane: &mut Lane| {
        let x = upload(lane, shape);
        let out = lane.runner.eager(&(), |cx| op(cx, &x))?;
        Ok(lane.runner.read::<f32>(&out)?.into_iter().map(f32::to_bits).collect::<Vec<_>>())
    };
    ranks.run(run).expect("a collective")
}

const SHAPES: [[usize; 2]; 6] = [[0, 5], [8, 0], [8, 1], [8, 3], [16, 8], [24, 33]];

fn sums(num_ranks: usize, len: usize) -> Vec<u32> {
    let all: Vec<Vec<u32>> = (0..num_ranks).map(|rank| words(rank, len)).collect();
    let sum = |at: usize| {
        let mut values = all.iter().map(|words| f32::from_bits(words[at]));
        let first = values.next().expect("a rank");
        values.fold(first, |sum, value| sum + value).to_bits()
    };
    (0..len).map(sum).collect()
}

#[test]
fn sums_have_the_same_bits_on_all_ranks_and_are_in_their_order() {
    for num_ranks in SIZES {
        for shape in SHAPES {
            let got = run(num_ranks, shape, all_reduce);
            assert!(got.iter().all(|bits| *bits == got[0]), "{num_ranks} ranks, {shape:?}: bits differ");
            let expected = sums(num_ranks, shape[0] * shape[1]);
            let same = |words: &[u32]| words.iter().copied().map(canonical).collect::<Vec<_>>();
            assert_eq!(same(&got[0]), same(&expected), "{num_ranks} ranks, {shape:?}");
        }
    }
}

#[test]
fn scattered_sums_are_the_rows_of_the_sum() {
    for num_ranks in SIZES {
        for shape in SHAPES {
            let got = run(num_ranks, shape, reduce_scatter_rows).concat();
            assert_eq!(got, run(num_ranks, shape, all_reduce)[0], "{num_ranks} ranks, {shape:?}");
        }
    }
}

#[test]
fn what_is_moved_keeps_its_bits() {
    for num_ranks in SIZES {
        for shape in SHAPES {
            let len = shape[0] * shape[1];
            let given: Vec<Vec<u32>> = (0..num_ranks).map(|rank| words(rank, len)).collect();
            for got in run(num_ranks, shape, all_gather_rows) {
                assert_eq!(got, given.concat(), "rows of {num_ranks} ranks, {shape:?}");
            }
            let side_by_side: Vec<u32> = (0..shape[0])
                .flat_map(|row| given.iter().flat_map(move |words| &words[row * shape[1]..][..shape[1]]))
                .copied()
                .collect();
            for got in run(num_ranks, shape, all_gather_columns) {
                assert_eq!(got, side_by_side, "columns of {num_ranks} ranks, {shape:?}");
            }
            for root in [0, num_ranks - 1] {
                for got in run(num_ranks, shape, move |cx, x| broadcast(cx, x, root)) {
                    assert_eq!(got, given[root], "from {root} to {num_ranks} ranks, {shape:?}");
                }
            }
            for offset in [1, num_ranks - 1] {
                let got = run(num_ranks, shape, move |cx, x| send_receive(cx, x, offset));
                for (rank, got) in got.iter().enumerate() {
                    assert_eq!(*got, given[(rank + num_ranks - offset) % num_ranks], "{offset} further, {shape:?}");
                }
            }
        }
    }
}

#[test]
fn a_sum_with_its_norm_has_the_bits_of_the_two_in_a_row() {
    for num_ranks in SIZES {
        let mut ranks = lanes(&devices(num_ranks, 3), LONG);
        all_equal(&mut ranks, |lane| {
            let device = lane.runner.device().clone();
            let data = |scale: f32, len: usize| (0..len).map(|at| scale * (at as f32 - 11.3)).collect::<Vec<f32>>();
            let x = device.tensor(&[3, 24], &data(0.1 + lane.runner.rank() as f32, 72))?;
            let (residual, weight) = (device.tensor(&[3, 24], &data(0.7, 72))?, device.tensor(&[24], &data(0.3, 24))?);
            let (normed, sum, normed_after, sum_after) = lane.runner.eager(&(), |cx| {
                let (normed, sum) = all_reduce_add_rms_norm(cx, &x, &residual, &weight, 1e-5)?;
                let reduced = all_reduce(cx, &x)?;
                let (a, b) = bcg_kernels::add_rms_norm(cx, &reduced, &residual, &weight, 1e-5)?;
                Ok((normed, sum, a, b))
            })?;
            let mut bits = |tensor| -> Result<Vec<u32>> {
                Ok(lane.runner.read::<f32>(tensor)?.into_iter().map(f32::to_bits).collect())
            };
            let (fused, apart) = ([bits(&normed)?, bits(&sum)?], [bits(&normed_after)?, bits(&sum_after)?]);
            assert_eq!(fused, apart);
            Ok(fused)
        });
    }
}
