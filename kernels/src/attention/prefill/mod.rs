//! Causal attention of new tokens over paged keys and values; CUDA sources: `portable.cu` and, for bf16 of
//! head dim 64 and 128 on compute capability 9.0, `hopper.cu`.
//!
//! The work is cut on the host: an item of the plan is up to [`PLAN_ROWS`] rows of one sequence, and the items are sorted
//! by how many keys they read. A fixed number of thread blocks takes items and heads in turn, so the geometry of a launch
//! depends on nothing live, and the blocks still get equal shares.

mod host;

use std::cmp::Reverse;

use bcg_runtime::{Arch, DType, Device, DevicePtr, Dims, Kernel, KernelArgs, OpStream, Result, Source, Tensor};

use crate::arch::MAP_BYTES;
use crate::check::Check;
use crate::float::{PerFloat, per_float};
use host::host;

use super::paged_kv::{HEAD_DIM_MAX, PagedKv, PagedKvArgs};
pub(crate) use host::check_plan;

static HOPPER_SOURCE: Source = source!("attention/prefill/hopper.cu", "work.cuh")
    .takes::<AttentionPrefillArgs>()
    .define("PLAN_ROWS", PLAN_ROWS)
    .define("THREADS", HOPPER_THREADS as usize)
    .define("MAP_BYTES", MAP_BYTES)
    .define("RING_SLOTS", HOPPER_RING_SLOTS);
static PORTABLE_SOURCE: Source = source!("attention/prefill/portable.cu", "work.cuh")
    .takes::<AttentionPrefillArgs>()
    .define("PLAN_ROWS", PLAN_ROWS)
    .define("TILE_KEYS", TILE_KEYS)
    .define("WARPS", WARPS as usize)
    .define("HEAD_DIM_MAX", HEAD_DIM_MAX);
pub(super) const SOURCES: &[&Source] = &[&HOPPER_SOURCE, &PORTABLE_SOURCE];

const CHECK: Check = Check::new("attention_prefill");

/// Rows of an item of the plan.
const PLAN_ROWS: usize = 128;
/// Warps of a block of the portable kernels.
const WARPS: u32 = 8;
/// Threads of a block of the Hopper kernels: one warpgroup copies, two multiply.
const HOPPER_THREADS: u32 = 3 * 128;
/// Keys of a tile of the portable kernel.
const TILE_KEYS: usize = 64;
/// Tiles of keys and values that the ring of the Hopper kernel holds.
const HOPPER_RING_SLOTS: usize = 5;
/// Rows of queries, keys and values that a block of the portable tiled kernels keeps in shared memory.
const TILE_ROWS: usize = PLAN_ROWS + 4 * TILE_KEYS;
/// Tiles of 128 queries, keys or values that a block of the Hopper kernels keeps in shared memory.
const HOPPER_TILES: usize = 2 + HOPPER_RING_SLOTS;
/// What the tiled kernels keep in shared memory besides, at most: which keys are in the cache, and on Hopper a tensor map,
/// two items and barriers.
const SMALL_BYTES: u32 = 1024;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct AttentionPrefillArgs {
    q: DevicePtr,
    out: DevicePtr,
    #[points_to(const i32)]
    cu_seqlens_q: DevicePtr,
    #[points_to(const i32)]
    kv_lens: DevicePtr,
    #[points_to(const i32)]
    plan: DevicePtr,
    /// 128 bytes for each block of the Hopper kernels.
    #[points_to(u8)]
    maps: DevicePtr,
    kv: PagedKvArgs,
    q_stride: i64,
    rows: u32,
    sequences: u32,
    q_heads: u32,
    plan_items: u32,
    scale: f32,
    _padding: u32,
}

/// Any head dim and dtype, a warp for each row and head.
// SAFETY: `attention_prefill_to` has checked the shapes when it launches, and the source indexes by these alone.
static ATTENTION_PREFILL: PerFloat<AttentionPrefillArgs> =
    per_float!("attention_prefill", PORTABLE_SOURCE, host).programmatic();

/// Kernels on tensor cores, a block for 128 rows of a head.
macro_rules! tiled {
    ($name:literal, $source:ident, $dtype:ty) => {
        // SAFETY: the comment at the use of this macro names the checks.
        unsafe { Kernel::new($name, &$source, host::<$dtype>) }
    };
}

// SAFETY: as above.
static BF16_D64: Kernel<AttentionPrefillArgs> =
    tiled!("attention_prefill_bf16_d64", PORTABLE_SOURCE, half::bf16).programmatic();
// SAFETY: as above.
static BF16_D128: Kernel<AttentionPrefillArgs> =
    tiled!("attention_prefill_bf16_d128", PORTABLE_SOURCE, half::bf16).programmatic();
// SAFETY: as above.
static F16_D64: Kernel<AttentionPrefillArgs> =
    tiled!("attention_prefill_f16_d64", PORTABLE_SOURCE, half::f16).programmatic();
// SAFETY: as above.
static F16_D128: Kernel<AttentionPrefillArgs> =
    tiled!("attention_prefill_f16_d128", PORTABLE_SOURCE, half::f16).programmatic();
// SAFETY: as above.
static HOPPER_D64: Kernel<AttentionPrefillArgs> =
    tiled!("attention_prefill_hopper_d64", HOPPER_SOURCE, half::bf16).programmatic();
// SAFETY: as above.
static HOPPER_D128: Kernel<AttentionPrefillArgs> =
    tiled!("attention_prefill_hopper_d128", HOPPER_SOURCE, half::bf16).programmatic();

/// Writes the plan of a batch for [`attention_prefill`]: `[count, sequence, first row, sequence, first row, …]`.
///
/// An item is up to 128 rows of one sequence from its first row on; the items with the most keys come first. `plan` is
/// cleared, and grows to at most [`attention_prefill_plan_len`] numbers.
///
/// # Panics
/// If there is not one start more than lengths.
///
/// # Example
/// ```
/// use bcg_kernels::attention_prefill_plan;
///
/// let mut plan = vec![];
/// // Sequence 0 has 130 new tokens, sequence 1 has 3 after a prefix of 200.
/// attention_prefill_plan(&[0, 130, 133], &[130, 203], &mut plan);
/// assert_eq!(plan, [3, 1, 130, 0, 128, 0, 0]);
/// ```
pub fn attention_prefill_plan(cu_seqlens_q: &[i32], kv_lens: &[i32], plan: &mut Vec<i32>) {
    assert_eq!(cu_seqlens_q.len(), kv_lens.len() + 1, "a start for each sequence and the end of the last one");
    plan.clear();
    plan.push(0);
    for (b, starts) in cu_seqlens_q.windows(2).enumerate() {
        plan.extend((starts[0]..starts[1]).step_by(PLAN_ROWS).flat_map(|row| [b as i32, row]));
    }
    let keys = |[b, row]: [i32; 2]| {
        let end = cu_seqlens_q[b as usize + 1];
        kv_lens[b as usize] - end + end.min(row + PLAN_ROWS as i32)
    };
    let (items, _) = plan[1..].as_chunks_mut::<2>();
    items.sort_unstable_by_key(|item| (Reverse(keys(*item)), *item));
    plan[0] = items.len() as i32;
}

/// The most numbers that [`attention_prefill_plan`] writes for a batch of up to `rows` rows and `sequences` sequences.
pub fn attention_prefill_plan_len(rows: usize, sequences: usize) -> usize {
    1 + 2 * (rows / PLAN_ROWS + sequences)
}

/// Attends with the new tokens of each sequence to its prefix and, causally, to themselves.
///
/// The rows `cu_seqlens_q[b]..cu_seqlens_q[b + 1]` are the last tokens of sequence `b`, whose `kv_lens[b]` keys and
/// values, new ones included, are in its pages. `out[t] = softmax(scale * q[t] · k) · v` over the keys up to the row's
/// own position, in f32, rounded once (on tensor cores the weights, each at most 1, are rounded too); query head `h` reads
/// key-value head `h / (Hq / Hkv)`. Rows that belong to no sequence (padding) are left as they are.
///
/// A launch is the same for all batches whose tensors have the same addresses and shapes: sequences without rows and keys,
/// and a plan longer than its items, are as if they were not there.
///
/// # Shapes
/// - `q`, `out`: `[T, Hq D]`, bf16, f16 or f32; `q` may be row-sliced. D is a multiple of 32 up to 256.
/// - `cu_seqlens_q`: `[B + 1]` i32, not descending.   - `kv_lens`: `[B]` i32.
/// - `plan`: `[1 + 2 items]` i32 or longer, from [`attention_prefill_plan`]: it must cover each row of a sequence once.
///
/// # Capture
/// Meant for breaks, whose batch is live. Enqueues one kernel. Frozen: shapes, addresses, `scale`. Read again at each
/// replay: the contents of all tensors.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs, or `scale` is not above 0; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_kernels::PagedKv;
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// // One sequence of two tokens in page 1; the first value is all 1, the second all 3.
/// let pages = |values: [f32; 4]| device.tensor(&[2, 2, 1, 32], &values.map(|v| [v; 32]).concat());
/// let kv = PagedKv {
///     k_cache: &pages([9.0, 9.0, 0.0, 0.0])?,
///     v_cache: &pages([9.0, 9.0, 1.0, 3.0])?,
///     page_table: &device.tensor(&[1, 1], &[1])?,
/// };
/// let q = device.tensor(&[2, 32], &[1.0f32; 64])?;
/// let (cu_seqlens_q, kv_lens) = (device.tensor(&[2], &[0, 2])?, device.tensor(&[1], &[2])?);
/// let mut plan = vec![];
/// bcg_kernels::attention_prefill_plan(&[0, 2], &[2], &mut plan);
/// let plan = device.tensor(&[plan.len()], &plan)?;
/// let out = runner.eager(&(), |cx| bcg_kernels::attention_prefill(cx, &q, &kv, &cu_seqlens_q, &kv_lens, &plan, 1.0))?;
/// let out = runner.read::<f32>(&out)?;
/// assert_eq!((out[0], out[32]), (1.0, 2.0)); // the first token sees itself, the second both
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn attention_prefill(
    cx: &mut OpStream,
    q: &Tensor,
    kv: &PagedKv<'_>,
    cu_seqlens_q: &Tensor,
    kv_lens: &Tensor,
    plan: &Tensor,
    scale: f32,
) -> Result<Tensor> {
    let out = cx.empty(q.shape(), q.dtype())?;
    attention_prefill_to(cx, &out, &AttentionPrefill { q, kv, cu_seqlens_q, kv_lens, plan, scale })?;
    Ok(out)
}

/// What [`attention_prefill`] takes.
#[derive(Clone, Copy, Debug)]
pub struct AttentionPrefill<'a> {
    /// `[T, Hq D]`.
    pub q: &'a Tensor,
    /// The keys and values.
    pub kv: &'a PagedKv<'a>,
    /// `[B + 1]` i32. Rows before the first start belong to no sequence.
    pub cu_seqlens_q: &'a Tensor,
    /// `[B]` i32.
    pub kv_lens: &'a Tensor,
    /// From [`attention_prefill_plan`].
    pub plan: &'a Tensor,
    /// Above 0.
    pub scale: f32,
}

/// As [`attention_prefill`], into `out`, which is contiguous and has the shape of `q`.
///
/// # Errors
/// As [`attention_prefill`].
pub fn attention_prefill_to(cx: &mut OpStream, out: &Tensor, input: &AttentionPrefill<'_>) -> Result<()> {
    let AttentionPrefill { q, kv, cu_seqlens_q, kv_lens, plan, scale } = *input;
    CHECK.rank("kv_lens", kv_lens, &["B"])?;
    let sequences = kv_lens.dim(0);
    CHECK.dense("kv_lens", kv_lens, &[sequences], DType::I32)?;
    CHECK.dense("cu_seqlens_q", cu_seqlens_q, &[sequences + 1], DType::I32)?;
    CHECK.rank("plan", plan, &["1 + 2 items"])?;
    CHECK.dense("plan", plan, &[plan.dim(0).max(1)], DType::I32)?;
    if scale.is_nan() || scale <= 0.0 {
        return Err(CHECK.error("`scale` above 0", scale));
    }
    let q_heads = kv.check(CHECK, q, sequences)?;
    CHECK.dense("out", out, q.shape(), q.dtype())?;
    // The Hopper kernels keep a tensor map for each block here.
    let maps = cx.empty(&[cx.device().num_multiprocessors() as usize, MAP_BYTES / 4], DType::I32)?;
    let args = AttentionPrefillArgs {
        q: cx.addr(q)?,
        out: cx.addr(out)?,
        cu_seqlens_q: cx.addr(cu_seqlens_q)?,
        kv_lens: cx.addr(kv_lens)?,
        plan: cx.addr(plan)?,
        maps: cx.addr(&maps)?,
        kv: kv.args(CHECK, cx)?,
        q_stride: q.row_stride() as i64,
        rows: CHECK.u32("T", q.dim(0))?,
        sequences: CHECK.u32("B", sequences)?,
        q_heads: CHECK.u32("Hq", q_heads)?,
        plan_items: CHECK.u32("items", (plan.dim(0) - 1) / 2)?,
        scale,
        _padding: 0,
    };
    let (kernel, dims) = choose(cx.device(), q.dtype(), &args)?;
    cx.launch(kernel, dims, args)
}

impl AttentionPrefillArgs {
    /// Tells whether the tiled kernels can address everything: in 16-byte words, of which they count up to 2³².
    fn is_in_words(&self) -> bool {
        let words = |rows: i64, stride: i64| stride % 8 == 0 && rows * stride / 8 < i64::from(u32::MAX);
        [self.q, self.out, self.kv.k, self.kv.v].iter().all(|tensor| tensor.as_u64() % 16 == 0)
            && words(self.rows.into(), self.q_stride)
            && words(self.kv.num_pages, self.kv.page_stride)
    }
}

/// Chooses the kernel for a dtype, a head dim and a device, with its geometry.
fn choose(
    device: &Device,
    dtype: DType,
    args: &AttentionPrefillArgs,
) -> Result<(&'static Kernel<AttentionPrefillArgs>, Dims)> {
    let head_dim = args.kv.head_dim();
    let is_hopper = is_hopper(device);
    let kernel = match (dtype, head_dim) {
        _ if !args.is_in_words() => None,
        (DType::Bf16, 64) => Some(if is_hopper { &HOPPER_D64 } else { &BF16_D64 }),
        (DType::Bf16, 128) => Some(if is_hopper { &HOPPER_D128 } else { &BF16_D128 }),
        (DType::F16, 64) => Some(&F16_D64),
        (DType::F16, 128) => Some(&F16_D128),
        _ => None,
    };
    let blocks = |per_multiprocessor: u32| [per_multiprocessor * device.num_multiprocessors(), 1, 1];
    let shared_bytes = |rows: usize| (rows * head_dim * 2) as u32 + SMALL_BYTES;
    Ok(match kernel {
        None => {
            let dims = Dims { grid: blocks(8), block: [32 * WARPS, 1, 1], shared_bytes: 0 };
            (ATTENTION_PREFILL.get(CHECK, "q", dtype)?, dims)
        }
        Some(kernel) if is_hopper && dtype == DType::Bf16 => {
            let shared_bytes = shared_bytes(HOPPER_TILES * PLAN_ROWS);
            (kernel, Dims { grid: blocks(1), block: [HOPPER_THREADS, 1, 1], shared_bytes })
        }
        Some(kernel) => {
            let shared_bytes = shared_bytes(TILE_ROWS);
            (kernel, Dims { grid: blocks(2), block: [32 * WARPS, 1, 1], shared_bytes })
        }
    })
}

fn is_hopper(device: &Device) -> bool {
    device.compute_capability() == Some(Arch::new(9, 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::Device;

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let cache = device.zeros(&[2, 4, 2, 32], DType::F32)?;
        let q = device.zeros(&[3, 96], DType::F32)?;
        let page_table = device.zeros(&[1, 2], DType::I32)?;
        let (one, two) = (device.zeros(&[1], DType::I32)?, device.zeros(&[2], DType::I32)?);
        let kv = PagedKv { k_cache: &cache, v_cache: &cache, page_table: &page_table };
        let says =
            |starts, lens, scale| refusal(&device, |cx| attention_prefill(cx, &q, &kv, starts, lens, &one, scale));
        assert!(says(&one, &one, 1.0).contains("`cu_seqlens_q` [2], got [1]"));
        assert!(says(&two, &one, 1.0).contains("`q` [T, Hq * 32] with Hq a multiple of 2, got [3, 96]"));
        assert!(says(&two, &one, 0.0).contains("`scale` above 0, got 0"));
        Ok(())
    }

    #[test]
    fn the_plan_covers_each_row_once_with_the_longest_items_first() {
        let starts = [0, 300, 300, 301, 429];
        let kv_lens = [300, 7, 1000, 128];
        let mut plan = vec![9; 99];
        attention_prefill_plan(&starts, &kv_lens, &mut plan);
        assert_eq!(plan, [5, 2, 300, 0, 256, 0, 128, 0, 0, 3, 301]);
        assert!(plan.len() <= attention_prefill_plan_len(429, 4));
        check_plan(CHECK, &plan, &starts).expect("the plan of the batch");
        plan[1] = 1;
        assert!(check_plan(CHECK, &plan, &starts).is_err());
    }

    #[test]
    fn the_longest_plan_of_a_batch_fits() {
        let mut plan = vec![];
        for sequences in 1..9 {
            // One row over a whole item each.
            let starts: Vec<i32> = (0..=sequences).map(|b| b * (PLAN_ROWS as i32 + 1)).collect();
            attention_prefill_plan(&starts, &vec![500; sequences as usize], &mut plan);
            assert!(plan.len() <= attention_prefill_plan_len(*starts.last().unwrap() as usize, sequences as usize));
        }
    }
}
