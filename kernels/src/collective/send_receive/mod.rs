//! What another rank has, around a ring; CUDA source: `send_receive.cu`.

use bcg_runtime::{COLLECTIVE_BLOCKS_MAX, OpStream, Result, Source, Tensor};

use super::far;
use super::gather::{GatherArgs, Gathering, give, take};
use crate::check::Check;
use crate::float::PerFloat;

static SOURCE: Source = source!("collective/send_receive/send_receive.cu")
    .takes::<GatherArgs>()
    .define("BLOCKS_MAX", COLLECTIVE_BLOCKS_MAX);
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("send_receive");

// SAFETY: `send_receive` has checked the shapes when it launches, and the source indexes by these alone, within what
// `Gathering` and the plane's size allow.
static SEND_RECEIVE: PerFloat<GatherArgs> = per_float_collective!("send_receive", SOURCE, give, take).programmatic();

/// Sends a tensor to the rank that is `to_offset` further, and returns what comes from the one that is as far behind.
///
/// Rank `r` of `W` sends to `(r + to_offset) mod W` and gets the `x` of `(r − to_offset) mod W`. If that is itself, as it is
/// outside of a world, it returns `x` and enqueues nothing.
///
/// # Shapes
/// - `x`, `out`: `[T, C]`, bf16, f16 or f32, of one shape on all ranks; `x` may be row-sliced.
///
/// # Capture
/// Enqueues one kernel, or several for a message larger than the plane holds. Frozen: shapes, addresses, `to_offset`. Read
/// again at each replay: `x`.
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
/// let own = runner.eager(&(), |cx| bcg_kernels::send_receive(cx, &x, 1))?;
/// assert_eq!(runner.read::<f32>(&own)?, [1.0, 2.0], "one rank alone");
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn send_receive(cx: &mut OpStream, x: &Tensor, to_offset: usize) -> Result<Tensor> {
    CHECK.rank("x", x, &["T", "C"])?;
    let kernel = SEND_RECEIVE.get(CHECK, "x", x.dtype())?;
    let num_ranks = cx.world_size();
    let offset = to_offset % num_ranks;
    if offset == 0 {
        return Ok(x.clone());
    }
    let (to, from) = ((cx.rank() + offset) % num_ranks, (cx.rank() + num_ranks - offset) % num_ranks);
    if cx.sums_gathered() {
        return far::rows_of(cx, CHECK, x, from);
    }
    let out = cx.empty(x.shape(), x.dtype())?;
    Gathering { check: CHECK, x, x_step: 0, out: &out, out_step: 0, to_ranks: 1 << to, from_ranks: 1 << from }
        .launch(cx, kernel)?;
    Ok(out)
}
