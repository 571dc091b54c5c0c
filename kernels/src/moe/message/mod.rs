//! Rows and their choices as one message of equal parts to every rank, for an exchange that knows no counts; CUDA source:
//! `message.cu`.

mod host;

use bcg_runtime::{DType, DevicePtr, Dims, Kernel, KernelArgs, OpStream, Result, Source, Tensor};

use super::route::{Choices, experts_of_rank};
use crate::check::Check;
use crate::float::{PerFloat, pack_len, per_float};
use host::{pack, unpack};

static SOURCE: Source = source!("moe/message/message.cu").takes::<PackArgs>().takes::<UnpackArgs>();
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const PACK: Check = Check::new("moe_pack");
const UNPACK: Check = Check::new("moe_unpack");

const PACK_BYTES: usize = 16;
/// Choices that a pack holds: of each the expert and 1, and the weight. `moe_exchange.cuh` has it too.
pub(crate) const CHOICES_OF_PACK: usize = 2;
const THREADS: u32 = 128;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct PackArgs {
    x: DevicePtr,
    #[points_to(const i32)]
    experts: DevicePtr,
    #[points_to(const f32)]
    weights: DevicePtr,
    message: DevicePtr,
    x_stride: i64,
    tokens: u32,
    columns: u32,
    row_packs: u32,
    chosen: u32,
    experts_of_rank: u32,
    _padding: u32,
}

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct UnpackArgs {
    message: DevicePtr,
    #[points_to(i32)]
    experts: DevicePtr,
    #[points_to(f32)]
    weights: DevicePtr,
    rows: u32,
    row_packs: u32,
    chosen: u32,
    _padding: u32,
}

// SAFETY: `moe_pack` has checked the shapes when it launches, and the source indexes by these alone.
static MOE_PACK: PerFloat<PackArgs> = per_float!("moe_pack", SOURCE, pack).programmatic();
// SAFETY: `moe_unpack` has checked the shapes when it launches, and the source indexes by these alone.
static MOE_UNPACK: Kernel<UnpackArgs> = unsafe { Kernel::new("moe_unpack", &SOURCE, unpack) }.programmatic();

/// Writes a message of equal parts to every rank: of each row the choices among that rank's experts, and the row if there is
/// one.
///
/// Row `r S + t` of the message is for rank `r` of W, which owns the experts from `r E / W` on: the choices of row `t`, those
/// of other ranks' experts left out, then the row, or zeros if no choice is left. Both fill whole words of 16 bytes. What
/// [`all_to_all`](crate::all_to_all()) makes of it is for [`moe_unpack`].
///
/// # Shapes
/// - `x`: `[S, C]`, bf16, f16 or f32, may be row-sliced.   - `choices`: of `[S, K]`, among `num_experts`.
/// - The message: `[W S, M]`, same dtype.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes and addresses. Read again at each replay: `x` and `choices`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs, or if W does not divide the experts; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_kernels::Choices;
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let x = device.tensor(&[1, 2], &[5.0f32, 6.0])?;
/// let choices = Choices { experts: device.tensor(&[1, 1], &[3])?, weights: device.tensor(&[1, 1], &[0.5f32])? };
/// let (x, choices) = runner.eager(&(), |cx| {
///     let message = bcg_kernels::moe_pack(cx, &x, &choices, 4)?;
///     bcg_kernels::moe_unpack(cx, &message, 2, 1)
/// })?;
/// assert_eq!(runner.read::<i32>(&choices.experts)?, [3]);
/// assert_eq!(runner.read::<f32>(&choices.weights)?, [0.5]);
/// assert_eq!(x.shape(), [1, 2]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn moe_pack(cx: &mut OpStream, x: &Tensor, choices: &Choices, num_experts: usize) -> Result<Tensor> {
    PACK.rank("x", x, &["S", "C"])?;
    choices.check(PACK, x.dim(0))?;
    let kernel = MOE_PACK.get(PACK, "x", x.dtype())?;
    let num_ranks = cx.world_size();
    let experts_of_rank = experts_of_rank(PACK, num_experts, num_ranks)?;
    let (chosen, row_packs) = (choices.experts.dim(1), x.dim(1).div_ceil(pack_len(x.dtype())));
    let packs = chosen.div_ceil(CHOICES_OF_PACK) + row_packs;
    let message = cx.empty(&[num_ranks * x.dim(0), packs * pack_len(x.dtype())], x.dtype())?;
    let args = PackArgs {
        x: cx.addr(x)?,
        experts: cx.addr(&choices.experts)?,
        weights: cx.addr(&choices.weights)?,
        message: cx.addr(&message)?,
        x_stride: x.row_stride() as i64,
        tokens: PACK.u32("S", x.dim(0))?,
        columns: PACK.u32("C", x.dim(1))?,
        row_packs: PACK.u32("packs of a row", row_packs)?,
        chosen: PACK.u32("K", chosen)?,
        experts_of_rank: experts_of_rank as u32,
        _padding: 0,
    };
    cx.launch(kernel, PACK.block_per_row(&message, THREADS)?, args)?;
    Ok(message)
}

/// Reads messages that [`moe_pack`] wrote: the rows, which share their memory, and the choices. Where a row has no choice, of
/// expert -1 and weight 0 then, it is zeros.
///
/// # Shapes
/// - `message`: `[T, M]` of rows of `columns` elements and `chosen` choices.
/// - The rows: `[T, C]`, row-sliced; their choices `[T, K]`.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes and addresses. Read again at each replay: `message`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if the message has another size; those of enqueuing.
pub fn moe_unpack(cx: &mut OpStream, message: &Tensor, columns: usize, chosen: usize) -> Result<(Tensor, Choices)> {
    UNPACK.rank("message", message, &["T", "M"])?;
    let (len, choice_packs) = (pack_len(message.dtype()), chosen.div_ceil(CHOICES_OF_PACK));
    let (rows, row_packs) = (message.dim(0), columns.div_ceil(len));
    UNPACK.dense("message", message, &[rows, (choice_packs + row_packs) * len], message.dtype())?;
    let choices =
        Choices { experts: cx.empty(&[rows, chosen], DType::I32)?, weights: cx.empty(&[rows, chosen], DType::F32)? };
    let args = UnpackArgs {
        message: cx.addr(message)?,
        experts: cx.addr(&choices.experts)?,
        weights: cx.addr(&choices.weights)?,
        rows: UNPACK.u32("T", rows)?,
        row_packs: UNPACK.u32("packs of a row", row_packs)?,
        chosen: UNPACK.u32("K", chosen)?,
        _padding: 0,
    };
    cx.launch(&MOE_UNPACK, Dims::per_item(rows * choice_packs, THREADS), args)?;
    Ok((message.columns(choice_packs * len..choice_packs * len + columns)?, choices))
}
