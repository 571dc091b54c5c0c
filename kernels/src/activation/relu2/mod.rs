//! Squared ReLU; CUDA source: `relu2.cu`.

mod host;

use bcg_runtime::{DevicePtr, KernelArgs, OpStream, Result, Source, Tensor};

use crate::check::Check;
use crate::float::{PerFloat, pack_len, per_float};
use host::host;

static SOURCE: Source = source!("activation/relu2/relu2.cu").takes::<Relu2Args>();
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("relu2");

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct Relu2Args {
    x: DevicePtr,
    out: DevicePtr,
    x_stride: i64,
    columns: u32,
    _padding: u32,
}

// SAFETY: `relu2` has checked the shapes when it launches, and the source indexes by these alone.
static RELU2: PerFloat<Relu2Args> = per_float!("relu2", SOURCE, host).programmatic();

const THREADS: u32 = 128;

/// Squares what is positive and makes zero of the rest: `out[t, c] = max(x[t, c], 0)²`, rounded once.
///
/// # Shapes
/// - `x`, `out`: `[T, C]`, bf16, f16 or f32; `x` may be row-sliced.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes and addresses. Read again at each replay: `x`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if `x` is no matrix of floats; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let x = device.tensor(&[1, 3], &[-2.0f32, 0.5, 3.0])?;
/// let out = runner.eager(&(), |cx| bcg_kernels::relu2(cx, &x))?;
/// assert_eq!(runner.read::<f32>(&out)?, [0.0, 0.25, 9.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn relu2(cx: &mut OpStream, x: &Tensor) -> Result<Tensor> {
    CHECK.rank("x", x, &["T", "C"])?;
    let kernel = RELU2.get(CHECK, "x", x.dtype())?;
    let mut dims = CHECK.block_per_row(x, THREADS)?;
    // In y one pack for each thread; a grid that CUDA cannot take goes around again.
    let packs = x.dim(1).div_ceil(pack_len(x.dtype()));
    dims.grid[1] = packs.div_ceil(THREADS as usize).clamp(1, 65_535) as u32;
    let out = cx.empty(x.shape(), x.dtype())?;
    let args = Relu2Args {
        x: cx.addr(x)?,
        out: cx.addr(&out)?,
        x_stride: x.row_stride() as i64,
        columns: CHECK.u32("C", x.dim(1))?,
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
        let (flat, ids) = (device.zeros(&[4], DType::F32)?, device.zeros(&[2, 4], DType::I32)?);
        assert!(refusal(&device, |cx| relu2(cx, &flat)).contains("`x` [T, C], got [4]"));
        assert!(refusal(&device, |cx| relu2(cx, &ids)).contains("bf16, f16 or f32, got i32"));
        Ok(())
    }
}
