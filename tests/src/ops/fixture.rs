//! What the op rules share: seeded numbers, tensors in every float dtype, comparison with an f64 reference.

use bcg_runtime::{Context, DType, Device, Result, Runner, RunnerOptions, Tensor};
use half::{bf16, f16};

/// The dtypes of activations and weights.
pub(super) const FLOATS: [DType; 3] = [DType::Bf16, DType::F16, DType::F32];

/// The largest relative error of rounding to `dtype`.
pub(super) fn epsilon(dtype: DType) -> f64 {
    match dtype {
        DType::Bf16 => 2f64.powi(-8),
        DType::F16 => 2f64.powi(-11),
        _ => 2f64.powi(-21), // f32 is also summed in f32, which costs a few roundings more
    }
}

/// A device, a runner on it, and numbers that are the same on every device.
pub(super) struct Fixture {
    pub(super) device: Device,
    pub(super) runner: Runner,
    state: u64,
}

/// A tensor and what it holds, after rounding to its dtype.
pub(super) struct Known {
    pub(super) tensor: Tensor,
    pub(super) values: Vec<f64>,
}

impl Fixture {
    pub(super) fn new(device: &Device) -> Self {
        let runner = Runner::new(device, RunnerOptions::default()).expect("a runner");
        Self { device: device.clone(), runner, state: 1 }
    }

    /// Runs ops eagerly.
    pub(super) fn run<O>(&mut self, f: impl FnOnce(&mut Context<'_, ()>) -> Result<O>) -> O {
        self.runner.eager(&(), f).expect("the ops run")
    }

    /// Reads a float tensor.
    pub(super) fn read(&mut self, tensor: &Tensor) -> Vec<f64> {
        let error = "the tensor is read";
        match tensor.dtype() {
            DType::Bf16 => {
                self.runner.read::<bf16>(tensor).expect(error).iter().map(|v| f64::from(v.to_f32())).collect()
            }
            DType::F16 => self.runner.read::<f16>(tensor).expect(error).iter().map(|v| f64::from(v.to_f32())).collect(),
            _ => self.runner.read::<f32>(tensor).expect(error).iter().map(|v| f64::from(*v)).collect(),
        }
    }

    /// Reads an i32 tensor.
    pub(super) fn read_i32(&mut self, tensor: &Tensor) -> Vec<i32> {
        self.runner.read::<i32>(tensor).expect("the tensor is read")
    }

    fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0..bound`.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        (self.bits() >> 33) as usize % bound
    }

    /// Numbers in -1..1.
    pub(super) fn numbers(&mut self, len: usize) -> Vec<f64> {
        (0..len).map(|_| (self.bits() >> 40) as f64 / (1u64 << 23) as f64 - 1.0).collect()
    }

    /// A permutation of `0..len`.
    pub(super) fn shuffled(&mut self, len: usize) -> Vec<usize> {
        let mut items: Vec<usize> = (0..len).collect();
        for i in (1..len).rev() {
            items.swap(i, self.below(i + 1));
        }
        items
    }

    /// Makes a tensor of given values.
    pub(super) fn floats(&self, shape: &[usize], dtype: DType, values: &[f64]) -> Known {
        let (device, error) = (&self.device, "a tensor");
        let halves: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v as f32)).collect();
        let shorts: Vec<f16> = values.iter().map(|v| f16::from_f32(*v as f32)).collect();
        let singles: Vec<f32> = values.iter().map(|v| *v as f32).collect();
        match dtype {
            DType::Bf16 => Known {
                tensor: device.tensor(shape, &halves).expect(error),
                values: halves.iter().map(|v| f64::from(v.to_f32())).collect(),
            },
            DType::F16 => Known {
                tensor: device.tensor(shape, &shorts).expect(error),
                values: shorts.iter().map(|v| f64::from(v.to_f32())).collect(),
            },
            _ => Known {
                tensor: device.tensor(shape, &singles).expect(error),
                values: singles.iter().map(|v| f64::from(*v)).collect(),
            },
        }
    }

    /// Makes a tensor of numbers in -1..1.
    pub(super) fn random(&mut self, shape: &[usize], dtype: DType) -> Known {
        let values = self.numbers(shape.iter().product());
        self.floats(shape, dtype, &values)
    }

    /// Makes matrices of numbers in -1..1 in all ways that rows may lie: dense, and between columns of NaN at addresses
    /// that are multiples of 16 bytes or not.
    pub(super) fn random_rows(&mut self, rows: usize, columns: usize, dtype: DType) -> [Known; 3] {
        let aligned = columns.next_multiple_of(8) - columns + 8;
        [
            self.random(&[rows, columns], dtype),
            self.random_sliced(rows, columns, dtype),
            self.random_between(rows, columns, 8, aligned, dtype),
        ]
    }

    /// Makes a row-sliced matrix of numbers in -1..1, between columns of NaN.
    pub(super) fn random_sliced(&mut self, rows: usize, columns: usize, dtype: DType) -> Known {
        self.random_between(rows, columns, 3, 5, dtype)
    }

    /// Makes a matrix of numbers in -1..1 between this many columns of NaN.
    pub(super) fn random_between(
        &mut self,
        rows: usize,
        columns: usize,
        left: usize,
        right: usize,
        dtype: DType,
    ) -> Known {
        let mut wide = vec![];
        for _ in 0..rows {
            wide.extend(vec![f64::NAN; left]);
            wide.extend(self.numbers(columns));
            wide.extend(vec![f64::NAN; right]);
        }
        let known = self.floats(&[rows, left + columns + right], dtype, &wide);
        Known {
            tensor: known.tensor.columns(left..left + columns).expect("a column range"),
            values: known.values.into_iter().filter(|v| !v.is_nan()).collect(),
        }
    }

    /// Makes an i32 tensor.
    pub(super) fn ints(&self, values: &[i32]) -> Tensor {
        self.device.tensor(&[values.len()], values).expect("a tensor")
    }
}

/// Asserts that `actual` is within `ulps` roundings of `expected`, relative to the larger of it and `floor`.
pub(super) fn assert_close(what: &str, actual: &[f64], expected: &[f64], dtype: DType, ulps: f64, floor: f64) {
    assert_eq!(actual.len(), expected.len(), "{what}: length");
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        let bound = ulps * epsilon(dtype) * e.abs().max(floor);
        assert!((a - e).abs() <= bound, "{what}, {dtype}, element {i}: expected {e}, got {a}, allowed ±{bound}");
    }
}

/// The RMS norm of one row in f64.
pub(super) fn rms_norm(row: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let mean = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
    row.iter().zip(weight).map(|(v, w)| v / (mean + eps).sqrt() * w).collect()
}
