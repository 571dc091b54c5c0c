//! Exclusion of tokens by bit masks; CUDA source: `token_mask.cu`.

mod host;

use bcg_runtime::{DType, DevicePtr, Dims, Kernel, KernelArgs, OpStream, Result, Source, Tensor};

use crate::check::Check;
use host::host;

static SOURCE: Source = source!("choose/token_mask/token_mask.cu").takes::<TokenMaskArgs>();
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("token_mask");

/// Logits that a thread has at most, while blocks are few.
const PER_THREAD: usize = 16;
const THREADS: usize = 256;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct TokenMaskArgs {
    #[points_to(f32)]
    logits: DevicePtr,
    #[points_to(const i32)]
    rows: DevicePtr,
    #[points_to(const u32)]
    mask: DevicePtr,
    stride: i64,
    num_rows: u32,
    columns: u32,
    words: u32,
    _padding: u32,
}

// SAFETY: `token_mask` has checked the shapes when it launches, and the source indexes by these alone.
static TOKEN_MASK: Kernel<TokenMaskArgs> = unsafe { Kernel::new("token_mask", &SOURCE, host) }.programmatic();

/// Sets the logits of tokens that a mask excludes to -infinity, in place.
///
/// `logits[rows[r], v] = -infinity` where bit `v % 32` of `mask[r, v / 32]` is 0. A row outside `logits`, such as -1, is
/// skipped; of a row that occurs twice the tokens in both masks are left.
///
/// # Shapes
/// - `logits`: `[B, V]` f32, may be row-sliced.   - `rows`: `[R]` i32.   - `mask`: `[R, ceil(V / 32)]` i32.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes and addresses. Read again at each replay: the contents of all tensors.
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
/// let logits = device.tensor(&[2, 3], &[0.0f32, 1.0, 2.0, 3.0, 4.0, 5.0])?;
/// let (rows, mask) = (device.tensor(&[1], &[1])?, device.tensor(&[1, 1], &[0b011])?);
/// runner.eager(&(), |cx| bcg_kernels::token_mask(cx, &logits, &rows, &mask))?;
/// assert_eq!(runner.read::<f32>(&logits)?, [0.0, 1.0, 2.0, 3.0, 4.0, f32::NEG_INFINITY]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn token_mask(cx: &mut OpStream, logits: &Tensor, rows: &Tensor, mask: &Tensor) -> Result<()> {
    CHECK.rank("logits", logits, &["B", "V"])?;
    CHECK.dtype("logits", logits, DType::F32)?;
    CHECK.rank("rows", rows, &["R"])?;
    CHECK.dense("rows", rows, rows.shape(), DType::I32)?;
    let words = logits.dim(1).div_ceil(32);
    CHECK.dense("mask", mask, &[rows.dim(0), words], DType::I32)?;
    let dims = CHECK.block_per_row(rows, THREADS as u32)?;
    let pieces = logits.dim(1).div_ceil(PER_THREAD * THREADS).min(64) as u32;
    let args = TokenMaskArgs {
        logits: cx.addr(logits)?,
        rows: cx.addr(rows)?,
        mask: cx.addr(mask)?,
        stride: logits.row_stride() as i64,
        num_rows: CHECK.u32("B", logits.dim(0))?,
        columns: CHECK.u32("V", logits.dim(1))?,
        words: CHECK.u32("words", words)?,
        _padding: 0,
    };
    cx.launch(&TOKEN_MASK, Dims { grid: [dims.grid[0], pieces, 1], ..dims }, args)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::Device;

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let (logits, rows) = (device.zeros(&[2, 33], DType::F32)?, device.zeros(&[2], DType::I32)?);
        let (one, floats) = (device.zeros(&[2, 1], DType::I32)?, device.zeros(&[2, 2], DType::F32)?);
        let says = |mask| refusal(&device, |cx| token_mask(cx, &logits, &rows, mask));
        assert!(says(&one).contains("`mask` [2, 2], got [2, 1]"));
        assert!(says(&floats).contains("`mask` i32, got f32"));
        Ok(())
    }
}
