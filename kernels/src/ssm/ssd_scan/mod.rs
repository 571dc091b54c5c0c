//! The state-space recurrence of Mamba2 over the new tokens of each sequence; CUDA sources: `portable.cu` and, for
//! bf16 of published sizes, `tiled.cu`.

mod host;
mod tiled;

use bcg_runtime::{DType, Device, DevicePtr, Dims, Kernel, KernelArgs, OpStream, Result, Source, Tensor};

use crate::check::Check;
use crate::float::{PerFloat, per_float};

pub(super) use host::{host_bf16, host_f32};

use super::state_slots::{StateSlots, StateSlotsArgs, check_slots};

static PORTABLE_SOURCE: Source = source!("ssm/ssd_scan/portable.cu")
    .takes::<SsmArgs>()
    .define("WARP_ROWS", WARP_ROWS)
    .define("STATE_SIZE_MAX", STATE_SIZE_MAX);
pub(super) const SOURCES: &[&Source] = &[&PORTABLE_SOURCE, &tiled::SOURCE];

const CHECK: Check = Check::new("ssd_scan");

/// Rows of a state that a warp of the kernel keeps; `ROWS` in `portable.cu`.
const WARP_ROWS: usize = 4;
/// The largest N that a warp keeps.
const STATE_SIZE_MAX: usize = 256;
const WARPS: usize = 8;

/// The arguments of [`ssd_scan()`] and of [`ssm_update()`](crate::ssm_update()).
#[repr(C)]
#[derive(Clone, Copy, Debug, KernelArgs)]
pub(super) struct SsmArgs {
    pub(super) x: DevicePtr,
    pub(super) b: DevicePtr,
    pub(super) c: DevicePtr,
    pub(super) dt: DevicePtr,
    pub(super) a_log: DevicePtr,
    pub(super) d: DevicePtr,
    pub(super) dt_bias: DevicePtr,
    pub(super) state: DevicePtr,
    pub(super) slots: StateSlotsArgs,
    /// Null where each row is a sequence of its own.
    #[points_to(const i32)]
    pub(super) cu_seqlens_q: DevicePtr,
    pub(super) out: DevicePtr,
    pub(super) x_stride: i64,
    pub(super) b_stride: i64,
    pub(super) c_stride: i64,
    pub(super) dt_stride: i64,
    /// Elements from one state to the next.
    pub(super) slot_stride: i64,
    pub(super) rows: u32,
    pub(super) sequences: u32,
    pub(super) num_slots: u32,
    pub(super) heads: u32,
    /// Heads that share one B and C.
    pub(super) group_heads: u32,
    pub(super) head_dim: u32,
    pub(super) state_size: u32,
    pub(super) dt_min: f32,
    pub(super) dt_max: f32,
    pub(super) _padding: u32,
}

/// One kernel for each dtype of the activations, of states in f32 and of states in bf16.
#[derive(Debug)]
pub(super) struct PerState {
    pub(super) f32: PerFloat<SsmArgs>,
    pub(super) bf16: PerFloat<SsmArgs>,
}

impl PerState {
    /// Returns the kernel of a dtype of activations and one of states.
    pub(super) fn get(&'static self, check: Check, x: DType, state: DType) -> Result<&'static Kernel<SsmArgs>> {
        match state {
            DType::F32 => self.f32.get(check, "x", x),
            DType::Bf16 => self.bf16.get(check, "x", x),
            other => Err(check.error("`state` f32 or bf16", other)),
        }
    }
}

// SAFETY: `ssd_scan` has checked the shapes when it launches, and the source indexes by these alone.
static SSD_SCAN: PerState = PerState {
    f32: per_float!("ssd_scan_state_f32", PORTABLE_SOURCE, host_f32).programmatic(),
    bf16: per_float!("ssd_scan_state_bf16", PORTABLE_SOURCE, host_bf16).programmatic(),
};

/// The inputs of [`ssd_scan()`] and [`ssm_update()`](crate::ssm_update()): H heads of P channels with a state of P × N
/// each, G groups of heads that share B and C.
#[derive(Clone, Copy, Debug)]
pub struct SsmInputs<'a> {
    /// `[T, H P]`, bf16, f16 or f32; may be row-sliced, as the next three.
    pub x: &'a Tensor,
    /// `[T, G N]`: what enters the state.
    pub b: &'a Tensor,
    /// `[T, G N]`: what is read from the state.
    pub c: &'a Tensor,
    /// `[T, H]`: the time step before bias and softplus.
    pub dt: &'a Tensor,
    /// `[H]`: the logarithm of the negated decay rate.
    pub a_log: &'a Tensor,
    /// `[H]`: the weight of the input in the output.
    pub d: &'a Tensor,
    /// `[H]`.
    pub dt_bias: &'a Tensor,
    /// The least and the largest time step.
    pub dt_limits: (f32, f32),
    /// `[slots, H, P, N]`, f32 or bf16; slots may lie apart.
    pub state: &'a Tensor,
    /// Where each sequence's state is read and written. A slot that is written is neither read nor written by another
    /// sequence.
    pub slots: &'a StateSlots,
}

impl SsmInputs<'_> {
    /// Checks all tensors and makes the arguments; `sequences` slots are read and written.
    pub(super) fn args(
        &self,
        check: Check,
        cx: &mut OpStream,
        sequences: usize,
        cu_seqlens_q: Option<&Tensor>,
        out: &Tensor,
    ) -> Result<SsmArgs> {
        self.check(check, sequences)?;
        let (heads, groups) = (self.state.dim(1), self.b.dim(1) / self.state.dim(3));
        Ok(SsmArgs {
            x: cx.addr(self.x)?,
            b: cx.addr(self.b)?,
            c: cx.addr(self.c)?,
            dt: cx.addr(self.dt)?,
            a_log: cx.addr(self.a_log)?,
            d: cx.addr(self.d)?,
            dt_bias: cx.addr(self.dt_bias)?,
            state: cx.addr(self.state)?,
            slots: StateSlotsArgs::new(cx, self.slots)?,
            cu_seqlens_q: cu_seqlens_q.map_or(Ok(DevicePtr::NULL), |starts| cx.addr(starts))?,
            out: cx.addr(out)?,
            x_stride: self.x.row_stride() as i64,
            b_stride: self.b.row_stride() as i64,
            c_stride: self.c.row_stride() as i64,
            dt_stride: self.dt.row_stride() as i64,
            slot_stride: self.state.row_stride() as i64,
            rows: check.u32("T", self.x.dim(0))?,
            sequences: check.u32("B", sequences)?,
            num_slots: check.u32("slots", self.state.dim(0))?,
            heads: check.u32("H", heads)?,
            group_heads: check.u32("H / G", heads / groups)?,
            head_dim: check.u32("P", self.state.dim(2))?,
            state_size: check.u32("N", self.state.dim(3))?,
            dt_min: self.dt_limits.0,
            dt_max: self.dt_limits.1,
            _padding: 0,
        })
    }

    fn check(&self, check: Check, sequences: usize) -> Result<()> {
        check.rank("state", self.state, &["slots", "H", "P", "N"])?;
        let [heads, head_dim, state_size] = [self.state.dim(1), self.state.dim(2), self.state.dim(3)];
        if heads * head_dim * state_size == 0 {
            return Err(check.error("`state` with H, P and N above 0", format!("{:?}", self.state.shape())));
        }
        check.rank("x", self.x, &["T", "H P"])?;
        let (rows, dtype) = (self.x.dim(0), self.x.dtype());
        check.shape("x", self.x, &[rows, heads * head_dim])?;
        check.rank("b", self.b, &["T", "G N"])?;
        let groups = self.b.dim(1) / state_size;
        if groups == 0 || !self.b.dim(1).is_multiple_of(state_size) || !heads.is_multiple_of(groups) {
            let expected = format!("`b` [T, G * {state_size}] with {heads} a multiple of G");
            return Err(check.error(expected, format!("{:?}", self.b.shape())));
        }
        for (name, tensor, width) in
            [("b", self.b, self.b.dim(1)), ("c", self.c, self.b.dim(1)), ("dt", self.dt, heads)]
        {
            check.shape(name, tensor, &[rows, width])?;
            check.dtype(name, tensor, dtype)?;
        }
        for (name, tensor) in [("a_log", self.a_log), ("d", self.d), ("dt_bias", self.dt_bias)] {
            check.dense(name, tensor, &[heads], dtype)?;
        }
        let (least, most) = self.dt_limits;
        if !(least >= 0.0 && least <= most) {
            return Err(check.error("`dt_limits` from 0 on, not descending", format!("{:?}", self.dt_limits)));
        }
        check_slots(check, self.slots, sequences)
    }
}

/// Runs the recurrence of Mamba2 over the new tokens of each sequence, from its state before to its state after.
///
/// The rows `cu_seqlens_q[b]..cu_seqlens_q[b + 1]` are sequence `b`. For each of its tokens and each head, with
/// `dt = clamp(softplus(dt + dt_bias), dt_limits)` and the B and C of the head's group,
/// `h = exp(-dt exp(a_log)) h + dt x Bᵀ` and `out = h C + d x`, in f32, rounded once. `h` starts from the slot that is read,
/// or from zeros, and is rounded to the state's dtype only where it is written, after the last token. Rows that belong to
/// no sequence (padding) are left as they are; a sequence without rows reads and writes no state.
///
/// # Shapes
/// - As the fields of [`SsmInputs`] say, with slots `[B]`; N at most 256.   - `cu_seqlens_q`: `[B + 1]` i32, from 0 on,
///   not descending.   - `out`: `[T, H P]`.
///
/// # Capture
/// Meant for breaks, whose batch is live: one launch for all batches whose tensors have the same addresses and shapes.
/// Frozen: shapes, addresses, `dt_limits`. Read again at each replay: the contents of all tensors.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs, or `dt_limits` descend; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_kernels::StateSlots;
/// use bcg_kernels::SsmInputs;
/// use bcg_runtime::{DType, Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let row = |values: [f32; 2]| device.tensor(&[2, 1], &values);
/// let (x, ones, dt) = (row([2.0, 3.0])?, row([1.0, 1.0])?, row([50.0, 50.0])?);
/// // exp(-50 exp(0)) is nothing, so each token forgets those before; the time step is limited to 1.
/// let (a_log, zero) = (device.tensor(&[1], &[5.0f32])?, device.tensor(&[1], &[0.0f32])?);
/// let state = device.zeros(&[1, 1, 1, 1], DType::F32)?;
/// let slots = StateSlots { read: device.tensor(&[1], &[-1])?, write: device.tensor(&[1], &[0])? };
/// let input = SsmInputs {
///     x: &x,
///     b: &ones,
///     c: &ones,
///     dt: &dt,
///     a_log: &a_log,
///     d: &zero,
///     dt_bias: &zero,
///     dt_limits: (0.0, 1.0),
///     state: &state,
///     slots: &slots,
/// };
/// let starts = device.tensor(&[2], &[0, 2])?;
/// let out = runner.eager(&(), |cx| bcg_kernels::ssd_scan(cx, &input, &starts))?;
/// assert_eq!(runner.read::<f32>(&out)?, [2.0, 3.0]);
/// assert_eq!(device.read::<f32>(&state)?, [3.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn ssd_scan(cx: &mut OpStream, input: &SsmInputs<'_>, cu_seqlens_q: &Tensor) -> Result<Tensor> {
    CHECK.rank("cu_seqlens_q", cu_seqlens_q, &["B + 1"])?;
    let Some(sequences) = cu_seqlens_q.dim(0).checked_sub(1) else {
        return Err(CHECK.error("`cu_seqlens_q` [B + 1]", "[0]"));
    };
    CHECK.dense("cu_seqlens_q", cu_seqlens_q, &[sequences + 1], DType::I32)?;
    let out = cx.empty(input.x.shape(), input.x.dtype())?;
    let args = input.args(CHECK, cx, sequences, Some(cu_seqlens_q), &out)?;
    let (kernel, dims) = match tiled::choose(cx.device(), input, &args) {
        Some(chosen) => chosen,
        None => choose(cx.device(), input, &args)?,
    };
    cx.launch(kernel, dims, args)?;
    Ok(out)
}

/// Chooses the kernel of any sizes, with its geometry.
fn choose(device: &Device, input: &SsmInputs<'_>, args: &SsmArgs) -> Result<(&'static Kernel<SsmArgs>, Dims)> {
    let kernel = SSD_SCAN.get(CHECK, input.x.dtype(), input.state.dtype())?;
    if args.state_size as usize > STATE_SIZE_MAX {
        return Err(CHECK.error(format!("N of at most {STATE_SIZE_MAX}"), args.state_size));
    }
    let pieces = (args.head_dim as usize).div_ceil(WARP_ROWS);
    let items = (args.sequences as usize * args.heads as usize).saturating_mul(pieces);
    // As many blocks as the device holds at once; they take further items in turn.
    let blocks = items.div_ceil(WARPS).min(8 * device.num_multiprocessors() as usize);
    Ok((kernel, Dims::linear(if args.rows == 0 { 0 } else { blocks as u32 }, 32 * WARPS as u32)))
}
