//! One value everywhere; CUDA source: `fill.cu`.

mod host;

use bcg_runtime::{DevicePtr, Element, Kernel, KernelArgs, OpStream, Result, Source, Tensor};

use crate::check::{Check, row_bytes, row_stride_bytes};
use host::host;

static SOURCE: Source = source!("rows/fill/fill.cu").takes::<FillArgs>();
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("fill");

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct FillArgs {
    #[points_to(u8)]
    x: DevicePtr,
    /// The element, repeated to 8 bytes.
    pattern: u64,
    stride_bytes: i64,
    row_bytes: i64,
}

// SAFETY: `fill` has checked the shapes when it launches, and the source indexes by these alone.
static FILL: Kernel<FillArgs> = unsafe { Kernel::new("fill", &SOURCE, host) }.programmatic();

/// Sets every element of `x` to `value`, in place.
///
/// # Shapes
/// - `x`: any rank, dtype that of `T`; may be row-sliced.
///
/// # Capture
/// Enqueues one kernel. Frozen: shape, address and `value`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if the dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_runtime::{DType, Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let x = device.zeros(&[3], DType::F32)?;
/// runner.eager(&(), |cx| bcg_kernels::fill(cx, &x, 0.5f32))?;
/// runner.synchronize()?;
/// assert_eq!(device.read::<f32>(&x)?, [0.5; 3]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn fill<T: Element>(cx: &mut OpStream, x: &Tensor, value: T) -> Result<()> {
    CHECK.dtype("x", x, T::DTYPE)?;
    let mut pattern = [0; 8];
    pattern.chunks_mut(size_of::<T>()).for_each(|bytes| bytes.copy_from_slice(bytemuck::bytes_of(&value)));
    let args = FillArgs {
        x: cx.addr(x)?,
        pattern: u64::from_ne_bytes(pattern),
        stride_bytes: row_stride_bytes(x),
        row_bytes: row_bytes(x),
    };
    cx.launch(&FILL, CHECK.blocks_per_row(x)?, args)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::{DType, Device};

    #[test]
    fn a_value_of_another_type_is_refused() -> Result<()> {
        let device = Device::host();
        let x = device.zeros(&[2], DType::F32)?;
        assert!(refusal(&device, |cx| fill(cx, &x, 1i32)).contains("`x` i32, got f32"));
        Ok(())
    }
}
