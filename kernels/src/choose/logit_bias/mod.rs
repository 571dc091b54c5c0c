//! Bias of single logits; CUDA source: `logit_bias.cu`.

mod host;

use bcg_runtime::{DType, DevicePtr, Dims, Kernel, KernelArgs, OpStream, Result, Source, Tensor};

use crate::check::Check;
use host::host;

static SOURCE: Source = source!("choose/logit_bias/logit_bias.cu").takes::<LogitBiasArgs>();
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("logit_bias");

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct LogitBiasArgs {
    #[points_to(f32)]
    logits: DevicePtr,
    #[points_to(const i32)]
    rows: DevicePtr,
    #[points_to(const i32)]
    tokens: DevicePtr,
    #[points_to(const f32)]
    values: DevicePtr,
    stride: i64,
    num_rows: u32,
    columns: u32,
    num_entries: u32,
    _padding: u32,
}

// SAFETY: `logit_bias` has checked the shapes when it launches, and the source indexes by these alone.
static LOGIT_BIAS: Kernel<LogitBiasArgs> = unsafe { Kernel::new("logit_bias", &SOURCE, host) }.programmatic();

/// Adds to single logits, in place: `logits[rows[i], tokens[i]] += values[i]`.
///
/// Each pair of a row and a token may occur once; the result is undefined where one occurs twice. An entry outside
/// `logits`, such as one of row -1, does nothing.
///
/// # Shapes
/// - `logits`: `[B, V]` f32, may be row-sliced.   - `rows`, `tokens`: `[N]` i32.   - `values`: `[N]` f32.
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
/// let (rows, tokens) = (device.tensor(&[2], &[0, 1])?, device.tensor(&[2], &[2, 0])?);
/// let values = device.tensor(&[2], &[-100.0f32, 0.5])?;
/// runner.eager(&(), |cx| bcg_kernels::logit_bias(cx, &logits, &rows, &tokens, &values))?;
/// assert_eq!(runner.read::<f32>(&logits)?, [0.0, 1.0, -98.0, 3.5, 4.0, 5.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn logit_bias(cx: &mut OpStream, logits: &Tensor, rows: &Tensor, tokens: &Tensor, values: &Tensor) -> Result<()> {
    CHECK.rank("logits", logits, &["B", "V"])?;
    CHECK.dtype("logits", logits, DType::F32)?;
    CHECK.rank("rows", rows, &["N"])?;
    CHECK.dense("rows", rows, rows.shape(), DType::I32)?;
    CHECK.dense("tokens", tokens, rows.shape(), DType::I32)?;
    CHECK.dense("values", values, rows.shape(), DType::F32)?;
    let args = LogitBiasArgs {
        logits: cx.addr(logits)?,
        rows: cx.addr(rows)?,
        tokens: cx.addr(tokens)?,
        values: cx.addr(values)?,
        stride: logits.row_stride() as i64,
        num_rows: CHECK.u32("B", logits.dim(0))?,
        columns: CHECK.u32("V", logits.dim(1))?,
        num_entries: CHECK.u32("N", rows.dim(0))?,
        _padding: 0,
    };
    cx.launch(&LOGIT_BIAS, Dims::per_item(rows.dim(0), 128), args)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::Device;

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let (logits, ints) = (device.zeros(&[2, 3], DType::F32)?, device.zeros(&[4], DType::I32)?);
        let (few, values) = (device.zeros(&[3], DType::I32)?, device.zeros(&[4], DType::F32)?);
        let says = |tokens, values| refusal(&device, |cx| logit_bias(cx, &logits, &ints, tokens, values));
        assert!(says(&few, &values).contains("`tokens` [4], got [3]"));
        assert!(says(&ints, &ints).contains("`values` f32, got i32"));
        Ok(())
    }
}
