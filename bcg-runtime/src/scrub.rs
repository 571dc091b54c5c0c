//! Zeros in the padded rows (law L11); CUDA source: `cuda/scrub_tail.cu`.
//!
//! The kernel reads the number of valid rows from device memory, so its arguments are the same for every batch of a
//! capture size: in a healed replay its node is never patched.

use crate::compile::Source;
use crate::{DevicePtr, Dims, HostMemory, Kernel, KernelArgs, OpStream, Result, Tensor};

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct ScrubTailArgs {
    #[points_to(u8)]
    x: DevicePtr,
    #[points_to(const i32)]
    valid_rows: DevicePtr,
    stride_bytes: i64,
    row_bytes: i64,
    rows: i64,
}

pub(crate) static SOURCE: Source =
    Source::new("scrub_tail.cu", include_str!("../cuda/scrub_tail.cu")).takes::<ScrubTailArgs>();

// SAFETY: `scrub_rows`, the only launch, gets address, rows and bytes of one tensor or one bridge; the source writes
// `row_bytes` of rows below `rows`, after `wait_for_inputs`, as `host` does.
static SCRUB_TAIL: Kernel<ScrubTailArgs> = unsafe { Kernel::new("scrub_tail", &SOURCE, host) }.programmatic();

/// Blocks of a launch at most: they take rows in turn.
const BLOCKS_MAX: usize = 256;
const THREADS: u32 = 256;

impl OpStream {
    /// Enqueues zeros for the padded rows of `x`: every row from the number of valid rows of the forward on.
    ///
    /// Bridges need no call of this: the runtime scrubs them.
    ///
    /// # Capture
    /// Enqueues one kernel. Frozen: shape and address. Read again at each replay: the number of valid rows.
    ///
    /// # Errors
    /// Those of [`OpStream::addr`]; the driver's.
    ///
    /// # Example
    /// ```
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
    /// runner.eager(&Batch, |cx| cx.scrub_tail(&x))?;
    /// runner.synchronize()?;
    /// assert_eq!(device.read::<f32>(&x)?, [1.0, 0.0, 0.0]);
    /// # Ok::<(), bcg_runtime::Error>(())
    /// ```
    pub fn scrub_tail(&mut self, x: &Tensor) -> Result<()> {
        let ptr = self.addr(x)?;
        self.scrub_rows(ptr, x.dim(0), x.row_bytes(), x.row_stride() * x.dtype().size_bytes())
    }

    /// As [`scrub_tail`](Self::scrub_tail), for `rows` rows of `row_bytes` that lie `stride_bytes` apart.
    pub(crate) fn scrub_rows(
        &mut self,
        x: DevicePtr,
        rows: usize,
        row_bytes: usize,
        stride_bytes: usize,
    ) -> Result<()> {
        let args = ScrubTailArgs {
            x,
            valid_rows: self.valid_rows_ptr(),
            stride_bytes: stride_bytes as i64,
            row_bytes: row_bytes as i64,
            rows: rows as i64,
        };
        let blocks = if row_bytes == 0 { 0 } else { rows.min(BLOCKS_MAX) };
        self.launch(&SCRUB_TAIL, Dims::linear(blocks as u32, THREADS), args)
    }
}

fn host(a: &ScrubTailArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let valid = memory.view::<i32>(a.valid_rows, 1)?[0].get();
    for row in i64::from(valid.max(0))..a.rows {
        let row = memory.view_at::<u8>(a.x, (row * a.stride_bytes) as usize, a.row_bytes as usize)?;
        row.iter().for_each(|byte| byte.set(0));
    }
    Ok(())
}
