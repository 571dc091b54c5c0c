//! Causal latent attention of new tokens over paged latents.
//!
//! Two CUDA sources: `tiled.cu` for bf16 of the known widths, on tensor cores, and `portable.cu` for the rest.
//!
//! The tiled kernel turns latents back into keys and values, in a workspace, and attends to those: for long prompts that
//! is a third of the work of attending to latents. The keys of all heads do not fit into any workspace, so it goes in
//! rounds: some sequences and heads are decompressed, then attended with. How many rounds there are depends on the
//! batch, so they lie inside the kernel, whose blocks wait for each other between the steps; all of them are on the
//! device at once. Its launch depends on capacities alone.

mod host;

use bcg_runtime::{DType, Device, DevicePtr, Dims, Kernel, KernelArgs, OpStream, Result, Source, Tensor};
use half::bf16;

use super::latent_kv::{ATTEND_WARPS, LATENT_DIM_MAX, LatentKv, LatentKvArgs, ROPE_DIM_MAX};
use crate::arch::is_large;
use crate::check::Check;
use crate::float::{PerFloat, per_float};
use host::host;

static PORTABLE_SOURCE: Source = source!("latent/prefill/portable.cu", "mla_prefill.cuh")
    .takes::<MlaPrefillArgs>()
    .define("ATTEND_WARPS", ATTEND_WARPS as usize)
    .define("LATENT_DIM_MAX", LATENT_DIM_MAX)
    .define("ROPE_DIM_MAX", ROPE_DIM_MAX)
    .define("PLAN_ROWS", TILE_ROWS);
static TILED_SOURCE: Source = source!("latent/prefill/tiled.cu", "mla_prefill.cuh")
    .takes::<MlaPrefillArgs>()
    .define("ATTEND_WARPS", ATTEND_WARPS as usize)
    .define("LATENT_DIM_MAX", LATENT_DIM_MAX)
    .define("ROPE_DIM_MAX", ROPE_DIM_MAX)
    .define("PLAN_ROWS", TILE_ROWS)
    .define("WARPS", WARPS as usize)
    .define("WORKSPACE_TILE", WORKSPACE_TILE)
    .define("TILE_KEYS", TILE_KEYS)
    .define("STAGES", STAGES)
    .define("STAGE_COLUMNS", STAGE_COLUMNS);
pub(super) const SOURCES: &[&Source] = &[&PORTABLE_SOURCE, &TILED_SOURCE];

const CHECK: Check = Check::new("mla_prefill");

/// Sequences begin at multiples of this many rows of the workspace.
const WORKSPACE_TILE: usize = 128;
/// Warps of a block of the tiled kernel.
const WARPS: u32 = 8;
/// Query rows of a block of the tiled kernel, and keys of a tile.
const TILE_ROWS: usize = 128;
const TILE_KEYS: usize = 64;
/// Rows of latents and of the projection in a stage of the decompression, their columns, and the stages.
const STAGE_ROWS: usize = 2 * 128;
const STAGE_COLUMNS: usize = 64;
const STAGES: usize = 3;
/// What a block of the tiled kernel may have of shared memory.
const SHARED_BYTES_MAX: usize = 160 << 10;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct MlaPrefillArgs {
    /// `[T, H (Dn + R)]`.
    q: DevicePtr,
    /// `[T, H R]`.
    q_pe: DevicePtr,
    /// `[H, Dn + Dv, L]`.
    weight: DevicePtr,
    /// `[T, H Dv]`.
    out: DevicePtr,
    #[points_to(const i32)]
    cu_seqlens_q: DevicePtr,
    #[points_to(const i32)]
    kv_lens: DevicePtr,
    #[points_to(const i32)]
    plan: DevicePtr,
    /// `[workspace_rows, Dn + Dv]`: keys and values of some sequences and heads.
    workspace: DevicePtr,
    /// 0 before the launch.
    #[points_to(u32)]
    arrivals: DevicePtr,
    kv: LatentKvArgs,
    q_stride: i64,
    rows: u32,
    sequences: u32,
    heads: u32,
    plan_items: u32,
    nope_dim: u32,
    value_dim: u32,
    workspace_rows: u32,
    scale: f32,
}

// SAFETY: `mla_prefill` has checked the shapes when it launches, and the source indexes by these alone.
static MLA_PREFILL: PerFloat<MlaPrefillArgs> = per_float!("mla_prefill", PORTABLE_SOURCE, host).programmatic();

// SAFETY: as above.
static TILED_L512_D128: Kernel<MlaPrefillArgs> =
    unsafe { Kernel::new("mla_prefill_l512_d128", &TILED_SOURCE, host::<bf16>) }.programmatic();
// SAFETY: as above.
static TILED_L64_D32: Kernel<MlaPrefillArgs> =
    unsafe { Kernel::new("mla_prefill_l64_d32", &TILED_SOURCE, host::<bf16>) }.programmatic();

/// The inputs of [`mla_prefill()`].
#[derive(Clone, Copy, Debug)]
pub struct MlaPrefill<'a> {
    /// `[T, H (Dn + R)]`: each head's query, of which the first Dn elements are read; may be row-sliced.
    pub q: &'a Tensor,
    /// `[T, H R]`: the rotated parts of the queries, from [`mla_kv_write`](crate::mla_kv_write()).
    pub q_pe: &'a Tensor,
    /// `[H, Dn + Dv, L]`: turns latents into each head's keys and values.
    pub kv_b_proj: &'a Tensor,
    /// The latents and rope keys of all sequences, new tokens included.
    pub kv: LatentKv<'a>,
    /// `[B + 1]` i32, from 0 on, not descending: the first row of each sequence, and the end of the last one.
    pub cu_seqlens_q: &'a Tensor,
    /// `[B]` i32: keys of each sequence, new tokens included.
    pub kv_lens: &'a Tensor,
    /// `[1 + 2 items]` i32 or longer, from [`attention_prefill_plan`](crate::attention_prefill_plan).
    pub plan: &'a Tensor,
    /// The factor of the scores, above 0.
    pub scale: f32,
    /// Bytes of the arena that decompressed keys and values get at most; more if the longest possible sequence needs it for
    /// one head. It changes no bit.
    pub workspace_bytes: usize,
}

/// Attends with the new tokens of each sequence to its prefix and, causally, to themselves.
///
/// Key and value `j` of head `h` are the first Dn and the last Dv elements of `kv_b_proj[h] · latents[j]`, rounded to the
/// dtype. `out[t, h] = softmax(scale * (q[t, h, ..Dn] · key + q_pe[t, h] · rope_key)) · value` over the keys up to the row's
/// own position, in f32, rounded once (on tensor cores the weights, each at most 1, are rounded too; elsewhere keys and
/// values are not). Rows that belong to no sequence (padding) are left as they are.
///
/// The launches are the same for all batches whose tensors have the same addresses and shapes: sequences without rows and
/// keys, and a plan longer than its items, are as if they were not there.
///
/// # Shapes
/// - As the fields of [`MlaPrefill`] say; bf16, f16 or f32. L is a multiple of 32 up to 512, R up to 128.
/// - Returned: `[T, H Dv]`.
///
/// # Capture
/// Meant for breaks, whose batch is live. Enqueues one kernel, and a fill before it. Frozen: shapes, addresses, `scale`.
/// Read again at each replay: the contents of all tensors.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs, or `scale` is not above 0; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_kernels::{LatentKv, MlaPrefill};
/// use bcg_runtime::{DType, Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// // One sequence of two tokens; keys are zeros, the value is the latent's sum.
/// let mut kv_b_proj = vec![0.0f32; 33 * 32];
/// kv_b_proj[32 * 32..].fill(1.0);
/// let mut plan = vec![];
/// bcg_kernels::attention_prefill_plan(&[0, 2], &[2], &mut plan);
/// let input = MlaPrefill {
///     q: &device.zeros(&[2, 64], DType::F32)?,
///     q_pe: &device.zeros(&[2, 32], DType::F32)?,
///     kv_b_proj: &device.tensor(&[1, 33, 32], &kv_b_proj)?,
///     kv: LatentKv {
///         latents: &device.tensor(&[1, 2, 1, 32], &[[1.0f32; 32], [3.0; 32]].concat())?,
///         rope_keys: &device.zeros(&[1, 2, 1, 32], DType::F32)?,
///         page_table: &device.tensor(&[1, 1], &[0])?,
///     },
///     cu_seqlens_q: &device.tensor(&[2], &[0, 2])?,
///     kv_lens: &device.tensor(&[1], &[2])?,
///     plan: &device.tensor(&[plan.len()], &plan)?,
///     scale: 1.0,
///     workspace_bytes: 1 << 20,
/// };
/// let out = runner.eager(&(), |cx| bcg_kernels::mla_prefill(cx, &input))?;
/// assert_eq!(runner.read::<f32>(&out)?, [32.0, 64.0]); // the first token sees itself, the second both
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn mla_prefill(cx: &mut OpStream, input: &MlaPrefill<'_>) -> Result<Tensor> {
    let (q, dtype, weight) = (input.q, input.q.dtype(), input.kv_b_proj);
    let sequences = check_batch(input)?;
    let (latent_dim, rope_dim) = input.kv.check(CHECK, dtype, sequences)?;
    CHECK.rank("q", q, &["T", "H (Dn + R)"])?;
    CHECK.rank("kv_b_proj", weight, &["H", "Dn + Dv", "L"])?;
    let (tokens, heads) = (q.dim(0), weight.dim(0).max(1));
    let head_dim = q.dim(1) / heads;
    CHECK.shape("q", q, &[tokens, heads * head_dim])?;
    let nope_dim = head_dim.saturating_sub(rope_dim);
    let value_dim = weight.dim(1).saturating_sub(nope_dim);
    if nope_dim == 0 || value_dim == 0 {
        let expected = format!("Dn and Dv above 0 with R {rope_dim}");
        return Err(CHECK.error(expected, format!("`q` {:?}, `kv_b_proj` {:?}", q.shape(), weight.shape())));
    }
    CHECK.dense("kv_b_proj", weight, &[heads, nope_dim + value_dim, latent_dim], dtype)?;
    CHECK.dense("q_pe", input.q_pe, &[tokens, heads * rope_dim], dtype)?;
    let out = cx.empty(&[tokens, heads * value_dim], dtype)?;
    let mut args = MlaPrefillArgs {
        q: cx.addr(q)?,
        q_pe: cx.addr(input.q_pe)?,
        weight: cx.addr(weight)?,
        out: cx.addr(&out)?,
        cu_seqlens_q: cx.addr(input.cu_seqlens_q)?,
        kv_lens: cx.addr(input.kv_lens)?,
        plan: cx.addr(input.plan)?,
        workspace: DevicePtr::NULL,
        arrivals: DevicePtr::NULL,
        kv: input.kv.args(CHECK, cx)?,
        q_stride: q.row_stride() as i64,
        rows: CHECK.u32("T", tokens)?,
        sequences: CHECK.u32("B", sequences)?,
        heads: CHECK.u32("H", heads)?,
        plan_items: CHECK.u32("items", (input.plan.dim(0) - 1) / 2)?,
        nope_dim: CHECK.u32("Dn", nope_dim)?,
        value_dim: CHECK.u32("Dv", value_dim)?,
        workspace_rows: 0,
        scale: input.scale,
    };
    let Some(kernel) = tiled(cx.device(), dtype, &args) else {
        let dims = Dims::linear(8 * cx.device().num_multiprocessors(), 32 * ATTEND_WARPS);
        cx.launch(MLA_PREFILL.get(CHECK, "q", dtype)?, dims, args)?;
        return Ok(out);
    };
    let workspace_rows = workspace_rows(input, nope_dim + value_dim);
    let workspace = cx.empty(&[workspace_rows, nope_dim + value_dim], dtype)?;
    let arrivals = cx.empty(&[1], DType::I32)?;
    cx.fill_zero(&arrivals)?;
    args.workspace = cx.addr(&workspace)?;
    args.arrivals = cx.addr(&arrivals)?;
    args.workspace_rows = CHECK.u32("rows of the workspace", workspace_rows)?;
    let mut dims = Dims::linear(cx.device().num_multiprocessors(), 32 * WARPS);
    dims.shared_bytes = args.shared_bytes() as u32;
    cx.launch(kernel, dims, args)?;
    Ok(out)
}

/// Checks what describes the batch; returns its sequences.
fn check_batch(input: &MlaPrefill<'_>) -> Result<usize> {
    CHECK.rank("kv_lens", input.kv_lens, &["B"])?;
    let sequences = input.kv_lens.dim(0);
    CHECK.dense("kv_lens", input.kv_lens, &[sequences], DType::I32)?;
    CHECK.dense("cu_seqlens_q", input.cu_seqlens_q, &[sequences + 1], DType::I32)?;
    CHECK.rank("plan", input.plan, &["1 + 2 items"])?;
    CHECK.dense("plan", input.plan, &[input.plan.dim(0).max(1)], DType::I32)?;
    if input.scale.is_nan() || input.scale <= 0.0 {
        return Err(CHECK.error("`scale` above 0", input.scale));
    }
    Ok(sequences)
}

/// Rows of the workspace: what all heads need of a full cache, within the budget; but no less than the longest sequence
/// needs for one head.
fn workspace_rows(input: &MlaPrefill<'_>, width: usize) -> usize {
    let LatentKv { latents, page_table, .. } = input.kv;
    let page_size = latents.dim(1);
    let longest = (page_table.dim(1) * page_size).next_multiple_of(WORKSPACE_TILE);
    let rows_of_head = latents.dim(0) * page_size + page_table.dim(0) * WORKSPACE_TILE;
    let all = input.kv_b_proj.dim(0).saturating_mul(rows_of_head);
    all.min(input.workspace_bytes / (width * size_of::<bf16>())).max(longest)
}

impl MlaPrefillArgs {
    /// Tells whether the tiled kernel can copy everything in 16-byte words.
    fn is_in_words(&self) -> bool {
        let tensors = [self.q, self.q_pe, self.weight, self.out];
        self.kv.is_in_words()
            && self.q_stride % 8 == 0
            && tensors.iter().all(|tensor| tensor.as_u64().is_multiple_of(16))
    }

    /// Shared memory of a block of the tiled kernel: the larger of what its two steps need; then where each sequence
    /// begins in the workspace, and which of two tiles' keys are in the cache.
    fn shared_bytes(&self) -> usize {
        let row = |elements: usize| (elements + 8) * size_of::<bf16>();
        let (nope, rope, value) = (self.nope_dim as usize, self.kv.rope_dim(), self.value_dim as usize);
        let attention = TILE_ROWS * row(nope + rope) + 2 * TILE_KEYS * (row(nope + rope) + row(value));
        let decompression = STAGES * STAGE_ROWS * row(STAGE_COLUMNS);
        attention.max(decompression) + (self.sequences as usize + 1).next_multiple_of(4) * size_of::<u32>() + 16
    }
}

/// Finds the tiled kernel, where there is one.
fn tiled(device: &Device, dtype: DType, a: &MlaPrefillArgs) -> Option<&'static Kernel<MlaPrefillArgs>> {
    let is_large = device.compute_capability().is_none_or(is_large);
    if dtype != DType::Bf16 || !is_large || !a.is_in_words() || a.shared_bytes() > SHARED_BYTES_MAX {
        return None;
    }
    match (a.kv.latent_dim(), a.kv.rope_dim(), a.nope_dim, a.value_dim) {
        (512, 64, 128, 128) => Some(&TILED_L512_D128),
        (64, 32, 32, 32) => Some(&TILED_L64_D32),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let (latents, rope_keys) =
            (device.zeros(&[2, 4, 1, 64], DType::F32)?, device.zeros(&[2, 4, 1, 32], DType::F32)?);
        let page_table = device.zeros(&[1, 2], DType::I32)?;
        let (q, q_pe) = (device.zeros(&[3, 128], DType::F32)?, device.zeros(&[3, 64], DType::F32)?);
        let (weight, narrow) = (device.zeros(&[2, 64, 64], DType::F32)?, device.zeros(&[2, 32, 64], DType::F32)?);
        let (one, two) = (device.zeros(&[1], DType::I32)?, device.zeros(&[2], DType::I32)?);
        let good = MlaPrefill {
            q: &q,
            q_pe: &q_pe,
            kv_b_proj: &weight,
            kv: LatentKv { latents: &latents, rope_keys: &rope_keys, page_table: &page_table },
            cu_seqlens_q: &two,
            kv_lens: &one,
            plan: &one,
            scale: 1.0,
            workspace_bytes: 0,
        };
        let says = |input: MlaPrefill<'_>| refusal(&device, |cx| mla_prefill(cx, &input));
        assert!(says(MlaPrefill { cu_seqlens_q: &one, ..good }).contains("`cu_seqlens_q` [2], got [1]"));
        assert!(says(MlaPrefill { q_pe: &q, ..good }).contains("`q_pe` [3, 64], got [3, 128]"));
        assert!(says(MlaPrefill { kv_b_proj: &narrow, ..good }).contains("Dn and Dv above 0 with R 32"));
        assert!(says(MlaPrefill { scale: 0.0, ..good }).contains("`scale` above 0, got 0"));
        Ok(())
    }

    #[test]
    fn the_workspace_holds_the_longest_sequence_and_keeps_to_its_budget() -> Result<()> {
        let device = Device::host();
        let (latents, table) = (device.zeros(&[600, 16, 1, 64], DType::Bf16)?, device.zeros(&[2, 9], DType::I32)?);
        let (weight, any) = (device.zeros(&[4, 64, 64], DType::Bf16)?, &table);
        let input = MlaPrefill {
            q: any,
            q_pe: any,
            kv_b_proj: &weight,
            kv: LatentKv { latents: &latents, rope_keys: any, page_table: &table },
            cu_seqlens_q: any,
            kv_lens: any,
            plan: any,
            scale: 1.0,
            workspace_bytes: 128 << 20,
        };
        assert_eq!(workspace_rows(&input, 64), 4 * (9600 + 256));
        assert_eq!(workspace_rows(&MlaPrefill { workspace_bytes: 1 << 20, ..input }, 256), 2048);
        assert_eq!(workspace_rows(&MlaPrefill { workspace_bytes: 0, ..input }, 256), 256);
        Ok(())
    }
}
