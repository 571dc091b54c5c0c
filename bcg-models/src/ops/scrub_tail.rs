//! Zeros in the padded tail; CUDA source: `kernels/src/scrub_tail.cu`.

use bcg_runtime::{CaptureStream, DevicePtr, Dims, HostMemory, Kernel, Result, Tensor};
use bytemuck::{AnyBitPattern, NoUninit};

use super::check::{Check, row_bytes, row_stride_bytes};
use super::float::byte_row;

const CHECK: Check = Check::new("scrub_tail");

#[repr(C)]
#[derive(Clone, Copy, NoUninit, AnyBitPattern)]
struct ScrubTailArgs {
    x: DevicePtr,
    valid_rows: DevicePtr,
    stride_bytes: i64,
    row_bytes: i64,
}

static SCRUB_TAIL: Kernel<ScrubTailArgs> = Kernel::new("scrub_tail", &bcg_kernels::SCRUB_TAIL, host).programmatic();

/// Zeroes the padded rows of `x`, in place.
///
/// `x[t, …] = 0` for every `t` from the number of valid rows on. That number is the one of the forward being run, read
/// from device memory, so a captured scrub follows each replay's batch (law L11). Bridges need no call of this: the
/// runtime scrubs them.
///
/// # Shapes
/// - `x`: any rank and dtype, rows in dimension 0; may be row-sliced.
///
/// # Capture
/// Records one kernel. Frozen: shape and address. Read again at each replay: the number of valid rows.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if there are too many rows; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_models::ops;
/// use bcg_runtime::{Device, LiveBatch, Rows, Runner, RunnerOptions};
///
/// struct Batch;
/// impl LiveBatch for Batch {
///     fn rows(&self) -> Option<Rows> {
///         Some(Rows { valid: 1, padded: 3 })
///     }
/// }
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let x = device.tensor(&[3], &[1.0f32, f32::NAN, 2.0])?;
/// runner.eager(&Batch, |cx| ops::scrub_tail(cx, &x))?;
/// runner.synchronize()?;
/// assert_eq!(device.read::<f32>(&x)?, [1.0, 0.0, 0.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn scrub_tail(cx: &mut CaptureStream, x: &Tensor) -> Result<()> {
    let dims = CHECK.blocks_per_row(x)?;
    let args = ScrubTailArgs {
        x: cx.addr(x)?,
        valid_rows: cx.valid_rows_ptr(),
        stride_bytes: row_stride_bytes(x),
        row_bytes: row_bytes(x),
    };
    cx.launch(&SCRUB_TAIL, dims, args)
}

fn host(a: &ScrubTailArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let valid = memory.view::<i32>(a.valid_rows, 1)?[0].get();
    for t in usize::try_from(valid).unwrap_or(0)..dims.grid[0] as usize {
        byte_row(memory, a.x, a.stride_bytes, t, a.row_bytes)?.iter().for_each(|byte| byte.set(0));
    }
    Ok(())
}
