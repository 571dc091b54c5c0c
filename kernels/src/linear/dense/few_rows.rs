//! Matrix product of few rows, bound by reading the weight; CUDA source: `few_rows.cu`.
//!
//! - A row of the output depends on that row of `x` alone, and the order of its sums on K alone: another number of rows,
//!   up to [`ROWS_MAX`], changes no bit.
//! - The kernel starts to read the weight while the kernel before still runs. So it waits for a weight in the arena,
//!   which that kernel may have written, but not for one with memory of its own, which no kernel may write.
//!
//! Called by `linear`, which checks the shapes. Never picked on the host device: there one way of summing serves
//! every number of rows.

use bcg_runtime::{DType, DevicePtr, Dims, Kernel, KernelArgs, OpStream, Result, Source, Tensor};
use half::bf16;

use super::host::host;
use crate::check::Check;

pub(super) static SOURCE: Source = source!("linear/dense/few_rows.cu")
    .takes::<LinearFewRowsArgs>()
    .define("WARPS", WARPS)
    .define("STEP_BYTES", STEP_BYTES);

const CHECK: Check = Check::new("linear");

/// The most rows of `x` that the kernels take.
const ROWS_MAX: usize = 16;
/// Bytes that a thread copies at a time: the alignment of all rows.
const COPY_BYTES: usize = 16;
/// Warps of a block.
const WARPS: usize = 16;
/// Bytes of a row that a warp copies in a step.
const STEP_BYTES: usize = 64;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
pub(super) struct LinearFewRowsArgs {
    #[points_to(const bf16)]
    pub(super) x: DevicePtr,
    #[points_to(const bf16)]
    pub(super) weight: DevicePtr,
    pub(super) out: DevicePtr,
    pub(super) x_stride: i64,
    pub(super) weight_stride: i64,
    pub(super) rows: u32,
    pub(super) outputs: u32,
    /// A multiple of 8.
    pub(super) depth: u32,
    pub(super) out_is_f32: u32,
    /// A kernel before may have written the weight.
    pub(super) weight_is_input: u32,
    pub(super) _padding: u32,
}

/// A kernel and the geometry that its source is made for.
struct Variant {
    /// Rows of the weight that a block takes at a time.
    group: usize,
    /// The most rows of `x`.
    rows_max: usize,
    /// Steps of a warp that are on the way.
    stages: usize,
    kernel: Kernel<LinearFewRowsArgs>,
}

impl Variant {
    const fn new(group: usize, rows_max: usize, stages: usize, name: &'static str) -> Self {
        // SAFETY: the op has checked the shapes when `linear_few_rows` launches, and the source indexes by these alone.
        let kernel = unsafe { Kernel::new(name, &SOURCE, host) }.programmatic();
        Self { group, rows_max, stages, kernel }
    }

    /// Shared memory of a block: the stages of all warps, then the sums of all warps.
    const fn shared_bytes(&self, rows: usize) -> usize {
        let copies = self.stages * WARPS * (self.group + rows) * STEP_BYTES;
        copies + WARPS * rows * (self.group + 8) * size_of::<f32>()
    }

    /// One block for each multiprocessor, or as many as share the groups evenly.
    fn dims(&self, rows: usize, outputs: usize, num_multiprocessors: usize) -> Result<Dims> {
        let groups = outputs.div_ceil(self.group);
        let groups_of_a_block = groups.div_ceil(num_multiprocessors).max(1);
        let grid = CHECK.u32("blocks", groups.div_ceil(groups_of_a_block))?;
        let shared_bytes = CHECK.u32("shared memory", self.shared_bytes(rows))?;
        Ok(Dims { shared_bytes, ..Dims::linear(grid, 32 * WARPS as u32) })
    }
}

/// The smaller `x` is, the more of the weight is on the way.
static VARIANTS: [Variant; 8] = [
    Variant::new(16, 8, 8, "linear_few_rows_16_8"),
    Variant::new(16, 16, 6, "linear_few_rows_16_16"),
    Variant::new(32, 2, 6, "linear_few_rows_32_2"),
    Variant::new(32, 8, 5, "linear_few_rows_32_8"),
    Variant::new(32, 16, 3, "linear_few_rows_32_16"),
    Variant::new(48, 2, 4, "linear_few_rows_48_2"),
    Variant::new(48, 8, 3, "linear_few_rows_48_8"),
    Variant::new(48, 16, 2, "linear_few_rows_48_16"),
];

/// Picks the smallest groups of which each multiprocessor has one at most, or else the largest; `None` for too many rows.
fn variant(rows: usize, outputs: usize, num_multiprocessors: usize) -> Option<&'static Variant> {
    let group = [16, 32].into_iter().find(|group| outputs.div_ceil(*group) <= num_multiprocessors).unwrap_or(48);
    VARIANTS.iter().find(|variant| variant.group == group && variant.rows_max >= rows)
}

/// Tells whether [`linear_few_rows`] serves this product, on the stream's device, to an output of `dtype`.
pub(super) fn applies(cx: &mut OpStream, x: &Tensor, weight: &Tensor, dtype: DType) -> Result<bool> {
    // The variants need 224 KiB of shared memory.
    let is_able = matches!(cx.device().compute_capability(), Some(arch) if arch.major == 9 || arch.major == 10);
    let is_known = x.dtype() == DType::Bf16 && matches!(dtype, DType::Bf16 | DType::F32);
    if !is_able || !is_known || x.dim(0) > ROWS_MAX || !(x.dim(1) * size_of::<bf16>()).is_multiple_of(COPY_BYTES) {
        return Ok(false);
    }
    for tensor in [x, weight] {
        let stride = tensor.row_stride() * size_of::<bf16>();
        if !stride.is_multiple_of(COPY_BYTES) || !cx.addr(tensor)?.as_u64().is_multiple_of(COPY_BYTES as u64) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Writes the product of `x` `[T, K]` with the transposed `weight` `[N, K]` to `out` `[T, N]`, bf16 or f32.
pub(super) fn linear_few_rows(cx: &mut OpStream, x: &Tensor, weight: &Tensor, out: &Tensor) -> Result<()> {
    let (rows, outputs) = (x.dim(0), weight.dim(0));
    let num_multiprocessors = cx.device().num_multiprocessors() as usize;
    let Some(variant) = variant(rows, outputs, num_multiprocessors) else {
        return Err(CHECK.error(format!("at most {ROWS_MAX} rows"), rows));
    };
    let args = LinearFewRowsArgs {
        x: cx.addr(x)?,
        weight: cx.addr(weight)?,
        out: cx.addr(out)?,
        x_stride: x.row_stride() as i64,
        weight_stride: weight.row_stride() as i64,
        rows: CHECK.u32("T", rows)?,
        outputs: CHECK.u32("N", outputs)?,
        depth: CHECK.u32("K", x.dim(1))?,
        out_is_f32: (out.dtype() == DType::F32).into(),
        weight_is_input: (!weight.is_persistent()).into(),
        _padding: 0,
    };
    let dims = variant.dims(rows, outputs, num_multiprocessors)?;
    cx.launch(&variant.kernel, dims, args)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use crate::cubin;
    use bcg_runtime::{Arch, CompileError, Device, Runner, RunnerOptions, compile_uncached};

    /// What a block may take on compute capability 9.0 and 10.0, in bytes.
    const SHARED_BYTES_MAX: usize = 227 << 10;

    #[test]
    fn every_variant_fits_into_shared_memory() {
        for variant in &VARIANTS {
            assert!(variant.shared_bytes(variant.rows_max) <= SHARED_BYTES_MAX, "{}", variant.kernel.name());
        }
        // `cargo xtask kernels` names an NVRTC, so that this part runs there whatever else is installed.
        for arch in [Arch::new(9, 0), Arch::new(10, 0)] {
            let cubin = match compile_uncached(&SOURCE, arch) {
                Err(CompileError::NoCompiler { .. }) if std::env::var_os("BCG_NVRTC").is_none() => return,
                compiled => compiled.expect("a cubin"),
            };
            for variant in &VARIANTS {
                let name = variant.kernel.name();
                let needed = cubin::constant_u32(&cubin, &format!("{name}_bytes")).expect("a constant");
                assert_eq!(needed as usize, variant.shared_bytes(variant.rows_max), "{name} for {arch}");
                let fixed = cubin::static_shared_bytes(&cubin, name);
                assert!(needed as usize + fixed <= SHARED_BYTES_MAX, "{name} for {arch}: {needed} + {fixed}");
            }
        }
    }

    #[test]
    fn blocks_share_the_groups_evenly() -> Result<()> {
        let grid = |rows, outputs| {
            let variant = variant(rows, outputs, 132).expect("a variant");
            Ok::<_, bcg_runtime::Error>((variant.kernel.name(), variant.dims(rows, outputs, 132)?.grid[0]))
        };
        assert_eq!(grid(1, 4096)?, ("linear_few_rows_32_2", 128));
        assert_eq!(grid(9, 1000)?, ("linear_few_rows_16_16", 63));
        assert_eq!(grid(8, 151_936)?, ("linear_few_rows_48_8", 132));
        assert_eq!(grid(2, 12_720)?, ("linear_few_rows_48_2", 89));
        assert!(variant(17, 4096, 132).is_none());
        Ok(())
    }

    #[test]
    fn the_host_reference_multiplies() -> Result<()> {
        let device = Device::host();
        let mut runner = Runner::new(&device, RunnerOptions::default())?;
        let numbers = |len: usize| (0..len).map(|i| bf16::from_f32((i % 13) as f32 - 6.0)).collect::<Vec<_>>();
        let x = device.tensor(&[3, 40], &numbers(120))?.columns(8..24)?;
        let weight = device.tensor(&[5, 16], &numbers(80))?;
        for dtype in [DType::Bf16, DType::F32] {
            let (out, expected) = runner.eager(&(), |cx| {
                let out = cx.empty(&[3, 5], dtype)?;
                linear_few_rows(cx, &x, &weight, &out)?;
                Ok((out, crate::linear_to(cx, &x, &weight, dtype)?))
            })?;
            if dtype == DType::F32 {
                assert_eq!(runner.read::<f32>(&out)?, runner.read::<f32>(&expected)?);
            } else {
                assert_eq!(runner.read::<bf16>(&out)?, runner.read::<bf16>(&expected)?);
            }
        }
        Ok(())
    }

    #[test]
    fn more_rows_are_refused() -> Result<()> {
        let device = Device::host();
        let (x, weight) = (device.zeros(&[17, 8], DType::Bf16)?, device.zeros(&[4, 8], DType::Bf16)?);
        let out = device.zeros(&[17, 4], DType::Bf16)?;
        assert!(refusal(&device, |cx| linear_few_rows(cx, &x, &weight, &out)).contains("at most 16 rows"));
        Ok(())
    }
}
