//! What experts made of rows on their way back to the ranks that the rows came of; CUDA source: `moe_return.cu`.

mod host;

use bcg_runtime::{
    COLLECTIVE_BLOCKS_MAX, CommunicatorArgs, DevicePtr, Dims, KernelArgs, OpStream, Result, Source, Tensor,
};

use super::message::slot_packs;
use crate::check::Check;
use crate::float::{PerFloat, pack_len};
use crate::moe::{Choices, Routing, experts_of_rank, moe_combine};
use host::{give, take};

static SOURCE: Source =
    source!("collective/moe_return/moe_return.cu").takes::<ReturnArgs>().define("BLOCKS_MAX", COLLECTIVE_BLOCKS_MAX);
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("moe_return");

/// Threads of a block.
const THREADS: u32 = 256;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct ReturnArgs {
    communicator: CommunicatorArgs,
    /// Of the rows of all ranks: what experts of this rank made of them, and where it stands.
    y: DevicePtr,
    #[points_to(const i32)]
    places: DevicePtr,
    #[points_to(const f32)]
    received_weights: DevicePtr,
    /// The choices of this rank's own rows, among all experts.
    #[points_to(const i32)]
    experts: DevicePtr,
    #[points_to(const i32)]
    num_valid: DevicePtr,
    /// Null without a shared expert.
    shared: DevicePtr,
    out: DevicePtr,
    shared_stride: i64,
    tokens_of_rank: u32,
    /// The tokens of each rank that this launch returns.
    first_token: u32,
    tokens: u32,
    columns: u32,
    /// The packs of a row.
    row_packs: u32,
    chosen: u32,
    experts_of_rank: u32,
    _padding: u32,
}

// SAFETY: `moe_return` has checked the shapes when it launches, and the source indexes by these alone, within rows of which a
// slot of the plane holds as many as a launch returns; of `places` it follows those of `y` only.
static MOE_RETURN: PerFloat<ReturnArgs> = per_float_collective!("moe_return", SOURCE, give, take).programmatic();

/// Sends back what this rank's experts made of rows that [`moe_dispatch`](crate::moe_dispatch()) brought, one weighted sum for
/// each row, and sums over the ranks what comes for this rank's own rows.
///
/// With S rows of each of W ranks, row `r S + t` of the result is that of rank `r`: the sum over the ranks, in their order, of
/// what [`moe_combine`](crate::moe_combine()) would be on each of them, rounded there and again here. In the rows of other
/// ranks stands −0. So [`all_reduce`](crate::all_reduce()) of the result over the ranks has the bits of that of
/// `moe_combine`. A rank sends nothing for a row that chose none of its experts, unless there is a shared expert, of which
/// every rank has a part. Outside of a world it is `moe_combine`.
///
/// # Shapes
/// - `y`: `[W S K, C]`, bf16, f16 or f32, contiguous, in the order of the plan.
/// - `received`: of `[W S, K]` choices, those that came, with the plan of this rank's experts.
/// - `sent`: of `[S, K]` choices, those that were given to `moe_dispatch`.
/// - `shared`: `[W S, C]`, same dtype, may be row-sliced; on all ranks or on none.   - `out`: `[W S, C]`.
///
/// # Capture
/// Enqueues one kernel, or several for more rows than the plane holds. Frozen: shapes and addresses. Read again at each
/// replay: all contents.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs, if W does not divide the experts, or if the plane holds no
/// row; those of enqueuing.
pub fn moe_return(
    cx: &mut OpStream,
    y: &Tensor,
    received: &Routing,
    sent: &Choices,
    shared: Option<&Tensor>,
) -> Result<Tensor> {
    let num_ranks = cx.world_size();
    if num_ranks == 1 {
        return moe_combine(cx, y, received, shared);
    }
    received.check(CHECK, y)?;
    let [rows, chosen] = [received.plan.places.dim(0), received.plan.places.dim(1)];
    let shape = [rows, y.dim(1)];
    if !rows.is_multiple_of(num_ranks) {
        return Err(CHECK.error(format!("rows of {num_ranks} ranks"), rows));
    }
    let tokens = rows / num_ranks;
    sent.check(CHECK, tokens)?;
    CHECK.shape("sent", &sent.experts, &[tokens, chosen])?;
    if let Some(shared) = shared {
        CHECK.shape("shared", shared, &shape)?;
        CHECK.dtype("shared", shared, y.dtype())?;
    }
    let kernel = MOE_RETURN.get(CHECK, "y", y.dtype())?;
    let experts_of_rank = experts_of_rank(CHECK, received.plan.chosen_among, num_ranks)?;
    let out = cx.empty(&shape, y.dtype())?;
    let row_packs = shape[1].div_ceil(pack_len(y.dtype()));
    // One more pack always comes.
    let tokens_max = (slot_packs(cx) as usize).saturating_sub(1) / row_packs.max(1);
    if tokens_max == 0 {
        let got = format!("{} bytes; make the planes of the communicators larger", cx.slot_bytes());
        return Err(CHECK.error(format!("a plane with {} bytes for each rank", 16 * (row_packs + 1)), got));
    }
    CHECK.u32("rows", rows)?;
    let columns = CHECK.u32("C", shape[1])?;
    let [y_at, places, weights] = [cx.addr(y)?, cx.addr(&received.plan.places)?, cx.addr(&received.choices.weights)?];
    let [experts, num_valid, to] = [cx.addr(&sent.experts)?, cx.addr(&received.num_valid)?, cx.addr(&out)?];
    let shared_at = shared.map_or(Ok(DevicePtr::NULL), |shared| cx.addr(shared))?;
    for first in (0..tokens).step_by(tokens_max) {
        let of_launch = tokens_max.min(tokens - first) as u32;
        let items = of_launch.saturating_mul(num_ranks as u32 - 1);
        let dims = Dims::linear(items.min(cx.collective_blocks_max() as u32), THREADS);
        cx.launch_collective(kernel, dims, |communicator| ReturnArgs {
            communicator,
            y: y_at,
            places,
            received_weights: weights,
            experts,
            num_valid,
            shared: shared_at,
            out: to,
            shared_stride: shared.map_or(0, |shared| shared.row_stride() as i64),
            tokens_of_rank: tokens as u32,
            first_token: first as u32,
            tokens: of_launch,
            columns,
            row_packs: row_packs as u32,
            chosen: chosen as u32,
            experts_of_rank: experts_of_rank as u32,
            _padding: 0,
        })?;
    }
    Ok(out)
}
