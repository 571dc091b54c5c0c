//! Rows on their way to the ranks that own the experts which they chose; CUDA source: `moe_dispatch.cu`.

mod host;

use bcg_runtime::{
    COLLECTIVE_BLOCKS_MAX, CommunicatorArgs, DType, DevicePtr, Dims, KernelArgs, OpStream, Result, Source, Tensor,
};

use super::message::slot_packs;
use crate::check::Check;
use crate::float::{PerFloat, pack_len};
use crate::moe::{CHOICES_OF_PACK, Choices, experts_of_rank};
use host::{give, take};

static SOURCE: Source = source!("collective/moe_dispatch/moe_dispatch.cu")
    .takes::<DispatchArgs>()
    .define("BLOCKS_MAX", COLLECTIVE_BLOCKS_MAX);
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("moe_dispatch");

/// Threads of a block.
const THREADS: u32 = 256;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct DispatchArgs {
    communicator: CommunicatorArgs,
    x: DevicePtr,
    #[points_to(const i32)]
    experts: DevicePtr,
    #[points_to(const f32)]
    weights: DevicePtr,
    /// What comes, of all ranks in their order, `tokens_of_rank` of each: rows without gaps, and their choices.
    rows: DevicePtr,
    #[points_to(i32)]
    received_experts: DevicePtr,
    #[points_to(f32)]
    received_weights: DevicePtr,
    x_stride: i64,
    tokens_of_rank: u32,
    /// The tokens of each rank that this launch sends.
    first_token: u32,
    tokens: u32,
    columns: u32,
    /// The packs of a row.
    row_packs: u32,
    chosen: u32,
    experts_of_rank: u32,
    _padding: u32,
}

// SAFETY: `moe_dispatch` has checked the shapes when it launches, and the source indexes by these alone, within tokens of
// which a slot of the plane holds as many as a launch sends.
static MOE_DISPATCH: PerFloat<DispatchArgs> = per_float_collective!("moe_dispatch", SOURCE, give, take).programmatic();

/// Sends rows to the ranks that own the experts which they chose, and returns what comes to this one: of every rank as many
/// rows as it gives, in the order of the ranks, and the choices among this rank's experts.
///
/// Rank `r` of `W` owns the experts from `r E / W` on. With S rows of each rank, row `s S + t` is row `t` of rank `s` if it
/// chose an expert of this rank, and undefined if not; a choice is then its expert and its weight, and that of another
/// rank's expert is -1 with weight 0. A row goes once to each owner, with all that it chose there: that is fewer bytes than
/// once for each choice. How many come is known on the device alone. Outside of a world it returns what it gets.
///
/// # Shapes
/// - `x`: `[S, C]`, bf16, f16 or f32, may be row-sliced.   - `choices`: of `[S, K]`, among `num_experts`.
/// - The rows: `[W S, C]`; their choices `[W S, K]`.
///
/// # Capture
/// Enqueues one kernel, or several for more rows than the plane holds. Frozen: shapes and addresses. Read again at each
/// replay: `x` and `choices`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs, if W does not divide the experts, or if the plane holds no
/// row; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_kernels::Choices;
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let x = device.tensor(&[1, 2], &[1.0f32, 2.0])?;
/// let choices = Choices { experts: device.tensor(&[1, 1], &[3])?, weights: device.tensor(&[1, 1], &[1.0f32])? };
/// let (rows, _) = runner.eager(&(), |cx| bcg_kernels::moe_dispatch(cx, &x, &choices, 4))?;
/// assert_eq!(runner.read::<f32>(&rows)?, [1.0, 2.0], "one rank alone");
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn moe_dispatch(cx: &mut OpStream, x: &Tensor, choices: &Choices, num_experts: usize) -> Result<(Tensor, Choices)> {
    CHECK.rank("x", x, &["S", "C"])?;
    choices.check(CHECK, x.dim(0))?;
    let kernel = MOE_DISPATCH.get(CHECK, "x", x.dtype())?;
    let num_ranks = cx.world_size();
    let experts_of_rank = experts_of_rank(CHECK, num_experts, num_ranks)?;
    if num_ranks == 1 {
        return Ok((x.clone(), choices.clone()));
    }
    let (tokens, columns, chosen) = (x.dim(0), x.dim(1), choices.experts.dim(1));
    let rows = cx.empty(&[num_ranks * tokens, columns], x.dtype())?;
    let received = Choices {
        experts: cx.empty(&[num_ranks * tokens, chosen], DType::I32)?,
        weights: cx.empty(&[num_ranks * tokens, chosen], DType::F32)?,
    };
    let row_packs = columns.div_ceil(pack_len(x.dtype()));
    let token_packs = row_packs + chosen.div_ceil(CHOICES_OF_PACK);
    let tokens_max = slot_packs(cx) as usize / token_packs;
    if tokens_max == 0 {
        let got = format!("{} bytes; make the planes of the communicators larger", cx.slot_bytes());
        return Err(CHECK.error(format!("a plane with {} bytes for each rank", 16 * token_packs), got));
    }
    let (all_rows, from) = (CHECK.u32("rows", num_ranks * tokens)?, cx.addr(x)?);
    let [experts, weights] = [cx.addr(&choices.experts)?, cx.addr(&choices.weights)?];
    let [received_experts, received_weights] = [cx.addr(&received.experts)?, cx.addr(&received.weights)?];
    let to = cx.addr(&rows)?;
    for first in (0..tokens).step_by(tokens_max) {
        let of_launch = tokens_max.min(tokens - first) as u32;
        let items = of_launch.saturating_mul(num_ranks as u32 - 1);
        let dims = Dims::linear(items.min(cx.collective_blocks_max() as u32), THREADS);
        cx.launch_collective(kernel, dims, |communicator| DispatchArgs {
            communicator,
            x: from,
            experts,
            weights,
            rows: to,
            received_experts,
            received_weights,
            x_stride: x.row_stride() as i64,
            tokens_of_rank: all_rows / num_ranks as u32,
            first_token: first as u32,
            tokens: of_launch,
            columns: columns as u32,
            row_packs: row_packs as u32,
            chosen: chosen as u32,
            experts_of_rank: experts_of_rank as u32,
            _padding: 0,
        })?;
    }
    Ok((rows, received))
}
