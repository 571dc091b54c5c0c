//! What all ranks have, side by side or one below the other; CUDA source: `all_gather.cu`.

use bcg_runtime::{COLLECTIVE_BLOCKS_MAX, OpStream, Result, Source, Tensor};

use super::far;
use super::gather::{GatherArgs, Gathering, all_ranks, give, take};
use crate::check::Check;
use crate::float::PerFloat;

static SOURCE: Source =
    source!("collective/all_gather/all_gather.cu").takes::<GatherArgs>().define("BLOCKS_MAX", COLLECTIVE_BLOCKS_MAX);
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const COLUMNS_CHECK: Check = Check::new("all_gather_columns");
const ROWS_CHECK: Check = Check::new("all_gather_rows");

// SAFETY: the ops have checked the shapes when they launch, and the source indexes by these alone, within what `Gathering`
// and the plane's size allow.
static ALL_GATHER: PerFloat<GatherArgs> = per_float_collective!("all_gather", SOURCE, give, take).programmatic();

/// Puts the columns of all ranks side by side, in their order.
///
/// `out[t, r N / W + c] = xᵣ[t, c]`, where `xᵣ` is what rank `r` of `W` gives. Outside of a world it returns `x` and enqueues
/// nothing.
///
/// # Shapes
/// - `x`: `[T, N / W]`, bf16, f16 or f32, may be row-sliced.   - `out`: `[T, N]`.
///
/// # Capture
/// Enqueues one kernel, or several for a message larger than the plane holds. Frozen: shapes and addresses. Read again at each
/// replay: `x`.
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
/// let all = runner.eager(&(), |cx| bcg_kernels::all_gather_columns(cx, &x))?;
/// assert_eq!(runner.read::<f32>(&all)?, [1.0, 2.0], "one rank alone");
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn all_gather_columns(cx: &mut OpStream, x: &Tensor) -> Result<Tensor> {
    COLUMNS_CHECK.rank("x", x, &["T", "N"])?;
    let columns = x.dim(1);
    if cx.sums_gathered() {
        ALL_GATHER.get(COLUMNS_CHECK, "x", x.dtype())?;
        return far::all_gather_columns(cx, COLUMNS_CHECK, x);
    }
    all_gather(cx, COLUMNS_CHECK, x, &[x.dim(0), columns * cx.world_size()], columns)
}

/// Puts the rows of all ranks one below the other, in their order.
///
/// `out[r T / W + t, c] = xᵣ[t, c]`, where `xᵣ` is what rank `r` of `W` gives. Outside of a world it returns `x` and enqueues
/// nothing.
///
/// # Shapes
/// - `x`: `[T / W, N]`, bf16, f16 or f32, may be row-sliced.   - `out`: `[T, N]`.
///
/// # Capture
/// As [`all_gather_columns`].
///
/// # Errors
/// As [`all_gather_columns`].
///
/// # Example
/// ```
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let x = device.tensor(&[1, 2], &[1.0f32, 2.0])?;
/// let all = runner.eager(&(), |cx| bcg_kernels::all_gather_rows(cx, &x))?;
/// assert_eq!(runner.read::<f32>(&all)?, [1.0, 2.0], "one rank alone");
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn all_gather_rows(cx: &mut OpStream, x: &Tensor) -> Result<Tensor> {
    ROWS_CHECK.rank("x", x, &["T", "N"])?;
    ALL_GATHER.get(ROWS_CHECK, "x", x.dtype())?;
    if cx.sums_gathered() { far::gather(cx, ROWS_CHECK, x) } else { gather_rows(cx, ROWS_CHECK, x) }
}

/// As [`all_gather_rows`], by a kernel.
pub(super) fn gather_rows(cx: &mut OpStream, check: Check, x: &Tensor) -> Result<Tensor> {
    let (rows, columns) = (x.dim(0), x.dim(1));
    all_gather(cx, check, x, &[rows * cx.world_size(), columns], rows * columns)
}

fn all_gather(cx: &mut OpStream, check: Check, x: &Tensor, shape: &[usize], out_step: usize) -> Result<Tensor> {
    let kernel = ALL_GATHER.get(check, "x", x.dtype())?;
    if cx.world_size() == 1 {
        return Ok(x.clone());
    }
    let out = cx.empty(shape, x.dtype())?;
    let ranks = all_ranks(cx);
    Gathering { check, x, x_step: 0, out: &out, out_step, to_ranks: ranks, from_ranks: ranks }.launch(cx, kernel)?;
    Ok(out)
}
