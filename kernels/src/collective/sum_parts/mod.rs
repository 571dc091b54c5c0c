//! The sum of what was gathered from all ranks; CUDA source: `sum_parts.cu`.

mod host;

use std::ops::Range;

use bcg_runtime::{DevicePtr, Dims, KernelArgs, OpStream, Result, Source, Tensor};

use crate::check::Check;
use crate::float::{PerFloat, pack_len, per_float};
use host::host;

static SOURCE: Source = source!("collective/sum_parts/sum_parts.cu").takes::<SumPartsArgs>();
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("sum_parts");

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct SumPartsArgs {
    parts: DevicePtr,
    out: DevicePtr,
    /// Elements between one part and the next.
    part_step: i64,
    /// Elements of the sum.
    elements: u32,
    num_parts: u32,
}

// SAFETY: `sum_parts` has checked the shapes when it launches, and the source indexes by these alone. It waits for all of the
// work before it, which may be that of a library.
static SUM_PARTS: PerFloat<SumPartsArgs> = per_float!("sum_parts", SOURCE, host);

const THREADS: usize = 256;
/// More blocks go around again.
const BLOCKS_MAX: usize = 1 << 12;

/// Sums rows of several parts, in f32 and in the order of the parts, rounded once.
///
/// `out[t, c] = sum_p parts[p * T + rows.start + t, c]`: the same bits as [`all_reduce`](crate::all_reduce()) of the parts.
///
/// # Shapes
/// - `parts`: `[P T, C]`, bf16, f16 or f32, without gaps.   - `out`: `[rows, C]`, the rows being some of T.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes, addresses, `rows`. Read again at each replay: `parts`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if the rows of `parts` cannot be divided so, or have gaps; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let parts = device.tensor(&[4, 1], &[1.0f32, 2.0, 10.0, 20.0])?;
/// let sum = runner.eager(&(), |cx| bcg_kernels::sum_parts(cx, &parts, 2, 0..2))?;
/// assert_eq!(runner.read::<f32>(&sum)?, [11.0, 22.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn sum_parts(cx: &mut OpStream, parts: &Tensor, num_parts: usize, rows: Range<usize>) -> Result<Tensor> {
    CHECK.rank("parts", parts, &["P T", "C"])?;
    let kernel = SUM_PARTS.get(CHECK, "parts", parts.dtype())?;
    if num_parts == 0 || !parts.dim(0).is_multiple_of(num_parts) || !parts.is_contiguous() {
        let expected = format!("P T a multiple of {num_parts} parts, without gaps");
        return Err(CHECK.error(expected, format!("{:?}", parts.shape())));
    }
    let (of_part, columns) = (parts.dim(0) / num_parts, parts.dim(1));
    if rows.start > rows.end || rows.end > of_part {
        return Err(CHECK.error(format!("rows of the {of_part} of a part"), format!("{rows:?}")));
    }
    let out = cx.empty(&[rows.len(), columns], parts.dtype())?;
    let elements = CHECK.u32("elements of the sum", out.num_elements())?;
    if elements == 0 {
        return Ok(out);
    }
    let blocks = (elements as usize).div_ceil(pack_len(parts.dtype()) * THREADS).min(BLOCKS_MAX);
    let args = SumPartsArgs {
        parts: cx.addr(&parts.rows(rows.start..of_part)?)?,
        out: cx.addr(&out)?,
        part_step: (of_part * columns) as i64,
        elements,
        num_parts: CHECK.u32("parts", num_parts)?,
    };
    cx.launch(kernel, Dims::linear(blocks as u32, THREADS as u32), args)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::{DType, Device};

    #[test]
    fn parts_that_do_not_divide_the_rows_are_refused() -> Result<()> {
        let device = Device::host();
        let parts = device.zeros(&[6, 8], DType::Bf16)?;
        assert!(refusal(&device, |cx| sum_parts(cx, &parts, 4, 0..1)).contains("a multiple of 4 parts"));
        assert!(refusal(&device, |cx| sum_parts(cx, &parts, 0, 0..1)).contains("a multiple of 0 parts"));
        assert!(refusal(&device, |cx| sum_parts(cx, &parts, 2, 1..4)).contains("rows of the 3 of a part, got 1..4"));
        let sliced = parts.columns(0..4)?;
        assert!(refusal(&device, |cx| sum_parts(cx, &sliced, 2, 0..3)).contains("without gaps"));
        Ok(())
    }
}
