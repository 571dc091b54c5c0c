//! Gated activation; CUDA source: `silu_mul.cu`.

mod host;

use bcg_runtime::{DevicePtr, KernelArgs, OpStream, Result, Source, Tensor};

use crate::check::Check;
use crate::float::{PerFloat, pack_len, per_float};
use host::host;

pub(crate) use host::gated;

static SOURCE: Source = source!("activation/silu_mul/silu_mul.cu").takes::<SiluMulArgs>();
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("silu_mul");

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct SiluMulArgs {
    gate_up: DevicePtr,
    out: DevicePtr,
    stride: i64,
    columns: u32,
    _padding: u32,
}

// SAFETY: `silu_mul` has checked the shapes when it launches, and the source indexes by these alone.
static SILU_MUL: PerFloat<SiluMulArgs> = per_float!("silu_mul", SOURCE, host).programmatic();

const THREADS: u32 = 128;

/// Applies SiLU to the first half of each row and multiplies it with the second half.
///
/// `out[t, i] = round(g / (1 + exp(-g))) * gate_up[t, I + i]` with `g = gate_up[t, i]`, in f32, rounded to the dtype
/// before and after the product, as transformers does.
///
/// # Shapes
/// - `gate_up`: `[T, 2 I]`, bf16, f16 or f32; may be row-sliced.   - `out`: `[T, I]`.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes and addresses. Read again at each replay: `gate_up`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if the columns are odd or the dtype is no float; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let gate_up = device.tensor(&[1, 4], &[0.0f32, 100.0, 5.0, 2.0])?;
/// let out = runner.eager(&(), |cx| bcg_kernels::silu_mul(cx, &gate_up))?;
/// assert_eq!(runner.read::<f32>(&out)?, [0.0, 200.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn silu_mul(cx: &mut OpStream, gate_up: &Tensor) -> Result<Tensor> {
    CHECK.rank("gate_up", gate_up, &["T", "2 I"])?;
    if !gate_up.dim(1).is_multiple_of(2) {
        return Err(CHECK.error("`gate_up` [T, 2 I]", format!("{:?}", gate_up.shape())));
    }
    let kernel = SILU_MUL.get(CHECK, "gate_up", gate_up.dtype())?;
    let mut dims = CHECK.block_per_row(gate_up, THREADS)?;
    // In y one pack for each thread; a grid that CUDA cannot take goes around again.
    let packs = (gate_up.dim(1) / 2).div_ceil(pack_len(gate_up.dtype()));
    dims.grid[1] = packs.div_ceil(THREADS as usize).clamp(1, 65_535) as u32;
    let out = cx.empty(&[gate_up.dim(0), gate_up.dim(1) / 2], gate_up.dtype())?;
    let args = SiluMulArgs {
        gate_up: cx.addr(gate_up)?,
        out: cx.addr(&out)?,
        stride: gate_up.row_stride() as i64,
        columns: CHECK.u32("I", out.dim(1))?,
        _padding: 0,
    };
    cx.launch(kernel, dims, args)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::{DType, Device};

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let (odd, ids) = (device.zeros(&[2, 5], DType::F32)?, device.zeros(&[2, 4], DType::I32)?);
        assert!(refusal(&device, |cx| silu_mul(cx, &odd)).contains("`gate_up` [T, 2 I], got [2, 5]"));
        assert!(refusal(&device, |cx| silu_mul(cx, &ids)).contains("bf16, f16 or f32, got i32"));
        Ok(())
    }
}
