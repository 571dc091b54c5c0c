//! The sum of a tensor over all ranks; CUDA source: `all_reduce.cu`.

use bcg_runtime::{COLLECTIVE_BLOCKS_MAX, OpStream, Result, Source, Tensor};

use super::far;
use super::message::{grid, slot_packs};
use super::reduce::{ReduceArgs, Reduction, give, take};
use crate::check::Check;
use crate::float::PerFloat;

static SOURCE: Source =
    source!("collective/all_reduce/all_reduce.cu").takes::<ReduceArgs>().define("BLOCKS_MAX", COLLECTIVE_BLOCKS_MAX);
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("all_reduce");

/// The largest message, in bytes, that each rank sends whole to each other one, by the number of ranks from 0 on. Beyond it
/// each rank sums a share and sends the sum on, which moves 2 (W − 1) / W times the message instead of W − 1 times, for a
/// second crossing. Two ranks move as much either way. For 4 and 8 ranks these are what SGLang's all-reduce switches at on
/// H200 in graphs (`configs/custom_all_reduce_v2.py` of 0.5.23); worlds between take the next one's.
const ONE_SHOT_BYTES_MAX: [usize; bcg_runtime::RANKS_MAX + 1] =
    [usize::MAX, usize::MAX, usize::MAX, 384 << 10, 384 << 10, 128 << 10, 128 << 10, 128 << 10, 128 << 10];

// SAFETY: `all_reduce` has checked the shapes when it launches, and the source indexes by these alone, within what
// `Reduction` and the plane's size allow.
static ONE_SHOT: PerFloat<ReduceArgs> = per_float_collective!("all_reduce", SOURCE, give, take).programmatic();

// SAFETY: as above.
static TWO_SHOT: PerFloat<ReduceArgs> = per_float_collective!("all_reduce_two_shot", SOURCE, give, take).programmatic();

/// Tells whether messages of so many bytes are summed in two steps.
pub(super) fn is_two_shot(num_ranks: usize, bytes: usize) -> bool {
    bytes > ONE_SHOT_BYTES_MAX[num_ranks]
}

/// Sums a tensor over all ranks, in their order; each gets the same bits.
///
/// `out[t, c] = round(((x₀[t, c] + x₁[t, c]) + x₂[t, c]) + …)` in f32, where `xᵣ` is what rank `r` gives. Outside of a world
/// it returns `x` and enqueues nothing. The algorithms on GPUs are the one-shot and two-shot pushes of SGLang and
/// TensorRT-LLM, in which what is sent says itself that it has come.
///
/// # Shapes
/// - `x`, `out`: `[T, C]`, bf16, f16 or f32; `x` may be row-sliced.
///
/// # Capture
/// Enqueues one kernel, or several for a message larger than the plane holds. Frozen: shapes and addresses. Read again at each
/// replay: `x`.
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
/// let sum = runner.eager(&(), |cx| bcg_kernels::all_reduce(cx, &x))?;
/// assert_eq!(runner.read::<f32>(&sum)?, [1.0, 2.0], "one rank alone");
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn all_reduce(cx: &mut OpStream, x: &Tensor) -> Result<Tensor> {
    CHECK.rank("x", x, &["T", "C"])?;
    let num_ranks = cx.world_size();
    let is_two_shot = is_two_shot(num_ranks, x.size_bytes());
    let kernel = if is_two_shot { &TWO_SHOT } else { &ONE_SHOT }.get(CHECK, "x", x.dtype())?;
    if num_ranks == 1 {
        return Ok(x.clone());
    }
    if cx.sums_gathered() {
        return far::all_reduce(cx, CHECK, x);
    }
    let out = cx.empty(x.shape(), x.dtype())?;
    let sums = Reduction { check: CHECK, x, out: &out, x_step: 0 };
    let blocks_max = cx.collective_blocks_max();
    if is_two_shot {
        // A slot holds a share of the message and a share of the sum.
        let shares = num_ranks as u32;
        let packs_max = (slot_packs(cx) / 2).saturating_mul(shares);
        sums.launch(cx, kernel, packs_max, |part| grid(part.packs.div_ceil(shares), blocks_max))?;
    } else {
        let packs_max = slot_packs(cx);
        sums.launch(cx, kernel, packs_max, |part| grid(part.packs, blocks_max))?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::{DType, Device};

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let flat = device.zeros(&[8], DType::Bf16)?;
        let ints = device.zeros(&[2, 8], DType::I32)?;
        assert!(refusal(&device, |cx| all_reduce(cx, &flat)).contains("`x` [T, C], got [8]"));
        assert!(refusal(&device, |cx| all_reduce(cx, &ints)).contains("`x` bf16, f16 or f32, got i32"));
        Ok(())
    }

    #[test]
    fn two_ranks_never_sum_in_two_steps() {
        assert!(!is_two_shot(2, 1 << 40));
        assert!(is_two_shot(4, (384 << 10) + 1) && !is_two_shot(4, 384 << 10));
        assert!(is_two_shot(8, (128 << 10) + 1) && !is_two_shot(8, 128 << 10));
    }
}
