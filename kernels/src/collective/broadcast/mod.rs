//! What one rank has, on all; CUDA source: `broadcast.cu`.

use bcg_runtime::{COLLECTIVE_BLOCKS_MAX, OpStream, Result, Source, Tensor};

use super::far;
use super::gather::{GatherArgs, Gathering, all_ranks, give, take};
use crate::check::Check;
use crate::float::PerFloat;

static SOURCE: Source =
    source!("collective/broadcast/broadcast.cu").takes::<GatherArgs>().define("BLOCKS_MAX", COLLECTIVE_BLOCKS_MAX);
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("broadcast");

// SAFETY: `broadcast` has checked the shapes when it launches, and the source indexes by these alone, within what
// `Gathering` and the plane's size allow.
static BROADCAST: PerFloat<GatherArgs> = per_float_collective!("broadcast", SOURCE, give, take).programmatic();

/// Gives every rank the tensor of one.
///
/// `out = x` of rank `root`, also there; what the others hold in `x` is not read. Outside of a world it returns `x` and
/// enqueues nothing.
///
/// # Shapes
/// - `x`, `out`: `[T, C]`, bf16, f16 or f32; `x` may be row-sliced.
///
/// # Capture
/// Enqueues one kernel, or several for a message larger than the plane holds. Frozen: shapes, addresses, `root`. Read again at
/// each replay: `x`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs, or there is no rank `root`; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let x = device.tensor(&[1, 2], &[1.0f32, 2.0])?;
/// let same = runner.eager(&(), |cx| bcg_kernels::broadcast(cx, &x, 0))?;
/// assert_eq!(runner.read::<f32>(&same)?, [1.0, 2.0], "one rank alone");
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn broadcast(cx: &mut OpStream, x: &Tensor, root: usize) -> Result<Tensor> {
    CHECK.rank("x", x, &["T", "C"])?;
    let kernel = BROADCAST.get(CHECK, "x", x.dtype())?;
    let num_ranks = cx.world_size();
    if root >= num_ranks {
        return Err(CHECK.error(format!("a root below the number of ranks, {num_ranks}"), root));
    }
    if num_ranks == 1 {
        return Ok(x.clone());
    }
    if cx.sums_gathered() {
        return far::rows_of(cx, CHECK, x, root);
    }
    let out = cx.empty(x.shape(), x.dtype())?;
    let to_ranks = if cx.rank() == root { all_ranks(cx) } else { 0 };
    Gathering { check: CHECK, x, x_step: 0, out: &out, out_step: 0, to_ranks, from_ranks: 1 << root }
        .launch(cx, kernel)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::{DType, Device};

    #[test]
    fn a_root_that_is_no_rank_is_refused() -> Result<()> {
        let device = Device::host();
        let x = device.zeros(&[2, 8], DType::Bf16)?;
        let message = refusal(&device, |cx| broadcast(cx, &x, 1));
        assert!(message.contains("a root below the number of ranks, 1, got 1"), "{message}");
        Ok(())
    }
}
