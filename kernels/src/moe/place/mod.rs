//! The sum of what every rank's experts made of a rank's rows; CUDA source: `place.cu`.

mod host;

use bcg_runtime::{DevicePtr, KernelArgs, OpStream, Result, Source, Tensor};

use crate::check::Check;
use crate::float::{PerFloat, per_float};
use host::host;

static SOURCE: Source = source!("moe/place/place.cu").takes::<PlaceArgs>();
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("moe_place");
const THREADS: u32 = 128;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct PlaceArgs {
    parts: DevicePtr,
    out: DevicePtr,
    tokens: u32,
    columns: u32,
    rank: u32,
    num_ranks: u32,
}

// SAFETY: `moe_place` has checked the shapes when it launches, and the source indexes by these alone.
static MOE_PLACE: PerFloat<PlaceArgs> = per_float!("moe_place", SOURCE, host).programmatic();

/// Sums the parts that all ranks have of this rank's rows, and puts the sums where these rows stand among those of all.
///
/// With S rows of each of W ranks, row `r S + t` of this rank `r` is `sum_q parts[q S + t]`, in f32 in the order of the ranks
/// q, rounded once; the rows of other ranks are −0, which changes no sum over the ranks.
///
/// # Shapes
/// - `parts`, `out`: `[W S, C]`, bf16, f16 or f32, contiguous.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes and addresses. Read again at each replay: `parts`.
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
/// let parts = device.tensor(&[1, 2], &[1.0f32, 2.0])?;
/// let out = runner.eager(&(), |cx| bcg_kernels::moe_place(cx, &parts))?;
/// assert_eq!(runner.read::<f32>(&out)?, [1.0, 2.0], "one rank alone");
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn moe_place(cx: &mut OpStream, parts: &Tensor) -> Result<Tensor> {
    CHECK.rank("parts", parts, &["W S", "C"])?;
    CHECK.contiguous("parts", parts)?;
    let num_ranks = cx.world_size();
    if !parts.dim(0).is_multiple_of(num_ranks) {
        return Err(CHECK.error(format!("rows of {num_ranks} ranks"), parts.dim(0)));
    }
    let kernel = MOE_PLACE.get(CHECK, "parts", parts.dtype())?;
    let out = cx.empty(parts.shape(), parts.dtype())?;
    let args = PlaceArgs {
        parts: cx.addr(parts)?,
        out: cx.addr(&out)?,
        tokens: CHECK.u32("S", parts.dim(0) / num_ranks)?,
        columns: CHECK.u32("C", parts.dim(1))?,
        rank: cx.rank() as u32,
        num_ranks: num_ranks as u32,
    };
    cx.launch(kernel, CHECK.block_per_row(&out, THREADS)?, args)?;
    Ok(out)
}
