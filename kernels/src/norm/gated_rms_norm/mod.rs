//! RMS norm of groups of columns, after a gate; CUDA source: `gated_rms_norm.cu`.

mod host;

use bcg_runtime::{DevicePtr, KernelArgs, OpStream, Result, Source, Tensor};

use crate::check::Check;
use crate::float::{PerFloat, pack_len, per_float};
use host::host;

static SOURCE: Source = source!("norm/gated_rms_norm/gated_rms_norm.cu").takes::<GatedRmsNormArgs>();
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("gated_rms_norm");

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct GatedRmsNormArgs {
    y: DevicePtr,
    gate: DevicePtr,
    weight: DevicePtr,
    out: DevicePtr,
    y_stride: i64,
    gate_stride: i64,
    columns: u32,
    /// Columns of a group.
    group: u32,
    eps: f32,
    _padding: u32,
}

// SAFETY: `gated_rms_norm` has checked the shapes when it launches, and the source indexes by these alone.
static GATED_RMS_NORM: PerFloat<GatedRmsNormArgs> = per_float!("gated_rms_norm", SOURCE, host).programmatic();

/// Multiplies `y` with the SiLU of `gate`, normalises each group of columns by its root mean square and scales it by
/// `weight`.
///
/// With `v = y * gate / (1 + exp(-gate))`, `out[t, c] = round(v[t, c] / sqrt(mean(v²) + eps)) * weight[c]` with the mean over
/// the `group` columns of the group of `c`, in f32, rounded to the dtype before and after the product with `weight`, as
/// transformers does.
///
/// # Shapes
/// - `y`, `gate`, `out`: `[T, C]`, bf16, f16 or f32; `y` and `gate` may be row-sliced.
/// - `weight`: `[C]`, same dtype; C a multiple of `group`.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes, addresses, `group`, `eps`. Read again at each replay: the contents of all tensors.
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
/// let y = device.tensor(&[1, 4], &[3.0f32, -3.0, 0.0, 0.5])?;
/// let gate = device.tensor(&[1, 4], &[100.0f32; 4])?;
/// let weight = device.tensor(&[4], &[1.0f32, 0.5, 1.0, 0.0])?;
/// let out = runner.eager(&(), |cx| bcg_kernels::gated_rms_norm(cx, &y, &gate, &weight, 2, 0.0))?;
/// assert_eq!(runner.read::<f32>(&out)?, [1.0, -0.5, 0.0, 0.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn gated_rms_norm(
    cx: &mut OpStream,
    y: &Tensor,
    gate: &Tensor,
    weight: &Tensor,
    group: usize,
    eps: f32,
) -> Result<Tensor> {
    CHECK.rank("y", y, &["T", "C"])?;
    CHECK.shape("gate", gate, y.shape())?;
    CHECK.dtype("gate", gate, y.dtype())?;
    CHECK.dense("weight", weight, &[y.dim(1)], y.dtype())?;
    if group == 0 || !y.dim(1).is_multiple_of(group) {
        return Err(CHECK.error(format!("a divisor of C = {} as `group`", y.dim(1)), group));
    }
    let kernel = GATED_RMS_NORM.get(CHECK, "y", y.dtype())?;
    let threads = group.div_ceil(pack_len(y.dtype())).next_multiple_of(32).min(256);
    let mut dims = CHECK.block_per_row(y, threads as u32)?;
    dims.grid[1] = CHECK.u32("groups", y.dim(1) / group)?;
    let out = cx.empty(y.shape(), y.dtype())?;
    let args = GatedRmsNormArgs {
        y: cx.addr(y)?,
        gate: cx.addr(gate)?,
        weight: cx.addr(weight)?,
        out: cx.addr(&out)?,
        y_stride: y.row_stride() as i64,
        gate_stride: gate.row_stride() as i64,
        columns: CHECK.u32("C", y.dim(1))?,
        group: CHECK.u32("group", group)?,
        eps,
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
        let (y, weight) = (device.zeros(&[2, 8], DType::Bf16)?, device.zeros(&[8], DType::Bf16)?);
        let (narrow, single) = (device.zeros(&[2, 7], DType::Bf16)?, device.zeros(&[8], DType::F32)?);
        let says = |gate, weight, group| refusal(&device, |cx| gated_rms_norm(cx, &y, gate, weight, group, 0.0));
        assert!(says(&narrow, &weight, 4).contains("`gate` [2, 8], got [2, 7]"));
        assert!(says(&y, &single, 4).contains("`weight` bf16, got f32"));
        assert!(says(&y, &weight, 3).contains("a divisor of C = 8 as `group`, got 3"));
        Ok(())
    }
}
