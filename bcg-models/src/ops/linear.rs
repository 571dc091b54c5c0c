//! Matrix product with a transposed weight; CUDA source: `kernels/src/linear.cu`.
//!
//! On the host the `gemm` crate multiplies tiles of a fixed shape: with other shapes it may sum in another order, and
//! then a row would depend on how many rows there are, which padding changes.

use bcg_runtime::{CaptureStream, DType, DevicePtr, Dims, HostMemory, Kernel, Result, Tensor};
use bytemuck::{AnyBitPattern, NoUninit};
use half::{bf16, f16};

use super::check::Check;
use super::float::{Float, extend_f32, row};

const CHECK: Check = Check::new("linear");

/// Rows and columns of the output that a thread block of the CUDA kernel computes.
const CUDA_TILE: usize = 64;
/// Rows that the host multiplies at a time; missing ones are zeros.
const HOST_ROWS: usize = 8;
/// Outputs that the host multiplies at a time; bounds the copy of the weight in f32.
const HOST_OUTPUTS: usize = 512;

#[repr(C)]
#[derive(Clone, Copy, NoUninit, AnyBitPattern)]
struct LinearArgs {
    x: DevicePtr,
    weight: DevicePtr,
    out: DevicePtr,
    x_stride: i64,
    weight_stride: i64,
    rows: u32,
    outputs: u32,
    depth: u32,
    _padding: u32,
}

static LINEAR_BF16: Kernel<LinearArgs> = Kernel::new("linear_bf16", &bcg_kernels::LINEAR, host::<bf16, bf16>);
static LINEAR_F16: Kernel<LinearArgs> = Kernel::new("linear_f16", &bcg_kernels::LINEAR, host::<f16, f16>);
static LINEAR_F32: Kernel<LinearArgs> = Kernel::new("linear_f32", &bcg_kernels::LINEAR, host::<f32, f32>);
static LINEAR_BF16_F32: Kernel<LinearArgs> = Kernel::new("linear_bf16_f32", &bcg_kernels::LINEAR, host::<bf16, f32>);
static LINEAR_F16_F32: Kernel<LinearArgs> = Kernel::new("linear_f16_f32", &bcg_kernels::LINEAR, host::<f16, f32>);

/// Multiplies each row of `x` with every row of `weight`, in the dtype of `x`.
///
/// `out[t, n] = sum_k x[t, k] * weight[n, k]`, summed in f32 and rounded once; the weight is stored as checkpoints
/// store it.
///
/// # Shapes
/// - `x`: `[T, K]`, bf16, f16 or f32; may be row-sliced.   - `weight`: `[N, K]`, same dtype; may be row-sliced.
/// - `out`: `[T, N]`.
///
/// # Capture
/// Records one kernel. Frozen: shapes and addresses. Read again at each replay: `x` and `weight`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_models::ops;
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let x = device.tensor(&[1, 2], &[1.0f32, 2.0])?;
/// let weight = device.tensor(&[3, 2], &[1.0f32, 0.0, 0.0, 1.0, 1.0, 1.0])?;
/// let out = runner.eager(&(), |cx| ops::linear(cx, &x, &weight))?;
/// assert_eq!(runner.read::<f32>(&out)?, [1.0, 2.0, 3.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn linear(cx: &mut CaptureStream, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    linear_to(cx, x, weight, x.dtype())
}

/// Multiplies as [`linear()`] does, with an output of `dtype`: that of `x`, or f32 (logits).
///
/// # Shapes
/// As [`linear()`].
///
/// # Capture
/// As [`linear()`].
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_models::ops;
/// use bcg_runtime::{DType, Device, Runner, RunnerOptions};
/// use half::bf16;
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let x = device.tensor(&[1, 2], &[bf16::from_f32(1.0), bf16::from_f32(256.0)])?;
/// let logits = runner.eager(&(), |cx| ops::linear_to(cx, &x, &x, DType::F32))?;
/// assert_eq!(runner.read::<f32>(&logits)?, [65537.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn linear_to(cx: &mut CaptureStream, x: &Tensor, weight: &Tensor, dtype: DType) -> Result<Tensor> {
    CHECK.rank("x", x, &["T", "K"])?;
    CHECK.rank("weight", weight, &["N", "K"])?;
    CHECK.shape("weight", weight, &[weight.dim(0), x.dim(1)])?;
    CHECK.dtype("weight", weight, x.dtype())?;
    let kernel = match (x.dtype(), dtype) {
        (DType::Bf16, DType::Bf16) => &LINEAR_BF16,
        (DType::F16, DType::F16) => &LINEAR_F16,
        (DType::F32, DType::F32) => &LINEAR_F32,
        (DType::Bf16, DType::F32) => &LINEAR_BF16_F32,
        (DType::F16, DType::F32) => &LINEAR_F16_F32,
        (from, to) => return Err(CHECK.error("bf16, f16 or f32 to the same dtype or f32", format!("{from} to {to}"))),
    };
    let (rows, outputs) = (x.dim(0), weight.dim(0));
    let out = cx.empty(&[rows, outputs], dtype)?;
    let args = LinearArgs {
        x: cx.addr(x)?,
        weight: cx.addr(weight)?,
        out: cx.addr(&out)?,
        x_stride: x.row_stride() as i64,
        weight_stride: weight.row_stride() as i64,
        rows: CHECK.u32("T", rows)?,
        outputs: CHECK.u32("N", outputs)?,
        depth: CHECK.u32("K", x.dim(1))?,
        _padding: 0,
    };
    let row_tiles = rows.div_ceil(CUDA_TILE);
    if row_tiles > 65_535 {
        return Err(CHECK.error(format!("at most {} rows", 65_535 * CUDA_TILE), rows));
    }
    let grid = [outputs.div_ceil(CUDA_TILE) as u32, row_tiles as u32, 1];
    cx.launch(kernel, Dims { grid, block: [256, 1, 1], shared_bytes: 0 }, args)?;
    Ok(out)
}

fn host<T: Float, O: Float>(a: &LinearArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let (rows, outputs, depth) = (a.rows as usize, a.outputs as usize, a.depth as usize);
    let mut x = Vec::with_capacity(rows.next_multiple_of(HOST_ROWS) * depth);
    for t in 0..rows {
        extend_f32(&mut x, row::<T>(memory, a.x, a.x_stride, t, depth)?);
    }
    x.resize(rows.next_multiple_of(HOST_ROWS) * depth, 0.0);
    let mut weight = Vec::with_capacity(HOST_OUTPUTS.min(outputs) * depth);
    for first in (0..outputs).step_by(HOST_OUTPUTS) {
        let width = HOST_OUTPUTS.min(outputs - first);
        weight.clear();
        for n in first..first + width {
            extend_f32(&mut weight, row::<T>(memory, a.weight, a.weight_stride, n, depth)?);
        }
        let mut tile = vec![0.0; HOST_ROWS * width];
        for tile_row in (0..rows).step_by(HOST_ROWS) {
            multiply(&mut tile, &x[tile_row * depth..(tile_row + HOST_ROWS) * depth], &weight, width, depth);
            for (t, sums) in (tile_row..rows).zip(tile.chunks(width)) {
                let out = row::<O>(memory, a.out, a.outputs.into(), t, outputs)?;
                out[first..].iter().zip(sums).for_each(|(out, sum)| out.set(O::from_f32(*sum)));
            }
        }
    }
    Ok(())
}

/// `tile[r, n] = sum_k x[r, k] * weight[n, k]` for [`HOST_ROWS`] rows.
fn multiply(tile: &mut [f32], x: &[f32], weight: &[f32], width: usize, depth: usize) {
    assert_eq!(tile.len(), HOST_ROWS * width);
    assert_eq!(x.len(), HOST_ROWS * depth);
    assert_eq!(weight.len(), width * depth);
    let (width_stride, depth_stride) = (width as isize, depth as isize);
    // SAFETY: gemm reads `m × k` and `k × n` elements and writes `m × n`, at the strides given; the three assertions
    // above say that the slices hold exactly these, and `tile` is borrowed mutably, so nothing overlaps.
    #[allow(unsafe_code)]
    unsafe {
        gemm::gemm(
            HOST_ROWS,
            width,
            depth,
            tile.as_mut_ptr(),
            1,
            width_stride,
            false,
            x.as_ptr(),
            1,
            depth_stride,
            weight.as_ptr(),
            depth_stride,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::testing::refusal;
    use bcg_runtime::Device;

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let x = device.zeros(&[2, 8], DType::Bf16)?;
        let narrow = device.zeros(&[4, 7], DType::Bf16)?;
        let other = device.zeros(&[4, 8], DType::F32)?;
        assert!(refusal(&device, |cx| linear(cx, &x, &narrow)).contains("`weight` [4, 8], got [4, 7]"));
        assert!(refusal(&device, |cx| linear(cx, &x, &other)).contains("`weight` bf16, got f32"));
        assert!(refusal(&device, |cx| linear_to(cx, &x, &x, DType::F16)).contains("got bf16 to f16"));
        Ok(())
    }

    #[test]
    fn a_tile_is_the_same_wherever_its_rows_stand() {
        let (width, depth) = (100, 700);
        let number = |i: usize| ((i * 2_654_435_761) % 1000) as f32 / 999.0 - 0.5;
        let weight: Vec<f32> = (0..width * depth).map(number).collect();
        let one: Vec<f32> = (0..depth).map(|i| number(i + 77)).collect();
        let mut first = vec![];
        for place in 0..HOST_ROWS {
            let mut x: Vec<f32> = (0..HOST_ROWS * depth).map(|i| number(i + place)).collect();
            x[place * depth..(place + 1) * depth].copy_from_slice(&one);
            let mut tile = vec![f32::NAN; HOST_ROWS * width];
            multiply(&mut tile, &x, &weight, width, depth);
            let row = tile[place * width..(place + 1) * width].to_vec();
            if place == 0 {
                first.clone_from(&row);
            }
            assert_eq!(row, first, "row {place} of the tile");
        }
    }
}
