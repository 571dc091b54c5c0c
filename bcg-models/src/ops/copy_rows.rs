//! Strided copy of rows; CUDA source: `kernels/src/copy_rows.cu`.

use bcg_runtime::{DevicePtr, Dims, HostMemory, Kernel, OpStream, Result, Tensor};
use bytemuck::{AnyBitPattern, NoUninit};

use super::check::{Check, row_bytes, row_stride_bytes};
use super::float::{byte_row, copy_cells};

const CHECK: Check = Check::new("copy_rows");

#[repr(C)]
#[derive(Clone, Copy, NoUninit, AnyBitPattern)]
struct CopyRowsArgs {
    src: DevicePtr,
    dst: DevicePtr,
    src_stride_bytes: i64,
    dst_stride_bytes: i64,
    row_bytes: i64,
}

static COPY_ROWS: Kernel<CopyRowsArgs> = Kernel::new("copy_rows", &bcg_kernels::COPY_ROWS, host).programmatic();

/// Copies the rows of `src` into `dst`, whatever the distance between the rows of either.
///
/// `dst[t, …] = src[t, …]`, in one kernel; the two must not overlap.
///
/// # Shapes
/// - `dst`, `src`: equal shapes and dtypes, any rank; both may be row-sliced.
///
/// # Capture
/// Records one kernel. Frozen: shapes and addresses. Read again at each replay: `src`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_models::ops;
/// use bcg_runtime::{DType, Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let matrix = device.zeros(&[2, 3], DType::I32)?;
/// let column = device.tensor(&[2, 1], &[7, 8])?;
/// runner.eager(&(), |cx| ops::copy_rows(cx, &matrix.columns(1..2)?, &column))?;
/// runner.synchronize()?;
/// assert_eq!(device.read::<i32>(&matrix)?, [0, 7, 0, 0, 8, 0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn copy_rows(cx: &mut OpStream, dst: &Tensor, src: &Tensor) -> Result<()> {
    CHECK.shape("src", src, dst.shape())?;
    CHECK.dtype("src", src, dst.dtype())?;
    let dims = CHECK.blocks_per_row(src)?;
    let args = CopyRowsArgs {
        src: cx.addr(src)?,
        dst: cx.addr(dst)?,
        src_stride_bytes: row_stride_bytes(src),
        dst_stride_bytes: row_stride_bytes(dst),
        row_bytes: row_bytes(src),
    };
    cx.launch(&COPY_ROWS, dims, args)
}

fn host(a: &CopyRowsArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    for t in 0..dims.grid[0] as usize {
        let dst = byte_row(memory, a.dst, a.dst_stride_bytes, t, a.row_bytes)?;
        copy_cells(dst, byte_row(memory, a.src, a.src_stride_bytes, t, a.row_bytes)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::testing::refusal;
    use bcg_runtime::{DType, Device};

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let (a, b) = (device.zeros(&[2, 3], DType::F32)?, device.zeros(&[2, 4], DType::F32)?);
        let c = device.zeros(&[2, 3], DType::I32)?;
        assert!(refusal(&device, |cx| copy_rows(cx, &a, &b)).contains("`src` [2, 3], got [2, 4]"));
        assert!(refusal(&device, |cx| copy_rows(cx, &a, &c)).contains("`src` f32, got i32"));
        Ok(())
    }
}
