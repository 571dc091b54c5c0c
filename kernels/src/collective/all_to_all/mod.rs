//! A part of what each rank has, for each rank; CUDA source: `all_to_all.cu`.

use bcg_runtime::{COLLECTIVE_BLOCKS_MAX, OpStream, Result, Source, Tensor};

use super::far;
use super::gather::{GatherArgs, Gathering, all_ranks, give, take};
use crate::check::Check;
use crate::float::PerFloat;

static SOURCE: Source =
    source!("collective/all_to_all/all_to_all.cu").takes::<GatherArgs>().define("BLOCKS_MAX", COLLECTIVE_BLOCKS_MAX);
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("all_to_all");

// SAFETY: `all_to_all` has checked the shapes when it launches, and the source indexes by these alone, within what
// `Gathering` and the plane's size allow.
static ALL_TO_ALL: PerFloat<GatherArgs> = per_float_collective!("all_to_all", SOURCE, give, take).programmatic();

/// Sends each rank its part of the rows, equally many, and returns what comes, in the order of the ranks.
///
/// With N rows for each of W ranks, `out[q N + t] = x_q[r N + t]` on rank `r`, where `x_q` is what rank `q` gives. Outside of a
/// world it returns `x` and enqueues nothing.
///
/// # Shapes
/// - `x`, `out`: `[W N, C]`, bf16, f16 or f32; `x` may be row-sliced.
///
/// # Capture
/// Enqueues one kernel, or several for a message larger than the plane holds. Frozen: shapes and addresses. Read again at each
/// replay: `x`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs, or if W does not divide the rows; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let x = device.tensor(&[1, 2], &[1.0f32, 2.0])?;
/// let all = runner.eager(&(), |cx| bcg_kernels::all_to_all(cx, &x))?;
/// assert_eq!(runner.read::<f32>(&all)?, [1.0, 2.0], "one rank alone");
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn all_to_all(cx: &mut OpStream, x: &Tensor) -> Result<Tensor> {
    CHECK.rank("x", x, &["W N", "C"])?;
    let kernel = ALL_TO_ALL.get(CHECK, "x", x.dtype())?;
    let num_ranks = cx.world_size();
    if num_ranks == 1 {
        return Ok(x.clone());
    }
    if !x.dim(0).is_multiple_of(num_ranks) {
        return Err(CHECK.error(format!("rows for {num_ranks} ranks"), x.dim(0)));
    }
    let rows = x.dim(0) / num_ranks;
    if cx.sums_gathered() {
        return far::all_to_all(cx, CHECK, x);
    }
    let out = cx.empty(x.shape(), x.dtype())?;
    let (first, ranks) = (x.rows(0..rows)?, all_ranks(cx));
    let (x_step, out_step) = (rows * x.row_stride(), rows * x.dim(1));
    Gathering { check: CHECK, x: &first, x_step, out: &out, out_step, to_ranks: ranks, from_ranks: ranks }
        .launch(cx, kernel)?;
    Ok(out)
}
