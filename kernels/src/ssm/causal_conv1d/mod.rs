//! Causal convolution of each channel with its own few weights; CUDA source: `causal_conv1d.cu`.

mod host;

use bcg_runtime::{DType, DevicePtr, Dims, KernelArgs, OpStream, Result, Source, Tensor};

use super::state_slots::{StateSlots, StateSlotsArgs, check_slots};
use crate::check::Check;
use crate::float::{PerFloat, pack_len, per_float};
use host::host;

static SOURCE: Source =
    source!("ssm/causal_conv1d/causal_conv1d.cu").takes::<CausalConv1dArgs>().define("THREADS", THREADS);
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("causal_conv1d");

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct CausalConv1dArgs {
    x: DevicePtr,
    weight: DevicePtr,
    /// Null for none.
    bias: DevicePtr,
    state: DevicePtr,
    slots: StateSlotsArgs,
    /// Null: each row is a sequence of its own.
    #[points_to(const i32)]
    cu_seqlens_q: DevicePtr,
    out: DevicePtr,
    x_stride: i64,
    /// Elements from one state to the next.
    slot_stride: i64,
    rows: u32,
    channels: u32,
    sequences: u32,
    num_slots: u32,
    kernel: u32,
    /// Rows of a thread.
    tile_rows: u32,
}

// SAFETY: `causal_conv1d` has checked the shapes when it launches, and the source indexes by these alone.
static CAUSAL_CONV1D: PerFloat<CausalConv1dArgs> = per_float!("causal_conv1d", SOURCE, host).programmatic();

const THREADS: usize = 128;
/// The most rows that a thread slides down; each thread reads K − 1 more.
const TILE_ROWS_MAX: usize = 16;
/// Threads that keep a device busy: with more threads than this, each takes more rows.
const BUSY_THREADS: usize = 1 << 17;

/// The inputs of [`causal_conv1d()`].
#[derive(Clone, Copy, Debug)]
pub struct CausalConv1d<'a> {
    /// `[T, channels]`, bf16, f16 or f32; may be row-sliced.
    pub x: &'a Tensor,
    /// `[channels, K]`, K from 2 to 4; the last weight is that of the row itself.
    pub weight: &'a Tensor,
    /// `[channels]`.
    pub bias: Option<&'a Tensor>,
    /// `[slots, channels, K - 1]`: the last inputs of a sequence, oldest first; slots may lie apart.
    pub state: &'a Tensor,
    /// Where each sequence's last inputs are read and written. A slot that is written is neither read nor written by
    /// another sequence.
    pub slots: &'a StateSlots,
    /// `[B + 1]` i32, from 0 on, not descending: the first row of each sequence. Without, row `t` is all of sequence `t`.
    pub cu_seqlens_q: Option<&'a Tensor>,
}

/// Convolves the new tokens of each sequence with those before them, and applies SiLU.
///
/// `out[t, c] = silu(bias[c] + Σ_k weight[c, k] x[t - K + 1 + k, c])`, in f32, rounded once. Inputs before a sequence's first
/// row come from the slot that it reads, and are zeros if that is −1. Its last K − 1 inputs, older ones included, go to the
/// slot that it writes, unless that is −1; with `cu_seqlens_q` that must be another slot than the one it reads. Rows that
/// belong to no sequence (padding) are left as they are, and a sequence without rows reads and writes no state.
///
/// # Shapes
/// - As the fields of [`CausalConv1d`] say, one dtype for all but slots and starts.   - Returned: `[T, channels]`.
///
/// # Capture
/// Enqueues one kernel; the same launch for all batches whose tensors have the same addresses and shapes. Frozen: shapes and
/// addresses. Read again at each replay: the contents of all tensors.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_kernels::StateSlots;
/// use bcg_kernels::CausalConv1d;
/// use bcg_runtime::{DType, Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let state = device.tensor(&[2, 1, 1], &[40.0f32, 0.0])?;
/// let input = CausalConv1d {
///     x: &device.tensor(&[2, 1], &[50.0f32, 60.0])?,
///     weight: &device.tensor(&[1, 2], &[1.0f32, 2.0])?,
///     bias: None,
///     state: &state,
///     slots: &StateSlots { read: device.tensor(&[1], &[0])?, write: device.tensor(&[1], &[1])? },
///     cu_seqlens_q: Some(&device.tensor(&[2], &[0, 2])?),
/// };
/// let out = runner.eager(&(), |cx| bcg_kernels::causal_conv1d(cx, &input))?;
/// assert_eq!(runner.read::<f32>(&out)?, [140.0, 170.0]); // so large that SiLU changes nothing
/// assert_eq!(device.read::<f32>(&state)?, [40.0, 60.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn causal_conv1d(cx: &mut OpStream, input: &CausalConv1d<'_>) -> Result<Tensor> {
    let CausalConv1d { x, weight, state, .. } = *input;
    let sequences = input.check()?;
    let (rows, channels) = (x.dim(0), x.dim(1));
    let kernel = CAUSAL_CONV1D.get(CHECK, "x", x.dtype())?;
    let packs = channels.div_ceil(pack_len(x.dtype()));
    let tile_rows = (rows * packs / BUSY_THREADS).clamp(1, TILE_ROWS_MAX);
    let mut dims = Dims::linear(CHECK.u32("rows", rows.div_ceil(tile_rows))?, THREADS as u32);
    dims.grid[1] = CHECK.u32("channels", packs.div_ceil(THREADS))?;
    let out = cx.empty(x.shape(), x.dtype())?;
    let addr = |cx: &mut OpStream, tensor: Option<&Tensor>| tensor.map_or(Ok(DevicePtr::NULL), |t| cx.addr(t));
    let args = CausalConv1dArgs {
        x: cx.addr(x)?,
        weight: cx.addr(weight)?,
        bias: addr(cx, input.bias)?,
        state: cx.addr(state)?,
        slots: StateSlotsArgs::new(cx, input.slots)?,
        cu_seqlens_q: addr(cx, input.cu_seqlens_q)?,
        out: cx.addr(&out)?,
        x_stride: x.row_stride() as i64,
        slot_stride: state.row_stride() as i64,
        rows: CHECK.u32("T", rows)?,
        channels: CHECK.u32("channels * K", channels * weight.dim(1))? / weight.dim(1) as u32,
        sequences: CHECK.u32("B", sequences)?,
        num_slots: CHECK.u32("slots", state.dim(0))?,
        kernel: CHECK.u32("K", weight.dim(1))?,
        tile_rows: CHECK.u32("rows of a thread", tile_rows)?,
    };
    cx.launch(kernel, dims, args)?;
    Ok(out)
}

impl CausalConv1d<'_> {
    /// Checks all tensors and returns the number of sequences.
    fn check(&self) -> Result<usize> {
        CHECK.rank("x", self.x, &["T", "channels"])?;
        let (rows, channels, dtype) = (self.x.dim(0), self.x.dim(1), self.x.dtype());
        CHECK.rank("weight", self.weight, &["channels", "K"])?;
        let kernel = self.weight.dim(1);
        if !(2..=4).contains(&kernel) {
            return Err(CHECK.error("`weight` [channels, K] with K from 2 to 4", format!("{:?}", self.weight.shape())));
        }
        CHECK.dense("weight", self.weight, &[channels, kernel], dtype)?;
        if let Some(bias) = self.bias {
            CHECK.dense("bias", bias, &[channels], dtype)?;
        }
        CHECK.rank("state", self.state, &["slots", "channels", "K - 1"])?;
        CHECK.shape("state", self.state, &[self.state.dim(0), channels, kernel - 1])?;
        CHECK.dtype("state", self.state, dtype)?;
        let sequences = match self.cu_seqlens_q {
            None => rows,
            Some(starts) => {
                CHECK.rank("cu_seqlens_q", starts, &["B + 1"])?;
                CHECK.dense("cu_seqlens_q", starts, &[starts.dim(0).max(1)], DType::I32)?;
                starts.dim(0) - 1
            }
        };
        check_slots(CHECK, self.slots, sequences)?;
        Ok(sequences)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::Device;

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let zeros = |shape: &[usize]| device.zeros(shape, DType::F32);
        let (x, weight, wide, state) = (zeros(&[3, 8])?, zeros(&[8, 4])?, zeros(&[8, 5])?, zeros(&[2, 8, 3])?);
        let (bias, ints) = (zeros(&[7])?, |len: usize| device.zeros(&[len], DType::I32));
        let slots = |len: usize| Ok::<_, bcg_runtime::Error>(StateSlots { read: ints(len)?, write: ints(len)? });
        let (two, three, starts) = (slots(2)?, slots(3)?, ints(3)?);
        let good = CausalConv1d {
            x: &x,
            weight: &weight,
            bias: None,
            state: &state,
            slots: &two,
            cu_seqlens_q: Some(&starts),
        };
        let says = |input: CausalConv1d<'_>| refusal(&device, |cx| causal_conv1d(cx, &input));
        assert!(says(CausalConv1d { weight: &wide, ..good }).contains("K from 2 to 4, got [8, 5]"));
        assert!(says(CausalConv1d { bias: Some(&bias), ..good }).contains("`bias` [8], got [7]"));
        assert!(says(CausalConv1d { state: &weight, ..good }).contains("`state` [slots, channels, K - 1]"));
        assert!(says(CausalConv1d { slots: &three, ..good }).contains("`slots.read` [2], got [3]"));
        assert!(says(CausalConv1d { cu_seqlens_q: None, ..good }).contains("`slots.read` [3], got [2]"));
        Ok(())
    }

    #[test]
    fn slots_of_several_sequences_are_refused_where_one_is_written() -> Result<()> {
        let device = Device::host();
        let zeros = |shape: &[usize]| device.zeros(shape, DType::F32);
        let (x, weight, state) = (zeros(&[2, 8])?, zeros(&[8, 4])?, zeros(&[4, 8, 3])?);
        let run = |read: [i32; 2], write: [i32; 2]| {
            let slots = StateSlots { read: device.tensor(&[2], &read)?, write: device.tensor(&[2], &write)? };
            let input =
                CausalConv1d { x: &x, weight: &weight, bias: None, state: &state, slots: &slots, cu_seqlens_q: None };
            let mut runner = bcg_runtime::Runner::new(&device, bcg_runtime::RunnerOptions::default())?;
            let out = runner.eager(&(), |cx| causal_conv1d(cx, &input))?;
            runner.read::<f32>(&out)
        };
        run([0, 0], [1, 2])?;
        run([-1, -1], [-1, -1])?;
        run([0, 1], [0, 1])?;
        for (read, write) in [([0, 1], [1, 2]), ([0, 1], [2, 2])] {
            let error = run(read, write).expect_err("two sequences at one slot").to_string();
            assert!(error.contains("slots that no other sequence reads or writes"), "{error}");
        }
        Ok(())
    }
}
