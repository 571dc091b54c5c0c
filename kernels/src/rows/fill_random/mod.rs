//! Seeded random numbers; CUDA source: `fill_random.cu`.

mod host;

use bcg_runtime::{DevicePtr, Dims, KernelArgs, OpStream, Result, Source, Tensor};

use crate::check::Check;
use crate::float::{PerFloat, per_float};
use crate::random::{GOLDEN, mix};
use host::host;

static SOURCE: Source =
    source!("rows/fill_random/fill_random.cu").takes::<FillRandomArgs>().define("GOLDEN", GOLDEN as usize);
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("fill_random");

/// Four 16-bit numbers have this sum on average; the standard deviation of the sum is 65536 / sqrt(3).
const MEAN_OF_SUM: i32 = 131_070;
const STD_OF_SUM: f64 = 37_837.227_1;
const THREADS: u32 = 256;
/// Blocks that fill any device; their threads take several elements each.
const BLOCKS_MAX: usize = 8192;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct FillRandomArgs {
    x: DevicePtr,
    elements: i64,
    key: u64,
    mean: f32,
    scale: f32,
}

// SAFETY: `fill_random` has checked the shapes when it launches, and the source indexes by these alone.
static FILL_RANDOM: PerFloat<FillRandomArgs> = per_float!("fill_random", SOURCE, host);

/// Sets the elements of `x` to nearly normal random numbers, in place.
///
/// `x[i] = mean + std * n(seed, i)`, where `n` is the sum of four uniform 16-bit numbers, shifted and scaled to mean 0 and
/// standard deviation 1; no value lies further out than 3.5 of them. Same seed, same numbers, on every device.
///
/// # Shapes
/// - `x`: any rank, bf16, f16 or f32; contiguous.
///
/// # Capture
/// Enqueues one kernel. Frozen: shape, address, seed, mean and std.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if `x` is row-sliced or its dtype is no float; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_runtime::{DType, Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let x = device.empty(&[1000], DType::F32)?;
/// runner.eager(&(), |cx| bcg_kernels::fill_random(cx, &x, 7, 1.0, 0.1))?;
/// runner.synchronize()?;
/// assert!(device.read::<f32>(&x)?.iter().all(|value| (value - 1.0).abs() < 0.35));
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn fill_random(cx: &mut OpStream, x: &Tensor, seed: u64, mean: f32, std: f32) -> Result<()> {
    CHECK.contiguous("x", x)?;
    let kernel = FILL_RANDOM.get(CHECK, "x", x.dtype())?;
    let blocks = x.num_elements().div_ceil(THREADS as usize).min(BLOCKS_MAX);
    let args = FillRandomArgs {
        x: cx.addr(x)?,
        elements: x.num_elements() as i64,
        // Mixed, so that the numbers of the next seed are others and not the same ones shifted.
        key: mix(seed.wrapping_add(GOLDEN)),
        mean,
        scale: (f64::from(std) / STD_OF_SUM) as f32,
    };
    cx.launch(kernel, Dims::linear(blocks as u32, THREADS), args)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::{DType, Device};

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let (ids, wide) = (device.zeros(&[2], DType::I32)?, device.zeros(&[2, 4], DType::F32)?);
        let sliced = wide.columns(0..2)?;
        assert!(refusal(&device, |cx| fill_random(cx, &ids, 0, 0.0, 1.0)).contains("bf16, f16 or f32, got i32"));
        assert!(refusal(&device, |cx| fill_random(cx, &sliced, 0, 0.0, 1.0)).contains("`x` contiguous"));
        Ok(())
    }
}
