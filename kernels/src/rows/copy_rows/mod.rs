//! Strided copy of rows; CUDA source: `copy_rows.cu`.

mod host;

use bcg_runtime::{DevicePtr, Kernel, KernelArgs, OpStream, Result, Source, Tensor};

use crate::check::{Check, row_bytes, row_stride_bytes};
use host::host;

static SOURCE: Source = source!("rows/copy_rows/copy_rows.cu").takes::<CopyRowsArgs>();
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("copy_rows");

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct CopyRowsArgs {
    #[points_to(const u8)]
    src: DevicePtr,
    #[points_to(u8)]
    dst: DevicePtr,
    src_stride_bytes: i64,
    dst_stride_bytes: i64,
    row_bytes: i64,
}

// SAFETY: `copy_rows` has checked the shapes when it launches, and the source indexes by these alone.
static COPY_ROWS: Kernel<CopyRowsArgs> = unsafe { Kernel::new("copy_rows", &SOURCE, host) }.programmatic();

/// Copies the rows of `src` into `dst`, whatever the distance between the rows of either.
///
/// `dst[t, …] = src[t, …]`, in one kernel; the two must not overlap.
///
/// # Shapes
/// - `dst`, `src`: equal shapes and dtypes, any rank; both may be row-sliced.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes and addresses. Read again at each replay: `src`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_runtime::{DType, Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let matrix = device.zeros(&[2, 3], DType::I32)?;
/// let column = device.tensor(&[2, 1], &[7, 8])?;
/// runner.eager(&(), |cx| bcg_kernels::copy_rows(cx, &matrix.columns(1..2)?, &column))?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
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
