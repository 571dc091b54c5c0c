//! Query and key norm, rotary embedding, key-value write; CUDA source: `qk_norm_rope_kv_write.cu`.

mod host;

use bcg_runtime::{DType, DevicePtr, KernelArgs, OpStream, Result, Source, Tensor};

use super::paged_kv::{HEAD_DIM_MAX, check_caches};
use crate::check::Check;
use crate::float::{PerFloat, pack_len, per_float};
use host::host;

static SOURCE: Source = source!("attention/qk_norm_rope_kv_write/qk_norm_rope_kv_write.cu")
    .takes::<QkNormRopeKvWriteArgs>()
    .define("THREADS_MAX", THREADS_MAX)
    .define("HEAD_DIM_MAX", HEAD_DIM_MAX);
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("qk_norm_rope_kv_write");

/// The most threads of a block.
const THREADS_MAX: usize = 768;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct QkNormRopeKvWriteArgs {
    qkv: DevicePtr,
    q_weight: DevicePtr,
    k_weight: DevicePtr,
    #[points_to(const f32)]
    inv_freq: DevicePtr,
    #[points_to(const i32)]
    positions: DevicePtr,
    #[points_to(const i32)]
    slots: DevicePtr,
    q_out: DevicePtr,
    k_cache: DevicePtr,
    v_cache: DevicePtr,
    qkv_stride: i64,
    /// Elements from one page of a cache to the next.
    page_stride: i64,
    num_pages: i64,
    q_heads: u32,
    kv_heads: u32,
    head_dim: u32,
    page_size: u32,
    /// Lanes per head: the power of two from D / 2 / Pack::LEN on.
    group: u32,
    eps: f32,
}

// SAFETY: `qk_norm_rope_kv_write` has checked the shapes when it launches, and the source indexes by these alone.
static QK_NORM_ROPE_KV_WRITE: PerFloat<QkNormRopeKvWriteArgs> =
    per_float!("qk_norm_rope_kv_write", SOURCE, host).programmatic();

/// The inputs of [`qk_norm_rope_kv_write()`].
#[derive(Clone, Copy, Debug)]
pub struct QkNormRopeKvWrite<'a> {
    /// `[T, (Hq + 2 Hkv) D]`: the heads of the queries, the keys and the values; may be row-sliced.
    pub qkv: &'a Tensor,
    /// `[D]`: the weight of the queries' norm.
    pub q_weight: &'a Tensor,
    /// `[D]`: the weight of the keys' norm.
    pub k_weight: &'a Tensor,
    /// `[D / 2]` f32: the angle per position of each pair, from [`rope_inv_freq`].
    pub inv_freq: &'a Tensor,
    /// `[T]` i32: the position of each token in its sequence.
    pub positions: &'a Tensor,
    /// `[T]` i32: where each token's key and value go, `page * S + offset`; a negative slot writes nothing.
    pub slots: &'a Tensor,
    /// `[P, S, Hkv, D]`: the pages of keys.
    pub k_cache: &'a Tensor,
    /// `[P, S, Hkv, D]`: the pages of values.
    pub v_cache: &'a Tensor,
    /// Added to the mean square in both norms.
    pub eps: f32,
}

/// Returns the angle per position of each pair of a head: `theta^(-2 i / D)` for `i` in `0..D / 2`, in f32.
///
/// # Example
/// ```
/// assert_eq!(bcg_kernels::rope_inv_freq(100.0, 4), [1.0, 0.1]);
/// ```
pub fn rope_inv_freq(theta: f64, head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2).map(|i| (1.0 / theta.powf(2.0 * i as f64 / head_dim as f64)) as f32).collect()
}

/// Normalises and rotates the queries and keys of each token, and writes keys and values into their pages.
///
/// Per head: `n = rms_norm(head, weight)`, then, with `a = position * inv_freq[i]` in f32 and `h = D / 2`,
/// `out[i] = n[i] cos a - n[i + h] sin a`, `out[i + h] = n[i + h] cos a + n[i] sin a`, rounded once. Values are copied.
/// Returns the queries.
///
/// # Shapes
/// - As the fields of [`QkNormRopeKvWrite`] say; bf16, f16 or f32, one dtype for all but `inv_freq`; D a multiple of 32
///   up to 256.   - Returned: `[T, Hq D]`.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes, addresses, `eps`. Read again at each replay: the contents of all tensors, so
/// each replay has its own positions and slots.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_kernels::QkNormRopeKvWrite;
/// use bcg_runtime::{DType, Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let cache = || device.zeros(&[1, 4, 1, 32], DType::F32);
/// let (k_cache, v_cache) = (cache()?, cache()?);
/// let qkv = device.tensor(&[1, 96], &[2.0f32; 96])?;
/// let ones = device.tensor(&[32], &[1.0f32; 32])?;
/// let inv_freq = device.tensor(&[16], &bcg_kernels::rope_inv_freq(10_000.0, 32))?;
/// let (positions, slots) = (device.tensor(&[1], &[0])?, device.tensor(&[1], &[3])?);
/// let q = runner.eager(&(), |cx| {
///     bcg_kernels::qk_norm_rope_kv_write(
///         cx,
///         &QkNormRopeKvWrite {
///             qkv: &qkv,
///             q_weight: &ones,
///             k_weight: &ones,
///             inv_freq: &inv_freq,
///             positions: &positions,
///             slots: &slots,
///             k_cache: &k_cache,
///             v_cache: &v_cache,
///             eps: 0.0,
///         },
///     )
/// })?;
/// assert_eq!(runner.read::<f32>(&q)?, [1.0; 32]); // normalised; position 0 turns by nothing
/// let values = device.read::<f32>(&v_cache)?;
/// assert_eq!((values[95], values[96]), (0.0, 2.0)); // slot 3 begins at element 96
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn qk_norm_rope_kv_write(cx: &mut OpStream, input: &QkNormRopeKvWrite<'_>) -> Result<Tensor> {
    let (qkv, dtype) = (input.qkv, input.qkv.dtype());
    CHECK.rank("qkv", qkv, &["T", "(Hq + 2 Hkv) D"])?;
    check_caches(CHECK, input.k_cache, input.v_cache, dtype)?;
    let (page_size, kv_heads, head_dim) = (input.k_cache.dim(1), input.k_cache.dim(2), input.k_cache.dim(3));
    let (tokens, heads) = (qkv.dim(0), qkv.dim(1) / head_dim);
    if !qkv.dim(1).is_multiple_of(head_dim) || heads <= 2 * kv_heads {
        let expected = format!("`qkv` [T, (Hq + 2 * {kv_heads}) * {head_dim}]");
        return Err(CHECK.error(expected, format!("{:?}", qkv.shape())));
    }
    CHECK.dense("q_weight", input.q_weight, &[head_dim], dtype)?;
    CHECK.dense("k_weight", input.k_weight, &[head_dim], dtype)?;
    CHECK.dense("inv_freq", input.inv_freq, &[head_dim / 2], DType::F32)?;
    CHECK.dense("positions", input.positions, &[tokens], DType::I32)?;
    CHECK.dense("slots", input.slots, &[tokens], DType::I32)?;
    let kernel = QK_NORM_ROPE_KV_WRITE.get(CHECK, "qkv", dtype)?;
    let q_heads = heads - 2 * kv_heads;
    let group = (head_dim / 2 / pack_len(dtype)).next_power_of_two();
    let dims = CHECK.block_per_row(qkv, block_threads(tokens, heads, group))?;
    let q_out = cx.empty(&[tokens, q_heads * head_dim], dtype)?;
    let args = QkNormRopeKvWriteArgs {
        qkv: cx.addr(qkv)?,
        q_weight: cx.addr(input.q_weight)?,
        k_weight: cx.addr(input.k_weight)?,
        inv_freq: cx.addr(input.inv_freq)?,
        positions: cx.addr(input.positions)?,
        slots: cx.addr(input.slots)?,
        q_out: cx.addr(&q_out)?,
        k_cache: cx.addr(input.k_cache)?,
        v_cache: cx.addr(input.v_cache)?,
        qkv_stride: qkv.row_stride() as i64,
        page_stride: input.k_cache.row_stride() as i64,
        num_pages: input.k_cache.dim(0) as i64,
        q_heads: CHECK.u32("Hq", q_heads)?,
        kv_heads: CHECK.u32("Hkv", kv_heads)?,
        head_dim: CHECK.u32("D", head_dim)?,
        page_size: CHECK.u32("S", page_size)?,
        group: group as u32,
        eps: input.eps,
    };
    cx.launch(kernel, dims, args)?;
    Ok(q_out)
}

/// The threads of a token's block: `group` lanes for each head, in as few equal turns as registers allow. Where there are
/// tokens enough to fill the device, more blocks with a few turns each are faster.
fn block_threads(tokens: usize, heads: usize, group: usize) -> u32 {
    let threads_max = if tokens < 1024 { THREADS_MAX } else { 192 };
    let turns = (heads * group).div_ceil(threads_max);
    (heads.div_ceil(turns) * group).next_multiple_of(32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::Device;

    #[test]
    fn a_block_has_lanes_for_its_heads_and_fits() {
        assert_eq!(block_threads(1, 48, 8), 384, "one turn");
        assert_eq!(block_threads(1, 80, 16), 640, "two equal turns");
        assert_eq!(block_threads(1, 3, 2), 32, "whole warps");
        assert_eq!(block_threads(2048, 48, 8), 192, "two turns of many tokens");
        assert!((1..500).all(|heads| block_threads(1, heads, 32) <= 768));
    }

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let cache = device.zeros(&[2, 4, 1, 32], DType::F32)?;
        let odd_cache = device.zeros(&[2, 4, 1, 48], DType::F32)?;
        let (qkv, narrow) = (device.zeros(&[2, 128], DType::F32)?, device.zeros(&[2, 64], DType::F32)?);
        let (weight, inv_freq) = (device.zeros(&[32], DType::F32)?, device.zeros(&[16], DType::F32)?);
        let (two, three) = (device.zeros(&[2], DType::I32)?, device.zeros(&[3], DType::I32)?);
        let good = QkNormRopeKvWrite {
            qkv: &qkv,
            q_weight: &weight,
            k_weight: &weight,
            inv_freq: &inv_freq,
            positions: &two,
            slots: &two,
            k_cache: &cache,
            v_cache: &cache,
            eps: 0.0,
        };
        let says = |input: QkNormRopeKvWrite<'_>| refusal(&device, |cx| qk_norm_rope_kv_write(cx, &input));
        assert!(says(QkNormRopeKvWrite { qkv: &narrow, ..good }).contains("`qkv` [T, (Hq + 2 * 1) * 32]"));
        assert!(says(QkNormRopeKvWrite { slots: &three, ..good }).contains("`slots` [2], got [3]"));
        assert!(says(QkNormRopeKvWrite { inv_freq: &weight, ..good }).contains("`inv_freq` [16], got [32]"));
        assert!(says(QkNormRopeKvWrite { v_cache: &odd_cache, ..good }).contains("`v_cache` [2, 4, 1, 32]"));
        let odd = QkNormRopeKvWrite { k_cache: &odd_cache, v_cache: &odd_cache, ..good };
        assert!(says(odd).contains("D a multiple of 32 up to 256, got 48"));
        Ok(())
    }
}
