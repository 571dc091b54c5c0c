//! One step of the state-space recurrence of Mamba2; CUDA source: `ssm_update.cu`.

use bcg_runtime::{Dims, OpStream, Result, Source, Tensor};

use super::ssd_scan::{PerState, SsmArgs, SsmInputs, host_bf16, host_f32};
use crate::check::Check;
use crate::float::per_float;

static SOURCE: Source = source!("ssm/ssm_update/ssm_update.cu").takes::<SsmArgs>().define("THREADS", THREADS as usize);
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("ssm_update");

/// Threads of a block, which takes one head of one sequence.
const THREADS: u32 = 256;

// SAFETY: `ssm_update` has checked the shapes when it launches, and the source indexes by these alone.
static SSM_UPDATE: PerState = PerState {
    f32: per_float!("ssm_update_state_f32", SOURCE, host_f32).programmatic(),
    bf16: per_float!("ssm_update_state_bf16", SOURCE, host_bf16).programmatic(),
};

/// Takes each sequence's state over one token: [`ssd_scan()`](crate::ssd_scan()) where row `t` is all of sequence `t`.
///
/// A sequence may read and write the same slot. A padded row reads slot −1 and writes slot −1, so it touches no state;
/// what it gives is as if it were a first token.
///
/// # Shapes
/// - As the fields of [`SsmInputs`] say, with slots `[T]`.   - Returned: `[T, H P]`.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes, addresses, `dt_limits`. Read again at each replay: the contents of all tensors.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs, or `dt_limits` descend; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_kernels::StateSlots;
/// use bcg_kernels::SsmInputs;
/// use bcg_runtime::{DType, Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let one = device.tensor(&[1, 1], &[1.0f32])?;
/// let (slow, zero) = (device.tensor(&[1], &[-100.0f32])?, device.tensor(&[1], &[0.0f32])?);
/// let state = device.tensor(&[2, 1, 1, 1], &[5.0f32, 0.0])?;
/// let slots = StateSlots { read: device.tensor(&[1], &[0])?, write: device.tensor(&[1], &[1])? };
/// let input = SsmInputs {
///     x: &one,
///     b: &one,
///     c: &one,
///     dt: &one,
///     a_log: &slow, // nothing is forgotten
///     d: &zero,
///     dt_bias: &zero,
///     dt_limits: (0.0, 1.0),
///     state: &state,
///     slots: &slots,
/// };
/// let out = runner.eager(&(), |cx| bcg_kernels::ssm_update(cx, &input))?;
/// assert_eq!(runner.read::<f32>(&out)?, [6.0]);
/// assert_eq!(device.read::<f32>(&state)?, [5.0, 6.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn ssm_update(cx: &mut OpStream, input: &SsmInputs<'_>) -> Result<Tensor> {
    CHECK.rank("x", input.x, &["T", "H P"])?;
    let out = cx.empty(input.x.shape(), input.x.dtype())?;
    let args = input.args(CHECK, cx, input.x.dim(0), None, &out)?;
    let kernel = SSM_UPDATE.get(CHECK, input.x.dtype(), input.state.dtype())?;
    let blocks = CHECK.u32("T * H", input.x.dim(0) * args.heads as usize)?;
    cx.launch(kernel, Dims::linear(blocks, THREADS), args)?;
    Ok(out)
}
