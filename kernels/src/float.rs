//! Floating-point elements that compute in f32, and kernels in one version per element type.
//!
//! The Rust twin of the conversions in `bcg-runtime/cuda/bcg.cuh`.

use std::cell::Cell;

use bcg_runtime::{DType, DevicePtr, Element, HostMemory, Kernel, KernelArgs, Result};

use crate::check::Check;

/// An element type of activations and weights.
pub(crate) trait Float: Element {
    fn to_f32(self) -> f32;
    /// Rounds to the nearest even value.
    fn from_f32(value: f32) -> Self;
    /// The f32 nearest to `value` that this type can hold.
    fn round(value: f32) -> f32 {
        Self::from_f32(value).to_f32()
    }
}

impl Float for f32 {
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Float for half::bf16 {
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

impl Float for half::f16 {
    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// One kernel for each float dtype.
#[derive(Debug)]
pub(crate) struct PerFloat<A: KernelArgs> {
    pub(crate) bf16: Kernel<A>,
    pub(crate) f16: Kernel<A>,
    pub(crate) f32: Kernel<A>,
}

impl<A: KernelArgs> PerFloat<A> {
    /// Lets the kernels start while the kernel before still runs; see [`Kernel::programmatic`].
    pub(crate) const fn programmatic(self) -> Self {
        let Self { bf16, f16, f32 } = self;
        Self { bf16: bf16.programmatic(), f16: f16.programmatic(), f32: f32.programmatic() }
    }

    /// Returns the kernel of a dtype; the refusal of another names `name`.
    pub(crate) fn get(&'static self, check: Check, name: &str, dtype: DType) -> Result<&'static Kernel<A>> {
        match dtype {
            DType::Bf16 => Ok(&self.bf16),
            DType::F16 => Ok(&self.f16),
            DType::F32 => Ok(&self.f32),
            other => Err(check.error(format!("`{name}` bf16, f16 or f32"), other)),
        }
    }
}

/// Names the kernels `<name>_bf16`, `<name>_f16` and `<name>_f32` of a source, with one generic host reference.
///
/// Each use is a promise about the source, as `Kernel::new` is, and says what it rests on.
macro_rules! per_float {
    ($name:literal, $source:expr, $host:ident) => {
        // SAFETY: the comment at the use of this macro names the checks.
        unsafe {
            $crate::float::PerFloat {
                bf16: bcg_runtime::Kernel::new(concat!($name, "_bf16"), &$source, $host::<half::bf16>),
                f16: bcg_runtime::Kernel::new(concat!($name, "_f16"), &$source, $host::<half::f16>),
                f32: bcg_runtime::Kernel::new(concat!($name, "_f32"), &$source, $host::<f32>),
            }
        }
    };
}
pub(crate) use per_float;

/// Elements of a 16-byte word, the widest access of a thread (`Pack::LEN` in `bcg-runtime/cuda/bcg.cuh`).
pub(crate) const fn pack_len(dtype: DType) -> usize {
    16 / dtype.size_bytes()
}

/// Views row `row` of a matrix on the host device: `len` elements, rows `stride` elements apart.
pub(crate) fn row<'a, T: Element>(
    memory: &HostMemory<'a>,
    matrix: DevicePtr,
    stride: i64,
    row: usize,
    len: usize,
) -> Result<&'a [Cell<T>]> {
    memory.view_at(matrix, row * stride as usize, len)
}

/// Views row `row` of a matrix of bytes.
pub(crate) fn byte_row<'a>(
    memory: &HostMemory<'a>,
    matrix: DevicePtr,
    stride_bytes: i64,
    row: usize,
    bytes: i64,
) -> Result<&'a [Cell<u8>]> {
    memory.view_at(matrix, row * stride_bytes as usize, bytes as usize)
}

/// Copies bytes from cell to cell.
pub(crate) fn copy_cells<T: Copy>(to: &[Cell<T>], from: &[Cell<T>]) {
    to.iter().zip(from).for_each(|(to, from)| to.set(from.get()));
}

/// Appends elements as f32.
pub(crate) fn extend_f32<T: Float>(to: &mut Vec<f32>, from: &[Cell<T>]) {
    to.extend(from.iter().map(|value| value.get().to_f32()));
}

/// The dot product, in eight interleaved sums: one order whatever surrounds it, and fast without intrinsics.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 8;
    let mut sums = [0.0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
        }
    }
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_converts_as_the_half_crate_does() {
        for bits in 0..=u16::MAX {
            let value = half::bf16::from_bits(bits);
            let (ours, theirs) = (Float::to_f32(value), value.to_f32());
            assert!(ours == theirs || (ours.is_nan() && theirs.is_nan()), "{bits:#06x}");
        }
    }

    #[test]
    fn a_dot_product_counts_every_element() {
        for len in 0..40 {
            let a: Vec<f32> = (0..len).map(|i| i as f32).collect();
            let expected: f32 = a.iter().map(|v| v * 2.0).sum();
            assert_eq!(dot(&a, &vec![2.0; len]), expected, "{len}");
        }
    }
}
