//! Latent attention of one query per sequence, absorbed: over the latents themselves.
//!
//! Two CUDA sources: `tiled.cu` for bf16 of the known widths, which reads each latent once for all heads of an
//! item; `portable.cu` for the rest.

mod host;

use bcg_runtime::{DType, Device, DevicePtr, Dims, Kernel, KernelArgs, OpStream, Result, Source, Tensor};

use super::latent_kv::{ATTEND_WARPS, LATENT_DIM_MAX, LatentKv, LatentKvArgs, ROPE_DIM_MAX};
use crate::arch::is_large;
use crate::attention::decode_plan::{self, BlockPlan, DecodePlan};
use crate::check::Check;
use crate::float::{PerFloat, per_float};
use host::{host, host_tiled};

static PORTABLE_SOURCE: Source = source!("latent/decode/portable.cu")
    .takes::<MlaDecodeArgs>()
    .define("ATTEND_WARPS", ATTEND_WARPS as usize)
    .define("LATENT_DIM_MAX", LATENT_DIM_MAX)
    .define("ROPE_DIM_MAX", ROPE_DIM_MAX);
static TILED_SOURCE: Source = source!("latent/decode/tiled.cu")
    .takes::<MlaDecodeArgs>()
    .takes::<BlockPlan>()
    .define("TILE_KEYS", decode_plan::TILE)
    .define("TILED_WARPS", TILED_WARPS)
    .define("STAGE_KEYS", STAGE_KEYS)
    .define("RING_STAGES", STAGES)
    .define("ITEM_HEADS", ITEM_HEADS);
pub(super) const SOURCES: &[&Source] = &[&PORTABLE_SOURCE, &TILED_SOURCE];

const CHECK: Check = Check::new("mla_decode");

/// Warps of a block of the tiled kernel, which share the columns of the latents.
const TILED_WARPS: usize = 4;
/// Query heads that a block of the tiled kernel takes together.
const ITEM_HEADS: usize = 16;
/// Keys of a stage of the tiled kernel's ring, and its stages.
const STAGE_KEYS: usize = 32;
const STAGES: usize = 3;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct MlaDecodeArgs {
    /// `[B H, L]`.
    q_latent: DevicePtr,
    /// `[B, H R]`.
    q_pe: DevicePtr,
    /// `[B H, L]`.
    out: DevicePtr,
    #[points_to(const i32)]
    kv_lens: DevicePtr,
    #[points_to(BlockPlan)]
    plan: DevicePtr,
    /// `[2 blocks, 16, L]`, then `[2 blocks, 16, 2]`: the largest score and the sum.
    #[points_to(f32)]
    partials: DevicePtr,
    kv: LatentKvArgs,
    sequences: u32,
    heads: u32,
    scale: f32,
    _padding: u32,
}

// SAFETY: `mla_decode` has checked the shapes when it launches, and the source indexes by these alone.
static MLA_DECODE: PerFloat<MlaDecodeArgs> = per_float!("mla_decode", PORTABLE_SOURCE, host).programmatic();

// SAFETY: as above.
static TILED_L512_R64: Kernel<MlaDecodeArgs> =
    unsafe { Kernel::new("mla_decode_l512_r64", &TILED_SOURCE, host_tiled) }.programmatic();
// SAFETY: as above.
static TILED_L64_R32: Kernel<MlaDecodeArgs> =
    unsafe { Kernel::new("mla_decode_l64_r32", &TILED_SOURCE, host_tiled) }.programmatic();

/// Attends with one query of each sequence and head to all keys of the sequence, which are its values too.
///
/// `out[b, h] = softmax(scale * (q_latent[b, h] · latent + q_pe[b, h] · rope_key)) · latent` over the `kv_lens[b]` keys in the
/// pages of sequence `b`, in f32, rounded once. A length of 0 (a padded row) gives zeros.
///
/// A sequence's keys are summed in stretches that the plan cuts, so the last bits of a row may depend on the lengths of
/// other sequences; padded rows change none.
///
/// # Shapes
/// - `q_latent`, `out`: `[B H, L]`, bf16, f16 or f32; L a multiple of 32 up to 512.   - `q_pe`: `[B, H R]`, same dtype; R
///   a multiple of 32 up to 128.   - `kv_lens`: `[B]` i32.
/// - `plan`: of a [`DecodePlan`] for H query heads and one key-value head, filled with the contents of `kv_lens`. The
///   kernel counts in it, and leaves it as it was.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes, addresses, `scale`. Read again at each replay: the contents of all tensors.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_kernels::{DecodePlan, LatentKv};
/// use bcg_runtime::{DType, Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// // One sequence of two keys in page 0, which a query of zeros sees alike.
/// let kv = LatentKv {
///     latents: &device.tensor(&[1, 2, 1, 32], &[[1.0f32; 32], [3.0; 32]].concat())?,
///     rope_keys: &device.zeros(&[1, 2, 1, 32], DType::F32)?,
///     page_table: &device.tensor(&[1, 1], &[0])?,
/// };
/// let (q_latent, q_pe) = (device.zeros(&[2, 32], DType::F32)?, device.zeros(&[1, 64], DType::F32)?);
/// let kv_lens = device.tensor(&[1], &[2])?;
/// let (decode_plan, mut values) = (DecodePlan::new(&device, 2, 1), vec![]);
/// decode_plan.fill(&[2], &mut values);
/// let plan = device.tensor(&decode_plan.shape(), &values)?;
/// let out = runner.eager(&(), |cx| bcg_kernels::mla_decode(cx, &q_latent, &q_pe, &kv, &kv_lens, &plan, 1.0))?;
/// assert_eq!(runner.read::<f32>(&out)?, [2.0; 64]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn mla_decode(
    cx: &mut OpStream,
    q_latent: &Tensor,
    q_pe: &Tensor,
    kv: &LatentKv<'_>,
    kv_lens: &Tensor,
    plan: &Tensor,
    scale: f32,
) -> Result<Tensor> {
    let dtype = q_latent.dtype();
    CHECK.rank("kv_lens", kv_lens, &["B"])?;
    let sequences = kv_lens.dim(0);
    CHECK.dense("kv_lens", kv_lens, &[sequences], DType::I32)?;
    CHECK.rank("q_latent", q_latent, &["B H", "L"])?;
    CHECK.rank("q_pe", q_pe, &["B", "H R"])?;
    let (latent_dim, rope_dim) = kv.check(CHECK, dtype, sequences)?;
    let heads = q_pe.dim(1) / rope_dim;
    CHECK.dense("q_latent", q_latent, &[sequences * heads, latent_dim], dtype)?;
    CHECK.dense("q_pe", q_pe, &[sequences, heads * rope_dim], dtype)?;
    CHECK.dense("plan", plan, &DecodePlan::new(cx.device(), heads.max(1), 1).shape(), DType::I32)?;
    let out = cx.empty(q_latent.shape(), dtype)?;
    let mut args = MlaDecodeArgs {
        q_latent: cx.addr(q_latent)?,
        q_pe: cx.addr(q_pe)?,
        out: cx.addr(&out)?,
        kv_lens: cx.addr(kv_lens)?,
        plan: cx.addr(plan)?,
        partials: DevicePtr::NULL,
        kv: kv.args(CHECK, cx)?,
        sequences: CHECK.u32("B", sequences)?,
        heads: CHECK.u32("H", heads)?,
        scale,
        _padding: 0,
    };
    let Some(kernel) = tiled(cx.device(), dtype, &args.kv) else {
        let dims = Dims::linear(CHECK.u32("B * H", sequences * heads)?, 32 * ATTEND_WARPS);
        cx.launch(MLA_DECODE.get(CHECK, "q_latent", dtype)?, dims, args)?;
        return Ok(out);
    };
    let blocks = plan.dim(0);
    // Two pieces of a block: of the item with which it begins, and of the one with which it ends.
    let partials = cx.empty(&[2 * blocks, ITEM_HEADS, latent_dim + 2], DType::F32)?;
    args.partials = cx.addr(&partials)?;
    let mut dims = Dims::linear(CHECK.u32("blocks", blocks)?, 32 * TILED_WARPS as u32);
    dims.shared_bytes = tiled_shared_bytes(latent_dim, rope_dim) as u32;
    cx.launch(kernel, dims, args)?;
    Ok(out)
}

/// Finds the tiled kernel, where there is one: it copies 16 bytes at a time, into more shared memory than small GPUs have.
fn tiled(device: &Device, dtype: DType, kv: &LatentKvArgs) -> Option<&'static Kernel<MlaDecodeArgs>> {
    let is_large = device.compute_capability().is_none_or(is_large);
    if dtype != DType::Bf16 || !is_large || !kv.is_in_words() {
        return None;
    }
    match (kv.latent_dim(), kv.rope_dim()) {
        (512, 64) => Some(&TILED_L512_R64),
        (64, 32) => Some(&TILED_L64_R32),
        _ => None,
    }
}

/// Shared memory of a block of the tiled kernel: the ring with a mask for each warp's keys, the weights of a stage and what
/// rounding leaves of them, two scores for each head, a flag.
const fn tiled_shared_bytes(latent_dim: usize, rope_dim: usize) -> usize {
    let ring = STAGES * (STAGE_KEYS * (latent_dim + rope_dim) * size_of::<u16>() + TILED_WARPS * size_of::<u32>());
    let weights = 2 * STAGE_KEYS * ITEM_HEADS * size_of::<u16>();
    ring + weights + 2 * ITEM_HEADS * size_of::<f32>() + 16
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::{Runner, RunnerOptions};

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let latents = device.zeros(&[2, 4, 1, 64], DType::F32)?;
        let rope_keys = device.zeros(&[2, 4, 1, 32], DType::F32)?;
        let page_table = device.zeros(&[2, 2], DType::I32)?;
        let kv = LatentKv { latents: &latents, rope_keys: &rope_keys, page_table: &page_table };
        let (q_latent, q_pe) = (device.zeros(&[6, 64], DType::F32)?, device.zeros(&[2, 96], DType::F32)?);
        let lens = device.zeros(&[2], DType::I32)?;
        let plan = device.zeros(&DecodePlan::new(&device, 3, 1).shape(), DType::I32)?;
        let says = |q_latent, q_pe, kv: &LatentKv<'_>, plan| {
            refusal(&device, |cx| mla_decode(cx, q_latent, q_pe, kv, &lens, plan, 1.0))
        };
        assert!(says(&q_pe, &q_pe, &kv, &plan).contains("`q_latent` [6, 64], got [2, 96]"));
        assert!(says(&q_latent, &q_latent, &kv, &plan).contains("`q_latent` [4, 64], got [6, 64]"));
        assert!(says(&q_latent, &q_pe, &kv, &lens).contains("`plan` [8, 8], got [2]"));
        let other = LatentKv { rope_keys: &latents, latents: &rope_keys, ..kv };
        assert!(says(&q_latent, &q_pe, &other, &plan).contains("`q_latent` [2, 32], got [6, 64]"));
        Ok(())
    }

    #[test]
    fn a_plan_of_other_lengths_is_refused() -> Result<()> {
        let device = Device::host();
        let kv = LatentKv {
            latents: &device.zeros(&[2, 4, 1, 64], DType::Bf16)?,
            rope_keys: &device.zeros(&[2, 4, 1, 32], DType::Bf16)?,
            page_table: &device.tensor(&[1, 1], &[0])?,
        };
        let (q_latent, q_pe) = (device.zeros(&[1, 64], DType::Bf16)?, device.zeros(&[1, 32], DType::Bf16)?);
        let lens = device.tensor(&[1], &[3])?;
        let plan = device.zeros(&DecodePlan::new(&device, 1, 1).shape(), DType::I32)?;
        let mut runner = Runner::new(&device, RunnerOptions::default())?;
        let out = runner.eager(&(), |cx| mla_decode(cx, &q_latent, &q_pe, &kv, &lens, &plan, 1.0));
        let error = out.and_then(|_| runner.synchronize()).expect_err("the plan has no tile");
        assert!(error.to_string().contains("a plan of other lengths"), "{error}");
        Ok(())
    }

    #[test]
    fn two_blocks_fit_on_a_multiprocessor() {
        // Of 228 KiB, 1 KiB of which goes to each block.
        assert!(2 * (tiled_shared_bytes(512, 64) + 1024) <= 228 << 10);
    }
}
