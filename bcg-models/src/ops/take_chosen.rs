//! New tokens that the step before chose and the host has not seen; CUDA source: `kernels/src/take_chosen.cu`.

use bcg_runtime::{CaptureStream, DType, DevicePtr, Dims, HostMemory, Kernel, Result, Tensor};
use bytemuck::{AnyBitPattern, NoUninit};

use super::check::Check;

const CHECK: Check = Check::new("take_chosen");
const BLOCK: u32 = 256;

#[repr(C)]
#[derive(Clone, Copy, NoUninit, AnyBitPattern)]
struct TakeChosenArgs {
    tokens: DevicePtr,
    chosen: DevicePtr,
    rows: u32,
    num_chosen: u32,
}

static TAKE_CHOSEN: Kernel<TakeChosenArgs> = Kernel::new("take_chosen", &bcg_kernels::TAKE_CHOSEN, host).programmatic();

/// Replaces each negative token `-1 - r` by `chosen[r]`, in place; other tokens stay. A row that `chosen` does not have
/// gives token 0.
///
/// # Shapes
/// - `tokens`: `[T]` i32.   - `chosen`: `[B]` i32.
///
/// # Capture
/// Records one kernel. Frozen: shapes and addresses. Read again at each replay: the contents of both tensors.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if the rank or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_models::ops;
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let (tokens, chosen) = (device.tensor(&[3], &[7, -2, -1])?, device.tensor(&[2], &[40, 41])?);
/// runner.eager(&(), |cx| ops::take_chosen(cx, &tokens, &chosen))?;
/// assert_eq!(runner.read::<i32>(&tokens)?, [7, 41, 40]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn take_chosen(cx: &mut CaptureStream, tokens: &Tensor, chosen: &Tensor) -> Result<()> {
    for (name, tensor, dim) in [("tokens", tokens, "T"), ("chosen", chosen, "B")] {
        CHECK.rank(name, tensor, &[dim])?;
        CHECK.dtype(name, tensor, DType::I32)?;
    }
    let rows = CHECK.u32("T", tokens.dim(0))?;
    let args = TakeChosenArgs {
        tokens: cx.addr(tokens)?,
        chosen: cx.addr(chosen)?,
        rows,
        num_chosen: CHECK.u32("B", chosen.dim(0))?,
    };
    cx.launch(&TAKE_CHOSEN, Dims::per_item(tokens.dim(0), BLOCK), args)
}

fn host(a: &TakeChosenArgs, _dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let tokens = memory.view::<i32>(a.tokens, a.rows as usize)?;
    let chosen = memory.load::<i32>(a.chosen, a.num_chosen as usize)?;
    for token in tokens.iter().filter(|token| token.get() < 0) {
        token.set(chosen.get((-1 - token.get()) as usize).copied().unwrap_or(0));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::testing::refusal;
    use bcg_runtime::Device;

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let (good, floats) = (device.zeros(&[2], DType::I32)?, device.zeros(&[2], DType::F32)?);
        let matrix = device.zeros(&[2, 2], DType::I32)?;
        assert!(refusal(&device, |cx| take_chosen(cx, &floats, &good)).contains("`tokens` i32, got f32"));
        assert!(refusal(&device, |cx| take_chosen(cx, &good, &matrix)).contains("`chosen` [B], got [2, 2]"));
        Ok(())
    }
}
