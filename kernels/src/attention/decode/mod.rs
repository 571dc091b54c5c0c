//! Attention of one query per sequence over paged keys and values.
//!
//! Two CUDA sources: `tiled.cu` for 16-bit dtypes with a head dim of 64 or 128, at the speed of memory;
//! `portable.cu` for the rest.

mod host;

use bcg_runtime::{DType, Device, DevicePtr, Dims, Kernel, KernelArgs, OpStream, Result, Source, Tensor};
use half::{bf16, f16};

use super::decode_plan::{self, BlockPlan, DecodePlan};
use super::paged_kv::{HEAD_DIM_MAX, PagedKv, PagedKvArgs};
use crate::arch::is_large;
use crate::check::Check;
use crate::float::{PerFloat, per_float};
use host::{host, host_tiled};

static PORTABLE_SOURCE: Source = source!("attention/decode/portable.cu")
    .takes::<AttentionDecodeArgs>()
    .define("WARPS", WARPS as usize)
    .define("HEAD_DIM_MAX", HEAD_DIM_MAX);
static TILED_SOURCE: Source = source!("attention/decode/tiled.cu")
    .takes::<AttentionDecodeArgs>()
    .takes::<BlockPlan>()
    .define("TILE_KEYS", decode_plan::TILE)
    .define("TILED_WARPS", TILED_WARPS)
    .define("RING_STAGES", STAGES);
pub(super) const SOURCES: &[&Source] = &[&PORTABLE_SOURCE, &TILED_SOURCE];

const CHECK: Check = Check::new("attention_decode");

/// Warps of a block of the kernel for any head dim, which share the keys of one sequence and head.
const WARPS: u32 = 8;
/// Warps of a block of the tiled kernel, which take 16 keys of each tile each.
const TILED_WARPS: usize = decode_plan::TILE / 16;
/// The tiles whose keys and values fit into a block's ring.
const STAGES: usize = 3;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct AttentionDecodeArgs {
    q: DevicePtr,
    out: DevicePtr,
    #[points_to(const i32)]
    kv_lens: DevicePtr,
    #[points_to(BlockPlan)]
    plan: DevicePtr,
    /// `[2 blocks, heads, D]`, then `[2 blocks, heads, 2]`: the largest score and the sum.
    #[points_to(f32)]
    partials: DevicePtr,
    kv: PagedKvArgs,
    q_stride: i64,
    sequences: u32,
    q_heads: u32,
    scale: f32,
    _padding: u32,
}

// SAFETY: `attention_decode_to` has checked the shapes when it launches, and the source indexes by these alone.
static ATTENTION_DECODE: PerFloat<AttentionDecodeArgs> =
    per_float!("attention_decode", PORTABLE_SOURCE, host).programmatic();

/// The tiled kernels of a dtype: for D 64 with 8 and 16 query heads per item, then for D 128.
macro_rules! tiled {
    ($dtype:ty, $name:literal) => {
        [
            tiled!($dtype, $name, "_d64_h8"),
            tiled!($dtype, $name, "_d64_h16"),
            tiled!($dtype, $name, "_d128_h8"),
            tiled!($dtype, $name, "_d128_h16"),
        ]
    };
    ($dtype:ty, $name:literal, $variant:literal) => {
        // SAFETY: the comment at the use of this macro names the checks.
        unsafe { Kernel::new(concat!("attention_decode_", $name, $variant), &TILED_SOURCE, host_tiled::<$dtype>) }
            .programmatic()
    };
}

// SAFETY: as above.
static TILED_BF16: [Kernel<AttentionDecodeArgs>; 4] = tiled!(bf16, "bf16");
// SAFETY: as above.
static TILED_F16: [Kernel<AttentionDecodeArgs>; 4] = tiled!(f16, "f16");

/// Attends with one query of each sequence to all its keys.
///
/// `out[b] = softmax(scale * q[b] · k) · v` over the `kv_lens[b]` keys in the pages of sequence `b`, in f32, rounded
/// once; query head `h` reads key-value head `h / (Hq / Hkv)`. A length of 0 (a padded row) gives zeros.
///
/// A sequence's keys are summed in stretches that the plan cuts, so the last bits of a row may depend on the lengths of
/// other sequences; padded rows change none.
///
/// # Shapes
/// - `q`, `out`: `[B, Hq D]`, bf16, f16 or f32; `q` may be row-sliced. D is a multiple of 32 up to 256.
/// - `kv_lens`: `[B]` i32.
/// - `plan`: of a [`DecodePlan`] for these heads, filled with the contents of `kv_lens`. The kernel counts in it, and
///   leaves it as it was.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes, addresses, `scale`. Read again at each replay: the contents of all tensors.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_kernels::{DecodePlan, PagedKv};
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let pages = |values: [f32; 2]| device.tensor(&[1, 2, 1, 32], &values.map(|v| [v; 32]).concat());
/// let kv = PagedKv {
///     k_cache: &pages([0.0, 0.0])?,
///     v_cache: &pages([1.0, 3.0])?,
///     page_table: &device.tensor(&[2, 1], &[0, 0])?,
/// };
/// let q = device.tensor(&[2, 32], &[1.0f32; 64])?;
/// let kv_lens = device.tensor(&[2], &[2, 0])?;
/// let (decode_plan, mut values) = (DecodePlan::new(&device, 1, 1), vec![]);
/// decode_plan.fill(&[2, 0], &mut values);
/// let plan = device.tensor(&decode_plan.shape(), &values)?;
/// let out = runner.eager(&(), |cx| bcg_kernels::attention_decode(cx, &q, &kv, &kv_lens, &plan, 1.0))?;
/// let out = runner.read::<f32>(&out)?;
/// assert_eq!((out[0], out[32]), (2.0, 0.0));
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn attention_decode(
    cx: &mut OpStream,
    q: &Tensor,
    kv: &PagedKv<'_>,
    kv_lens: &Tensor,
    plan: &Tensor,
    scale: f32,
) -> Result<Tensor> {
    let out = cx.empty(q.shape(), q.dtype())?;
    attention_decode_to(cx, &out, q, kv, kv_lens, plan, scale)?;
    Ok(out)
}

/// As [`attention_decode`], into `out`, which is contiguous and has the shape of `q`.
///
/// # Errors
/// As [`attention_decode`].
pub fn attention_decode_to(
    cx: &mut OpStream,
    out: &Tensor,
    q: &Tensor,
    kv: &PagedKv<'_>,
    kv_lens: &Tensor,
    plan: &Tensor,
    scale: f32,
) -> Result<()> {
    CHECK.rank("kv_lens", kv_lens, &["B"])?;
    let sequences = kv_lens.dim(0);
    CHECK.dense("kv_lens", kv_lens, &[sequences], DType::I32)?;
    let q_heads = kv.check(CHECK, q, sequences)?;
    CHECK.shape("q", q, &[sequences, q.dim(1)])?;
    let (kv_heads, head_dim) = (kv.k_cache.dim(2), kv.k_cache.dim(3));
    CHECK.dense("plan", plan, &DecodePlan::new(cx.device(), q_heads, kv_heads).shape(), DType::I32)?;
    CHECK.dense("out", out, q.shape(), q.dtype())?;
    let mut args = AttentionDecodeArgs {
        q: cx.addr(q)?,
        out: cx.addr(out)?,
        kv_lens: cx.addr(kv_lens)?,
        plan: cx.addr(plan)?,
        partials: DevicePtr::NULL,
        kv: kv.args(CHECK, cx)?,
        q_stride: q.row_stride() as i64,
        sequences: CHECK.u32("B", sequences)?,
        q_heads: CHECK.u32("Hq", q_heads)?,
        scale,
        _padding: 0,
    };
    let group = q_heads / kv_heads;
    let Some(kernel) = tiled(cx.device(), q.dtype(), &args.kv, group) else {
        let dims = Dims::linear(CHECK.u32("B * Hq", sequences * q_heads)?, 32 * WARPS);
        return cx.launch(ATTENTION_DECODE.get(CHECK, "q", q.dtype())?, dims, args);
    };
    let blocks = plan.dim(0);
    // Two pieces of a block: of the item with which it begins, and of the one with which it ends.
    let partials = cx.empty(&[2 * blocks, group.min(DecodePlan::item_heads(group)), head_dim + 2], DType::F32)?;
    args.partials = cx.addr(&partials)?;
    let mut dims = Dims::linear(CHECK.u32("blocks", blocks)?, 32 * TILED_WARPS as u32);
    dims.shared_bytes = tiled_shared_bytes(head_dim) as u32;
    cx.launch(kernel, dims, args)
}

/// Finds the tiled kernel, where there is one: it copies 16 bytes at a time, into more shared memory than small GPUs have.
fn tiled(
    device: &Device,
    dtype: DType,
    kv: &PagedKvArgs,
    group: usize,
) -> Option<&'static Kernel<AttentionDecodeArgs>> {
    let kernels = match dtype {
        DType::Bf16 => &TILED_BF16,
        DType::F16 => &TILED_F16,
        _ => return None,
    };
    let is_large = device.compute_capability().is_none_or(is_large);
    if !is_large || !kv.is_aligned(16 / dtype.size_bytes()) {
        return None;
    }
    let wide = usize::from(DecodePlan::item_heads(group) > 8);
    match kv.head_dim() {
        64 => Some(&kernels[wide]),
        128 => Some(&kernels[2 + wide]),
        _ => None,
    }
}

/// Shared memory of a block of the tiled kernel: the ring with a mask for each chunk, then what the warps add up.
const fn tiled_shared_bytes(head_dim: usize) -> usize {
    let ring = STAGES * decode_plan::TILE * 2 * head_dim * size_of::<u16>() + STAGES * TILED_WARPS * size_of::<u32>();
    let sums = TILED_WARPS * 8 * (head_dim + 4 + 2) * size_of::<f32>();
    ring + sums + 16
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::{Runner, RunnerOptions};

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let cache = device.zeros(&[2, 4, 1, 32], DType::F32)?;
        let (q, more) = (device.zeros(&[2, 64], DType::F32)?, device.zeros(&[3, 64], DType::F32)?);
        let lens = device.zeros(&[2], DType::I32)?;
        let (table, wrong) = (device.zeros(&[2, 2], DType::I32)?, device.zeros(&[3, 2], DType::I32)?);
        let kv = PagedKv { k_cache: &cache, v_cache: &cache, page_table: &table };
        let plan = device.zeros(&DecodePlan::new(&device, 2, 1).shape(), DType::I32)?;
        let says =
            |q, kv: &PagedKv<'_>, lens, plan| refusal(&device, |cx| attention_decode(cx, q, kv, lens, plan, 1.0));
        assert!(says(&more, &kv, &lens, &plan).contains("`q` [2, 64], got [3, 64]"));
        assert!(says(&q, &kv, &q, &plan).contains("`kv_lens` [B], got [2, 64]"));
        let other = PagedKv { page_table: &wrong, ..kv };
        assert!(says(&q, &other, &lens, &plan).contains("`page_table` [2, 2], got [3, 2]"));
        assert!(says(&q, &kv, &lens, &lens).contains("`plan` [8, 8], got [2]"));
        Ok(())
    }

    #[test]
    fn a_plan_of_other_lengths_is_refused() -> Result<()> {
        let device = Device::host();
        let cache = device.zeros(&[2, 4, 1, 64], DType::Bf16)?;
        let (q, lens) = (device.zeros(&[1, 64], DType::Bf16)?, device.tensor(&[1], &[3])?);
        let kv = PagedKv { k_cache: &cache, v_cache: &cache, page_table: &device.tensor(&[1, 1], &[0])? };
        let plan = device.zeros(&DecodePlan::new(&device, 1, 1).shape(), DType::I32)?;
        let mut runner = Runner::new(&device, RunnerOptions::default())?;
        let out = runner.eager(&(), |cx| attention_decode(cx, &q, &kv, &lens, &plan, 1.0));
        let error = out.and_then(|_| runner.synchronize()).expect_err("the plan has no tile");
        assert!(error.to_string().contains("a plan of other lengths"), "{error}");
        Ok(())
    }
}
