//! Causal attention of new tokens over paged keys and values; CUDA source: `kernels/src/attention_prefill.cu`.

use bcg_runtime::{CaptureStream, DType, DevicePtr, Dims, HostMemory, Result, Tensor};
use bytemuck::{AnyBitPattern, NoUninit};

use super::check::Check;
use super::float::{Float, PerFloat, extend_f32, per_float, row};
use super::paged_kv::{PagedKv, PagedKvArgs};

const CHECK: Check = Check::new("attention_prefill");

#[repr(C)]
#[derive(Clone, Copy, NoUninit, AnyBitPattern)]
struct AttentionPrefillArgs {
    q: DevicePtr,
    out: DevicePtr,
    cu_seqlens_q: DevicePtr,
    kv_lens: DevicePtr,
    kv: PagedKvArgs,
    q_stride: i64,
    rows: u32,
    sequences: u32,
    q_heads: u32,
    scale: f32,
}

static ATTENTION_PREFILL: PerFloat<AttentionPrefillArgs> =
    per_float!("attention_prefill", bcg_kernels::ATTENTION_PREFILL, host);

/// Attends with the new tokens of each sequence to its prefix and, causally, to themselves.
///
/// The rows `cu_seqlens_q[b]..cu_seqlens_q[b + 1]` are the last tokens of sequence `b`, whose `kv_lens[b]` keys and
/// values, new ones included, are in its pages. `out[t] = softmax(scale * q[t] · k) · v` over the keys up to the row's
/// own position, in f32, rounded once; query head `h` reads key-value head `h / (Hq / Hkv)`. Rows that belong to no
/// sequence (padding) are left as they are.
///
/// # Shapes
/// - `q`, `out`: `[T, Hq D]`, bf16, f16 or f32; `q` may be row-sliced. D is a multiple of 32 up to 256.
/// - `cu_seqlens_q`: `[B + 1]` i32, ascending from 0.   - `kv_lens`: `[B]` i32.
///
/// # Capture
/// Meant for breaks, whose batch is live. Records one kernel. Frozen: shapes, addresses, `scale`. Read again at each
/// replay: the contents of all tensors.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_models::ops::{self, PagedKv};
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
/// let out = runner.eager(&(), |cx| ops::attention_prefill(cx, &q, &kv, &cu_seqlens_q, &kv_lens, 1.0))?;
/// let out = runner.read::<f32>(&out)?;
/// assert_eq!((out[0], out[32]), (1.0, 2.0)); // the first token sees itself, the second both
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn attention_prefill(
    cx: &mut CaptureStream,
    q: &Tensor,
    kv: &PagedKv<'_>,
    cu_seqlens_q: &Tensor,
    kv_lens: &Tensor,
    scale: f32,
) -> Result<Tensor> {
    CHECK.rank("kv_lens", kv_lens, &["B"])?;
    let sequences = kv_lens.dim(0);
    CHECK.dense("kv_lens", kv_lens, &[sequences], DType::I32)?;
    CHECK.dense("cu_seqlens_q", cu_seqlens_q, &[sequences + 1], DType::I32)?;
    let q_heads = kv.check(CHECK, q, sequences)?;
    let kernel = ATTENTION_PREFILL.get(CHECK, "q", q.dtype())?;
    let dims = CHECK.warp_per_item(q.dim(0) * q_heads)?;
    let out = cx.empty(q.shape(), q.dtype())?;
    let args = AttentionPrefillArgs {
        q: cx.addr(q)?,
        out: cx.addr(&out)?,
        cu_seqlens_q: cx.addr(cu_seqlens_q)?,
        kv_lens: cx.addr(kv_lens)?,
        kv: kv.args(CHECK, cx)?,
        q_stride: q.row_stride() as i64,
        rows: CHECK.u32("T", q.dim(0))?,
        sequences: CHECK.u32("B", sequences)?,
        q_heads: CHECK.u32("Hq", q_heads)?,
        scale,
    };
    cx.launch(kernel, dims, args)?;
    Ok(out)
}

fn host<T: Float>(a: &AttentionPrefillArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let (rows, sequences, q_heads) = (a.rows as usize, a.sequences as usize, a.q_heads as usize);
    let (head_dim, kv_heads) = (a.kv.head_dim(), a.kv.kv_heads());
    let starts = memory.load::<i32>(a.cu_seqlens_q, sequences + 1)?;
    let kv_lens = memory.load::<i32>(a.kv_lens, sequences)?;
    let mut query = Vec::with_capacity(head_dim);
    for b in 0..sequences {
        let (first, end) = (starts[b].max(0) as usize, (starts[b + 1].max(0) as usize).min(rows));
        for kv_head in 0..if first < end { kv_heads } else { 0 } {
            let kv = a.kv.gather::<T>(memory, b, kv_head, kv_lens[b])?;
            for t in first..end {
                let q = row::<T>(memory, a.q, a.q_stride, t, q_heads * head_dim)?;
                let out = row::<T>(memory, a.out, (q_heads * head_dim) as i64, t, q_heads * head_dim)?;
                let keys = i64::from(kv_lens[b]) - (i64::from(starts[b + 1]) - 1 - t as i64);
                let group = q_heads / kv_heads * head_dim;
                let range = kv_head * group..(kv_head + 1) * group;
                for (out, q) in out[range.clone()].chunks(head_dim).zip(q[range].chunks(head_dim)) {
                    query.clear();
                    extend_f32(&mut query, q);
                    let mean = kv.attend(&query, keys, a.scale);
                    out.iter().zip(mean).for_each(|(out, value)| out.set(T::from_f32(value)));
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::testing::refusal;
    use bcg_runtime::Device;

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let cache = device.zeros(&[2, 4, 2, 32], DType::F32)?;
        let q = device.zeros(&[3, 96], DType::F32)?;
        let page_table = device.zeros(&[1, 2], DType::I32)?;
        let (one, two) = (device.zeros(&[1], DType::I32)?, device.zeros(&[2], DType::I32)?);
        let kv = PagedKv { k_cache: &cache, v_cache: &cache, page_table: &page_table };
        let says = |starts, lens| refusal(&device, |cx| attention_prefill(cx, &q, &kv, starts, lens, 1.0));
        assert!(says(&one, &one).contains("`cu_seqlens_q` [2], got [1]"));
        assert!(says(&two, &one).contains("`q` [T, Hq * 32] with Hq a multiple of 2, got [3, 96]"));
        Ok(())
    }
}
