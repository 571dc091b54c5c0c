//! The sum of a tensor over all ranks, of which each rank gets some rows; CUDA source: `reduce_scatter_rows.cu`.

use bcg_runtime::{COLLECTIVE_BLOCKS_MAX, OpStream, Result, Source, Tensor};

use super::far;
use super::message::{grid, slot_packs};
use super::reduce::{ReduceArgs, Reduction, give, take};
use crate::check::Check;
use crate::float::PerFloat;

static SOURCE: Source = source!("collective/reduce_scatter_rows/reduce_scatter_rows.cu")
    .takes::<ReduceArgs>()
    .define("BLOCKS_MAX", COLLECTIVE_BLOCKS_MAX);
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("reduce_scatter_rows");

// SAFETY: `reduce_scatter_rows` has checked the shapes when it launches, and the source indexes by these alone, within what
// `Reduction` and the plane's size allow.
static REDUCE_SCATTER_ROWS: PerFloat<ReduceArgs> =
    per_float_collective!("reduce_scatter_rows", SOURCE, give, take).programmatic();

/// Sums a tensor over all ranks, in their order, and gives each rank its share of the rows: rank `r` of `W` those from
/// `r T / W` on.
///
/// The same bits as these rows of [`all_reduce`](crate::all_reduce()). Outside of a world it returns `x` and enqueues nothing.
///
/// # Shapes
/// - `x`: `[T, N]`, bf16, f16 or f32, may be row-sliced; T a multiple of the number of ranks W.   - `out`: `[T / W, N]`.
///
/// # Capture
/// Enqueues one kernel, or several for a message larger than the plane holds. Frozen: shapes and addresses. Read again at each
/// replay: `x`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs, or T is no multiple of W; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let x = device.tensor(&[2, 1], &[1.0f32, 2.0])?;
/// let rows = runner.eager(&(), |cx| bcg_kernels::reduce_scatter_rows(cx, &x))?;
/// assert_eq!(runner.read::<f32>(&rows)?, [1.0, 2.0], "one rank alone");
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn reduce_scatter_rows(cx: &mut OpStream, x: &Tensor) -> Result<Tensor> {
    CHECK.rank("x", x, &["T", "N"])?;
    let kernel = REDUCE_SCATTER_ROWS.get(CHECK, "x", x.dtype())?;
    let num_ranks = cx.world_size();
    if num_ranks == 1 {
        return Ok(x.clone());
    }
    if !x.dim(0).is_multiple_of(num_ranks) {
        return Err(CHECK.error(format!("T a multiple of the {num_ranks} ranks"), format!("T = {}", x.dim(0))));
    }
    if cx.sums_gathered() {
        return far::reduce_scatter_rows(cx, CHECK, x);
    }
    let rows = x.dim(0) / num_ranks;
    let out = cx.empty(&[rows, x.dim(1)], x.dtype())?;
    let sums = Reduction { check: CHECK, x, out: &out, x_step: rows * x.row_stride() };
    let packs_max = slot_packs(cx);
    let blocks_max = cx.collective_blocks_max();
    sums.launch(cx, kernel, packs_max, |part| grid(part.packs, blocks_max))?;
    Ok(out)
}
