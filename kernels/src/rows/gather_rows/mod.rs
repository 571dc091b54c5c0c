//! Rows by index; CUDA source: `gather_rows.cu`.

mod host;

use bcg_runtime::{DType, DevicePtr, Kernel, KernelArgs, OpStream, Result, Source, Tensor};

use crate::check::{Check, row_bytes, row_stride_bytes};
use host::host;

static SOURCE: Source = source!("rows/gather_rows/gather_rows.cu").takes::<GatherRowsArgs>();
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("gather_rows");

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct GatherRowsArgs {
    #[points_to(const u8)]
    x: DevicePtr,
    #[points_to(const i32)]
    index: DevicePtr,
    #[points_to(u8)]
    out: DevicePtr,
    x_stride_bytes: i64,
    row_bytes: i64,
    x_rows: i64,
    /// The index of the first row of `x`.
    first_row: i64,
}

// SAFETY: `gather_rows` has checked the shapes when it launches, and the source indexes by these alone.
static GATHER_ROWS: Kernel<GatherRowsArgs> = unsafe { Kernel::new("gather_rows", &SOURCE, host) }.programmatic();

/// Gathers rows of `x` by index, such as the embeddings of tokens or the last token of each sequence.
///
/// `out[b] = x[index[b]]`; an index outside `x`, as a padded row may hold, gives a row of zeros.
///
/// # Shapes
/// - `x`: `[T, C]`, any dtype, may be row-sliced.   - `index`: `[B]` i32.   - `out`: `[B, C]`.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes and addresses. Read again at each replay: `x` and `index`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let x = device.tensor(&[3, 2], &[0.0f32, 1.0, 10.0, 11.0, 20.0, 21.0])?;
/// let last = device.tensor(&[2], &[0, 2])?;
/// let out = runner.eager(&(), |cx| bcg_kernels::gather_rows(cx, &x, &last))?;
/// assert_eq!(runner.read::<f32>(&out)?, [0.0, 1.0, 20.0, 21.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn gather_rows(cx: &mut OpStream, x: &Tensor, index: &Tensor) -> Result<Tensor> {
    gather_rows_from(cx, x, 0, index)
}

/// [`gather_rows`] of a table of which `x` holds the rows from `first_row` on, such as one rank's share of it.
///
/// `out[b] = x[index[b] - first_row]`; an index outside gives a row of zeros.
///
/// # Shapes
/// As [`gather_rows`].
///
/// # Capture
/// As [`gather_rows`]; `first_row` is frozen.
///
/// # Errors
/// As [`gather_rows`].
///
/// # Example
/// ```
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let second_half = device.tensor(&[2, 1], &[20.0f32, 30.0])?;
/// let index = device.tensor(&[3], &[3, 1, 2])?;
/// let out = runner.eager(&(), |cx| bcg_kernels::gather_rows_from(cx, &second_half, 2, &index))?;
/// assert_eq!(runner.read::<f32>(&out)?, [30.0, 0.0, 20.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn gather_rows_from(cx: &mut OpStream, x: &Tensor, first_row: usize, index: &Tensor) -> Result<Tensor> {
    CHECK.rank("x", x, &["T", "C"])?;
    CHECK.rank("index", index, &["B"])?;
    CHECK.dense("index", index, index.shape(), DType::I32)?;
    let out = cx.empty(&[index.dim(0), x.dim(1)], x.dtype())?;
    let dims = CHECK.blocks_per_row(&out)?;
    let args = GatherRowsArgs {
        x: cx.addr(x)?,
        index: cx.addr(index)?,
        out: cx.addr(&out)?,
        x_stride_bytes: row_stride_bytes(x),
        row_bytes: row_bytes(x),
        x_rows: x.dim(0) as i64,
        first_row: i64::from(CHECK.u32("first_row", first_row)?),
    };
    cx.launch(&GATHER_ROWS, dims, args)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::Device;

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let (index, x) = (device.zeros(&[2], DType::F32)?, device.zeros(&[3, 4], DType::F32)?);
        assert!(refusal(&device, |cx| gather_rows(cx, &x, &index)).contains("`index` i32, got f32"));
        assert!(refusal(&device, |cx| gather_rows(cx, &index, &index)).contains("`x` [T, C], got [2]"));
        Ok(())
    }
}
