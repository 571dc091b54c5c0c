//! One matrix product per head, as latent attention absorbs its key and value projections; CUDA source: `head.cu`.
//!
//! A row of the output depends on that row of `x` alone, and the order of its sums on K alone: the number of tokens changes
//! no bit.

mod host;

use bcg_runtime::{DType, Device, DevicePtr, Dims, Kernel, KernelArgs, OpStream, Result, Source, Tensor};
use half::bf16;

use crate::arch::is_large;
use crate::check::Check;
use crate::float::{PerFloat, per_float};
use host::host;

static SOURCE: Source = source!("linear/head/head.cu")
    .takes::<HeadLinearArgs>()
    .define("TILE_TOKENS", TILE_TOKENS)
    .define("TILE_OUTPUTS", TILE_OUTPUTS)
    .define("WARPS", WARPS);
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("head_linear");

/// Tokens, outputs and warps of a block of the tiled kernels.
const TILE_TOKENS: usize = 32;
const TILE_OUTPUTS: usize = 32;
const WARPS: usize = 4;
/// What a block of the tiled kernels may have of shared memory.
const SHARED_BYTES_MAX: usize = 160 << 10;
/// Threads of a block of the kernels for any dtype, one for each output.
const THREADS: usize = 128;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct HeadLinearArgs {
    /// `[T H, K]`.
    x: DevicePtr,
    /// `[H, N, K]`, or `[H, K, N]` if transposed.
    weight: DevicePtr,
    /// `[T H, N]`.
    out: DevicePtr,
    x_stride: i64,
    /// Elements from one head to the next.
    weight_stride: i64,
    tokens: u32,
    heads: u32,
    outputs: u32,
    depth: u32,
    is_transposed: u32,
    _padding: u32,
}

// SAFETY: `multiply` has checked the shapes when it launches, and the source indexes by these alone.
static HEAD_LINEAR: PerFloat<HeadLinearArgs> = per_float!("head_linear", SOURCE, host).programmatic();

/// On tensor cores: weights as `[N, K]`, and as `[K, N]`.
// SAFETY: as above.
static TILED: [Kernel<HeadLinearArgs>; 2] = [
    unsafe { Kernel::new("head_linear_tiled", &SOURCE, host::<bf16>) }.programmatic(),
    unsafe { Kernel::new("head_linear_tiled_transposed", &SOURCE, host::<bf16>) }.programmatic(),
];

/// Multiplies the row of each token and head with the rows of the head's weight.
///
/// `out[t H + h, n] = sum_k x[t H + h, k] * weight[h, n, k]`, summed in f32 and rounded once.
///
/// # Shapes
/// - `x`: `[T H, K]`, bf16, f16 or f32; may be row-sliced.   - `weight`: `[H, N, K]`, same dtype; heads may lie apart.
/// - `out`: `[T H, N]`.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes, addresses. Read again at each replay: the contents of both tensors.
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
/// let x = device.tensor(&[2, 2], &[1.0f32, 2.0, 3.0, 4.0])?; // one token, two heads
/// let weight = device.tensor(&[2, 1, 2], &[1.0f32, 1.0, 10.0, 1.0])?;
/// let out = runner.eager(&(), |cx| bcg_kernels::head_linear(cx, &x, &weight))?;
/// assert_eq!(runner.read::<f32>(&out)?, [3.0, 34.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn head_linear(cx: &mut OpStream, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    multiply(cx, x, weight, false)
}

/// Multiplies as [`head_linear()`] does, with the columns of each head's weight, `[H, K, N]`.
///
/// # Shapes
/// As [`head_linear()`], but for the weight.
///
/// # Capture
/// As [`head_linear()`].
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
/// let x = device.tensor(&[1, 2], &[1.0f32, 2.0])?;
/// let weight = device.tensor(&[1, 2, 3], &[1.0f32, 2.0, 3.0, 10.0, 20.0, 30.0])?;
/// let out = runner.eager(&(), |cx| bcg_kernels::head_linear_transposed(cx, &x, &weight))?;
/// assert_eq!(runner.read::<f32>(&out)?, [21.0, 42.0, 63.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn head_linear_transposed(cx: &mut OpStream, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    multiply(cx, x, weight, true)
}

fn multiply(cx: &mut OpStream, x: &Tensor, weight: &Tensor, is_transposed: bool) -> Result<Tensor> {
    CHECK.rank("x", x, &["T H", "K"])?;
    CHECK.rank("weight", weight, if is_transposed { &["H", "K", "N"] } else { &["H", "N", "K"] })?;
    let (rows, depth, heads) = (x.dim(0), x.dim(1), weight.dim(0));
    let outputs = weight.dim(if is_transposed { 2 } else { 1 });
    let shape = if is_transposed { [heads, depth, outputs] } else { [heads, outputs, depth] };
    CHECK.shape("weight", weight, &shape)?;
    CHECK.dtype("weight", weight, x.dtype())?;
    if heads == 0 || !rows.is_multiple_of(heads) {
        return Err(CHECK.error(format!("`x` [T * {heads}, K]"), format!("{:?}", x.shape())));
    }
    let out = cx.empty(&[rows, outputs], x.dtype())?;
    let args = HeadLinearArgs {
        x: cx.addr(x)?,
        weight: cx.addr(weight)?,
        out: cx.addr(&out)?,
        x_stride: x.row_stride() as i64,
        weight_stride: weight.row_stride() as i64,
        tokens: CHECK.u32("T", rows / heads)?,
        heads: CHECK.u32("H", heads)?,
        outputs: CHECK.u32("N", outputs)?,
        depth: CHECK.u32("K", depth)?,
        is_transposed: is_transposed.into(),
        _padding: 0,
    };
    let (kernel, dims) = choose(cx.device(), x.dtype(), &args)?;
    cx.launch(kernel, dims, args)?;
    Ok(out)
}

impl HeadLinearArgs {
    /// Tells whether the tiled kernels can copy everything in 16-byte words.
    fn is_in_words(&self) -> bool {
        let is_whole = [self.x_stride, self.weight_stride].iter().all(|stride| stride % 8 == 0);
        is_whole && [self.x, self.weight, self.out].iter().all(|tensor| tensor.as_u64().is_multiple_of(16))
    }
}

/// Shared memory of a block of the tiled kernels: its rows of `x` and of the weight, which the warps' sums replace.
fn shared_bytes(depth: usize, is_transposed: bool) -> usize {
    let row = |elements: usize| (elements + 8) * size_of::<bf16>();
    let weight = if is_transposed { depth * row(TILE_OUTPUTS) } else { TILE_OUTPUTS * row(depth) };
    let sums = WARPS * TILE_TOKENS * (TILE_OUTPUTS + 2) * size_of::<f32>();
    (TILE_TOKENS * row(depth) + weight).max(sums)
}

/// Chooses the kernel for a dtype, a shape and a device, with its geometry.
fn choose(device: &Device, dtype: DType, a: &HeadLinearArgs) -> Result<(&'static Kernel<HeadLinearArgs>, Dims)> {
    let (tokens, outputs, depth) = (a.tokens as usize, a.outputs as usize, a.depth as usize);
    let shared_bytes = shared_bytes(depth, a.is_transposed != 0);
    let is_large = device.compute_capability().is_none_or(is_large);
    let is_whole = outputs.is_multiple_of(TILE_OUTPUTS) && depth.is_multiple_of(32);
    if dtype == DType::Bf16 && is_large && is_whole && a.is_in_words() && shared_bytes <= SHARED_BYTES_MAX {
        let pieces = CHECK.u32("pieces of T", tokens.div_ceil(TILE_TOKENS))?;
        let grid = [pieces, CHECK.u32("pieces of N", outputs / TILE_OUTPUTS)?, a.heads];
        let dims = Dims { grid, block: [32 * WARPS as u32, 1, 1], shared_bytes: shared_bytes as u32 };
        return Ok((&TILED[a.is_transposed as usize], dims));
    }
    let grid = [a.tokens, CHECK.u32("pieces of N", outputs.div_ceil(THREADS))?, a.heads];
    let dims = Dims { grid, block: [THREADS as u32, 1, 1], shared_bytes: 0 };
    Ok((HEAD_LINEAR.get(CHECK, "x", dtype)?, dims))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let (x, odd) = (device.zeros(&[4, 8], DType::F32)?, device.zeros(&[3, 8], DType::F32)?);
        let weight = device.zeros(&[2, 5, 8], DType::F32)?;
        let other = device.zeros(&[2, 5, 8], DType::Bf16)?;
        assert!(refusal(&device, |cx| head_linear(cx, &odd, &weight)).contains("`x` [T * 2, K], got [3, 8]"));
        assert!(refusal(&device, |cx| head_linear(cx, &x, &other)).contains("`weight` f32, got bf16"));
        let says = refusal(&device, |cx| head_linear_transposed(cx, &x, &weight));
        assert!(says.contains("`weight` [2, 8, 8], got [2, 5, 8]"), "{says}");
        Ok(())
    }

    #[test]
    fn the_published_shapes_fit_into_shared_memory() {
        for (depth, is_transposed) in [(512, false), (128, true)] {
            assert!(shared_bytes(depth, is_transposed) <= SHARED_BYTES_MAX);
        }
    }
}
