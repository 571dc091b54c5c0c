//! Attention of one query per sequence over paged keys and values; CUDA source: `kernels/src/attention_decode.cu`.

use bcg_runtime::{CaptureStream, DType, DevicePtr, Dims, HostMemory, Result, Tensor};
use bytemuck::{AnyBitPattern, NoUninit};

use super::check::Check;
use super::float::{Float, PerFloat, extend_f32, per_float, row};
use super::paged_kv::{PagedKv, PagedKvArgs};

const CHECK: Check = Check::new("attention_decode");

/// Warps of a block of the CUDA kernel, which share the keys of one sequence and head.
const WARPS: u32 = 8;

#[repr(C)]
#[derive(Clone, Copy, NoUninit, AnyBitPattern)]
struct AttentionDecodeArgs {
    q: DevicePtr,
    out: DevicePtr,
    kv_lens: DevicePtr,
    kv: PagedKvArgs,
    q_stride: i64,
    sequences: u32,
    q_heads: u32,
    scale: f32,
    _padding: u32,
}

static ATTENTION_DECODE: PerFloat<AttentionDecodeArgs> =
    per_float!("attention_decode", bcg_kernels::ATTENTION_DECODE, host);

/// Attends with one query of each sequence to all its keys.
///
/// `out[b] = softmax(scale * q[b] · k) · v` over the `kv_lens[b]` keys in the pages of sequence `b`, in f32, rounded
/// once; query head `h` reads key-value head `h / (Hq / Hkv)`. A length of 0 (a padded row) gives zeros.
///
/// # Shapes
/// - `q`, `out`: `[B, Hq D]`, bf16, f16 or f32; `q` may be row-sliced. D is a multiple of 32 up to 256.
/// - `kv_lens`: `[B]` i32.
///
/// # Capture
/// Records one kernel. Frozen: shapes, addresses, `scale`. Read again at each replay: the contents of all tensors.
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
/// let pages = |values: [f32; 2]| device.tensor(&[1, 2, 1, 32], &values.map(|v| [v; 32]).concat());
/// let kv = PagedKv {
///     k_cache: &pages([0.0, 0.0])?,
///     v_cache: &pages([1.0, 3.0])?,
///     page_table: &device.tensor(&[2, 1], &[0, 0])?,
/// };
/// let q = device.tensor(&[2, 32], &[1.0f32; 64])?;
/// let kv_lens = device.tensor(&[2], &[2, 0])?;
/// let out = runner.eager(&(), |cx| ops::attention_decode(cx, &q, &kv, &kv_lens, 1.0))?;
/// let out = runner.read::<f32>(&out)?;
/// assert_eq!((out[0], out[32]), (2.0, 0.0));
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn attention_decode(
    cx: &mut CaptureStream,
    q: &Tensor,
    kv: &PagedKv<'_>,
    kv_lens: &Tensor,
    scale: f32,
) -> Result<Tensor> {
    CHECK.rank("kv_lens", kv_lens, &["B"])?;
    let sequences = kv_lens.dim(0);
    CHECK.dense("kv_lens", kv_lens, &[sequences], DType::I32)?;
    let q_heads = kv.check(CHECK, q, sequences)?;
    CHECK.shape("q", q, &[sequences, q.dim(1)])?;
    let kernel = ATTENTION_DECODE.get(CHECK, "q", q.dtype())?;
    let dims = Dims::linear(CHECK.u32("B * Hq", sequences * q_heads)?, 32 * WARPS);
    let out = cx.empty(q.shape(), q.dtype())?;
    let args = AttentionDecodeArgs {
        q: cx.addr(q)?,
        out: cx.addr(&out)?,
        kv_lens: cx.addr(kv_lens)?,
        kv: kv.args(CHECK, cx)?,
        q_stride: q.row_stride() as i64,
        sequences: CHECK.u32("B", sequences)?,
        q_heads: CHECK.u32("Hq", q_heads)?,
        scale,
        _padding: 0,
    };
    cx.launch(kernel, dims, args)?;
    Ok(out)
}

fn host<T: Float>(a: &AttentionDecodeArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let (sequences, q_heads) = (a.sequences as usize, a.q_heads as usize);
    let (head_dim, kv_heads) = (a.kv.head_dim(), a.kv.kv_heads());
    let kv_lens = memory.load::<i32>(a.kv_lens, sequences)?;
    let mut query = Vec::with_capacity(head_dim);
    for (b, kv_len) in kv_lens.into_iter().enumerate() {
        let q = row::<T>(memory, a.q, a.q_stride, b, q_heads * head_dim)?;
        let out = row::<T>(memory, a.out, (q_heads * head_dim) as i64, b, q_heads * head_dim)?;
        let group = q_heads / kv_heads * head_dim;
        for (kv_head, (out, q)) in out.chunks(group).zip(q.chunks(group)).enumerate() {
            let kv = a.kv.gather::<T>(memory, b, kv_head, kv_len)?;
            for (out, q) in out.chunks(head_dim).zip(q.chunks(head_dim)) {
                query.clear();
                extend_f32(&mut query, q);
                let mean = kv.attend(&query, kv_len.into(), a.scale);
                out.iter().zip(mean).for_each(|(out, value)| out.set(T::from_f32(value)));
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
        let cache = device.zeros(&[2, 4, 1, 32], DType::F32)?;
        let (q, more) = (device.zeros(&[2, 64], DType::F32)?, device.zeros(&[3, 64], DType::F32)?);
        let lens = device.zeros(&[2], DType::I32)?;
        let (table, wrong) = (device.zeros(&[2, 2], DType::I32)?, device.zeros(&[3, 2], DType::I32)?);
        let kv = PagedKv { k_cache: &cache, v_cache: &cache, page_table: &table };
        let says = |q, kv: &PagedKv<'_>, lens| refusal(&device, |cx| attention_decode(cx, q, kv, lens, 1.0));
        assert!(says(&more, &kv, &lens).contains("`q` [2, 64], got [3, 64]"));
        assert!(says(&q, &kv, &q).contains("`kv_lens` [B], got [2, 64]"));
        assert!(says(&q, &PagedKv { page_table: &wrong, ..kv }, &lens).contains("`page_table` [2, 2], got [3, 2]"));
        Ok(())
    }
}
