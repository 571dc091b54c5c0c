//! One value everywhere; CUDA source: `kernels/src/fill.cu`.

use bcg_runtime::{CaptureStream, DevicePtr, Dims, Element, HostMemory, Kernel, Result, Tensor};
use bytemuck::{AnyBitPattern, NoUninit};

use super::check::{Check, row_stride_bytes};
use super::float::byte_row;

const CHECK: Check = Check::new("fill");

#[repr(C)]
#[derive(Clone, Copy, NoUninit, AnyBitPattern)]
struct FillArgs {
    x: DevicePtr,
    bits: u64,
    stride: i64,
    columns: u32,
    _padding: u32,
}

static FILL_1: Kernel<FillArgs> = Kernel::new("fill_1", &bcg_kernels::FILL, host::<1>);
static FILL_2: Kernel<FillArgs> = Kernel::new("fill_2", &bcg_kernels::FILL, host::<2>);
static FILL_4: Kernel<FillArgs> = Kernel::new("fill_4", &bcg_kernels::FILL, host::<4>);
static FILL_8: Kernel<FillArgs> = Kernel::new("fill_8", &bcg_kernels::FILL, host::<8>);

/// Sets every element of `x` to `value`, in place.
///
/// # Shapes
/// - `x`: any rank, dtype that of `T`; may be row-sliced.
///
/// # Capture
/// Records one kernel. Frozen: shape, address and `value`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if the dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_models::ops;
/// use bcg_runtime::{DType, Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let x = device.zeros(&[3], DType::F32)?;
/// runner.eager(&(), |cx| ops::fill(cx, &x, 0.5f32))?;
/// runner.synchronize()?;
/// assert_eq!(device.read::<f32>(&x)?, [0.5; 3]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn fill<T: Element>(cx: &mut CaptureStream, x: &Tensor, value: T) -> Result<()> {
    CHECK.dtype("x", x, T::DTYPE)?;
    let kernel = match size_of::<T>() {
        1 => &FILL_1,
        2 => &FILL_2,
        4 => &FILL_4,
        _ => &FILL_8,
    };
    let mut bits = [0; 8];
    bits[..size_of::<T>()].copy_from_slice(bytemuck::bytes_of(&value));
    let args = FillArgs {
        x: cx.addr(x)?,
        bits: u64::from_le_bytes(bits),
        stride: row_stride_bytes(x) / size_of::<T>() as i64,
        columns: CHECK.u32("elements of a row", x.shape()[1..].iter().product())?,
        _padding: 0,
    };
    cx.launch(kernel, CHECK.block_per_row(x, 128)?, args)
}

fn host<const BYTES: usize>(a: &FillArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let (element, width) = (a.bits.to_le_bytes(), BYTES as i64);
    for t in 0..dims.grid[0] as usize {
        let row = byte_row(memory, a.x, a.stride * width, t, i64::from(a.columns) * width)?;
        row.iter().zip(element[..BYTES].iter().cycle()).for_each(|(byte, value)| byte.set(*value));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::testing::refusal;
    use bcg_runtime::{DType, Device};

    #[test]
    fn a_value_of_another_type_is_refused() -> Result<()> {
        let device = Device::host();
        let x = device.zeros(&[2], DType::F32)?;
        assert!(refusal(&device, |cx| fill(cx, &x, 1i32)).contains("`x` i32, got f32"));
        Ok(())
    }
}
