//! Key-value write; CUDA source: `kv_write.cu`.

mod host;

use bcg_runtime::{DType, DevicePtr, Kernel, KernelArgs, OpStream, Result, Source, Tensor};

use crate::check::{Check, row_bytes, row_stride_bytes};
use host::host;

static SOURCE: Source = source!("attention/kv_write/kv_write.cu").takes::<KvWriteArgs>();
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("kv_write");

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct KvWriteArgs {
    #[points_to(const u8)]
    k: DevicePtr,
    #[points_to(const u8)]
    v: DevicePtr,
    #[points_to(const i32)]
    slots: DevicePtr,
    #[points_to(u8)]
    k_cache: DevicePtr,
    #[points_to(u8)]
    v_cache: DevicePtr,
    k_stride_bytes: i64,
    v_stride_bytes: i64,
    /// From one page to the next.
    k_page_bytes: i64,
    v_page_bytes: i64,
    k_bytes: i64,
    v_bytes: i64,
    num_pages: i64,
    page_size: u32,
    _padding: u32,
}

// SAFETY: `kv_write` has checked the shapes when it launches, and the source indexes by these alone.
static KV_WRITE: Kernel<KvWriteArgs> = unsafe { Kernel::new("kv_write", &SOURCE, host) }.programmatic();

/// Writes the keys and values of new tokens, as they are, into their pages.
///
/// # Shapes
/// - `k`: `[T, Hk Dk]`, `v`: `[T, Hv Dv]`, one dtype; may be row-sliced.
/// - `slots`: `[T]` i32: where each token's key and value go, `page * S + offset`; a negative slot writes nothing.
/// - `k_cache`: `[P, S, Hk, Dk]`, `v_cache`: `[P, S, Hv, Dv]`.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes and addresses. Read again at each replay: `k`, `v`, `slots`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_runtime::{DType, Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let kv = device.tensor(&[2, 2], &[1.0f32, 2.0, 3.0, 4.0])?;
/// let (k, v) = (kv.columns(0..1)?, kv.columns(1..2)?);
/// let (k_cache, v_cache) = (device.zeros(&[2, 2, 1, 1], DType::F32)?, device.zeros(&[2, 2, 1, 1], DType::F32)?);
/// let slots = device.tensor(&[2], &[3, -1])?;
/// runner.eager(&(), |cx| bcg_kernels::kv_write(cx, &k, &v, &slots, &k_cache, &v_cache))?;
/// assert_eq!(device.read::<f32>(&k_cache)?, [0.0, 0.0, 0.0, 1.0]);
/// assert_eq!(device.read::<f32>(&v_cache)?, [0.0, 0.0, 0.0, 2.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn kv_write(
    cx: &mut OpStream,
    k: &Tensor,
    v: &Tensor,
    slots: &Tensor,
    k_cache: &Tensor,
    v_cache: &Tensor,
) -> Result<()> {
    CHECK.rank("k_cache", k_cache, &["P", "S", "Hk", "Dk"])?;
    CHECK.rank("v_cache", v_cache, &["P", "S", "Hv", "Dv"])?;
    CHECK.shape("v_cache", v_cache, &[k_cache.dim(0), k_cache.dim(1), v_cache.dim(2), v_cache.dim(3)])?;
    CHECK.rank("k", k, &["T", "Hk Dk"])?;
    CHECK.shape("k", k, &[k.dim(0), k_cache.dim(2) * k_cache.dim(3)])?;
    CHECK.shape("v", v, &[k.dim(0), v_cache.dim(2) * v_cache.dim(3)])?;
    for (name, tensor) in [("v", v), ("k_cache", k_cache), ("v_cache", v_cache)] {
        CHECK.dtype(name, tensor, k.dtype())?;
    }
    CHECK.dense("slots", slots, &[k.dim(0)], DType::I32)?;
    if k_cache.dim(1) == 0 {
        return Err(CHECK.error("`k_cache` with S above 0", format!("{:?}", k_cache.shape())));
    }
    let dims = CHECK.blocks_per_row(if row_bytes(k) < row_bytes(v) { v } else { k })?;
    let args = KvWriteArgs {
        k: cx.addr(k)?,
        v: cx.addr(v)?,
        slots: cx.addr(slots)?,
        k_cache: cx.addr(k_cache)?,
        v_cache: cx.addr(v_cache)?,
        k_stride_bytes: row_stride_bytes(k),
        v_stride_bytes: row_stride_bytes(v),
        k_page_bytes: row_stride_bytes(k_cache),
        v_page_bytes: row_stride_bytes(v_cache),
        k_bytes: row_bytes(k),
        v_bytes: row_bytes(v),
        num_pages: k_cache.dim(0) as i64,
        page_size: CHECK.u32("S", k_cache.dim(1))?,
        _padding: 0,
    };
    cx.launch(&KV_WRITE, dims, args)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::Device;

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let cache = |heads: usize| device.zeros(&[2, 4, heads, 8], DType::F32);
        let (k_cache, v_cache) = (cache(2)?, cache(1)?);
        let (k, v) = (device.zeros(&[3, 16], DType::F32)?, device.zeros(&[3, 8], DType::F32)?);
        let (half, slots) = (device.zeros(&[3, 8], DType::Bf16)?, |len: usize| device.zeros(&[len], DType::I32));
        let (two, three) = (slots(2)?, slots(3)?);
        let says = |k, v, slots| refusal(&device, |cx| kv_write(cx, k, v, slots, &k_cache, &v_cache));
        assert!(says(&v, &v, &three).contains("`k` [3, 16], got [3, 8]"));
        assert!(says(&k, &half, &three).contains("`v` f32, got bf16"));
        assert!(says(&k, &v, &two).contains("`slots` [3], got [2]"));
        Ok(())
    }
}
