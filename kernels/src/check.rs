//! Shape checks shared by the ops: each failure names the op, the tensor, what was expected and what was got.

use std::fmt;

use bcg_runtime::{DType, Dims, Error, Result, Tensor};

/// The checks of one op.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Check {
    op: &'static str,
}

impl Check {
    pub(crate) const fn new(op: &'static str) -> Self {
        Self { op }
    }

    /// Makes the error of this op.
    pub(crate) fn error(self, expected: impl fmt::Display, got: impl fmt::Display) -> Error {
        Error::shape(self.op, expected, got)
    }

    /// Refuses another rank, and a tensor of another dtype if one is given.
    pub(crate) fn rank(self, name: &str, tensor: &Tensor, letters: &[&str]) -> Result<()> {
        if tensor.shape().len() == letters.len() {
            return Ok(());
        }
        Err(self.error(format!("`{name}` [{}]", letters.join(", ")), format!("{:?}", tensor.shape())))
    }

    /// Refuses another shape.
    pub(crate) fn shape(self, name: &str, tensor: &Tensor, shape: &[usize]) -> Result<()> {
        if tensor.shape() == shape {
            return Ok(());
        }
        Err(self.error(format!("`{name}` {shape:?}"), format!("{:?}", tensor.shape())))
    }

    /// Refuses another dtype.
    pub(crate) fn dtype(self, name: &str, tensor: &Tensor, dtype: DType) -> Result<()> {
        if tensor.dtype() == dtype {
            return Ok(());
        }
        Err(self.error(format!("`{name}` {dtype}"), tensor.dtype()))
    }

    /// Refuses another shape or dtype, and gaps between rows.
    pub(crate) fn dense(self, name: &str, tensor: &Tensor, shape: &[usize], dtype: DType) -> Result<()> {
        self.shape(name, tensor, shape)?;
        self.dtype(name, tensor, dtype)?;
        self.contiguous(name, tensor)
    }

    /// Refuses gaps between rows.
    pub(crate) fn contiguous(self, name: &str, tensor: &Tensor) -> Result<()> {
        if tensor.is_contiguous() {
            return Ok(());
        }
        Err(self.error(format!("`{name}` contiguous"), format!("rows {} elements apart", tensor.row_stride())))
    }

    /// Refuses what the kernels cannot count.
    pub(crate) fn u32(self, name: &str, number: usize) -> Result<u32> {
        match u32::try_from(number) {
            Ok(number) if number <= i32::MAX as u32 => Ok(number),
            _ => Err(self.error(format!("{name} of at most {}", i32::MAX), number)),
        }
    }

    /// One block of `threads` for each row of `tensor`.
    pub(crate) fn block_per_row(self, tensor: &Tensor, threads: u32) -> Result<Dims> {
        Ok(Dims::linear(self.u32("rows", tensor.dim(0))?, threads))
    }

    /// Blocks of 128 threads: in x one row of `tensor`, in y pieces of it, four 16-byte words for each thread.
    pub(crate) fn blocks_per_row(self, tensor: &Tensor) -> Result<Dims> {
        const PIECE_BYTES: i64 = 4 * 16 * 128;
        let dims = self.block_per_row(tensor, 128)?;
        let pieces = row_bytes(tensor).div_euclid(PIECE_BYTES).clamp(1, 64) as u32;
        Ok(Dims { grid: [dims.grid[0], pieces, 1], ..dims })
    }
}

/// Bytes from one row to the next, as kernels take it.
pub(crate) fn row_stride_bytes(tensor: &Tensor) -> i64 {
    (tensor.row_stride() * tensor.dtype().size_bytes()) as i64
}

/// Bytes of one row.
pub(crate) fn row_bytes(tensor: &Tensor) -> i64 {
    (tensor.shape()[1..].iter().product::<usize>() * tensor.dtype().size_bytes()) as i64
}

/// A device and a runner for the in-file tests of the ops.
#[cfg(test)]
pub(crate) mod testing {
    use bcg_runtime::{Context, Device, Error, Result, Runner, RunnerOptions};

    /// Runs an op that must be refused, and returns what it says.
    pub(crate) fn refusal<R>(device: &Device, op: impl FnOnce(&mut Context<'_, ()>) -> Result<R>) -> String {
        let mut runner = Runner::new(device, RunnerOptions::default()).expect("the host device has a runner");
        let error = runner.eager(&(), |cx| op(cx).map(|_| ())).expect_err("the op must refuse this");
        assert!(matches!(error.root(), Error::Shape { .. }), "{error}");
        error.to_string()
    }
}
