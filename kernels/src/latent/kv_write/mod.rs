//! Norm of the latent, rotary embedding and cache write of latent attention; CUDA source: `kv_write.cu`.

mod host;

use bcg_runtime::{DType, DevicePtr, KernelArgs, OpStream, Result, Source, Tensor};

use super::latent_kv::{LATENT_DIM_MAX, ROPE_DIM_MAX, check_caches};
use crate::check::Check;
use crate::float::{PerFloat, per_float};
use host::host;

static SOURCE: Source = source!("latent/kv_write/kv_write.cu")
    .takes::<MlaKvWriteArgs>()
    .define("THREADS", THREADS as usize)
    .define("LATENT_DIM_MAX", LATENT_DIM_MAX)
    .define("ROPE_DIM_MAX", ROPE_DIM_MAX);
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("mla_kv_write");
const THREADS: u32 = 256;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct MlaKvWriteArgs {
    q: DevicePtr,
    kv_a: DevicePtr,
    weight: DevicePtr,
    #[points_to(const f32)]
    inv_freq: DevicePtr,
    #[points_to(const i32)]
    positions: DevicePtr,
    #[points_to(const i32)]
    slots: DevicePtr,
    q_pe: DevicePtr,
    latents: DevicePtr,
    rope_keys: DevicePtr,
    q_stride: i64,
    kv_a_stride: i64,
    /// Elements from one page of a cache to the next.
    latent_page_stride: i64,
    rope_page_stride: i64,
    num_pages: i64,
    page_size: u32,
    heads: u32,
    head_dim: u32,
    latent_dim: u32,
    rope_dim: u32,
    is_interleaved: u32,
    eps: f32,
    rope_scale: f32,
}

// SAFETY: `mla_kv_write` has checked the shapes when it launches, and the source indexes by these alone.
static MLA_KV_WRITE: PerFloat<MlaKvWriteArgs> = per_float!("mla_kv_write", SOURCE, host).programmatic();

/// The inputs of [`mla_kv_write()`].
#[derive(Clone, Copy, Debug)]
pub struct MlaKvWrite<'a> {
    /// `[T, H (Dn + R)]`: each head's query, its last R elements the part that is rotated; may be row-sliced.
    pub q: &'a Tensor,
    /// `[T, L + R]`: the latent and the rope key of each token; may be row-sliced.
    pub kv_a: &'a Tensor,
    /// `[L]`: the weight of the latent's norm.
    pub weight: &'a Tensor,
    /// `[R / 2]` f32: the angle per position of each pair.
    pub inv_freq: &'a Tensor,
    /// `[T]` i32: the position of each token in its sequence.
    pub positions: &'a Tensor,
    /// `[T]` i32: where each token's latent and rope key go, `page * S + offset`; a negative slot writes nothing.
    pub slots: &'a Tensor,
    /// `[P, S, 1, L]`: the pages of latents.
    pub latents: &'a Tensor,
    /// `[P, S, 1, R]`: the pages of rope keys.
    pub rope_keys: &'a Tensor,
    /// Heads of `q`.
    pub heads: usize,
    /// Pair `i` of a rope part is its elements `2 i` and `2 i + 1`; otherwise `i` and `i + R / 2`.
    pub is_interleaved: bool,
    /// Added to the mean square in the norm.
    pub eps: f32,
    /// The factor of rotated parts: 1, unless the positions are scaled.
    pub rope_scale: f32,
}

/// Normalises the latent and rotates the rope parts of each token, and writes latent and rope key into their pages.
///
/// `latent = rms_norm(kv_a[..L], weight)`. With `a = position * inv_freq[i]` in f32, a pair `(x, y)` of a rope part becomes
/// `(x cos a - y sin a, y cos a + x sin a) * rope_scale`, at the places that it was read from, rounded once. Returns the
/// rotated parts of the queries; the other parts stay where they are in `q`.
///
/// # Shapes
/// - As the fields of [`MlaKvWrite`] say; bf16, f16 or f32, one dtype for all but `inv_freq`; L a multiple of 32 up to 512,
///   R up to 128.   - Returned: `[T, H R]`.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes, addresses, scalars. Read again at each replay: the contents of all tensors, so each
/// replay has its own positions and slots.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_kernels::MlaKvWrite;
/// use bcg_runtime::{DType, Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let latents = device.zeros(&[1, 4, 1, 32], DType::F32)?;
/// let rope_keys = device.zeros(&[1, 4, 1, 32], DType::F32)?;
/// let input = MlaKvWrite {
///     q: &device.tensor(&[1, 64], &[2.0f32; 64])?,
///     kv_a: &device.tensor(&[1, 64], &[3.0f32; 64])?,
///     weight: &device.tensor(&[32], &[1.0f32; 32])?,
///     inv_freq: &device.tensor(&[16], &bcg_kernels::rope_inv_freq(10_000.0, 32))?,
///     positions: &device.tensor(&[1], &[0])?,
///     slots: &device.tensor(&[1], &[3])?,
///     latents: &latents,
///     rope_keys: &rope_keys,
///     heads: 1,
///     is_interleaved: true,
///     eps: 0.0,
///     rope_scale: 1.0,
/// };
/// let q_pe = runner.eager(&(), |cx| bcg_kernels::mla_kv_write(cx, &input))?;
/// assert_eq!(runner.read::<f32>(&q_pe)?, [2.0; 32]); // position 0 turns by nothing
/// assert_eq!(device.read::<f32>(&latents)?[95..97], [0.0, 1.0]); // slot 3 begins at element 96; normalised
/// assert_eq!(device.read::<f32>(&rope_keys)?[95..97], [0.0, 3.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn mla_kv_write(cx: &mut OpStream, input: &MlaKvWrite<'_>) -> Result<Tensor> {
    let (q, kv_a, dtype) = (input.q, input.kv_a, input.q.dtype());
    CHECK.rank("q", q, &["T", "H (Dn + R)"])?;
    CHECK.rank("kv_a", kv_a, &["T", "L + R"])?;
    let (latent_dim, rope_dim) = check_caches(CHECK, input.latents, input.rope_keys, dtype)?;
    let (tokens, heads) = (q.dim(0), input.heads);
    if heads == 0 || !q.dim(1).is_multiple_of(heads) || q.dim(1) / heads < rope_dim {
        let expected = format!("`q` [T, {heads} * (Dn + {rope_dim})]");
        return Err(CHECK.error(expected, format!("{:?}", q.shape())));
    }
    CHECK.shape("kv_a", kv_a, &[tokens, latent_dim + rope_dim])?;
    CHECK.dtype("kv_a", kv_a, dtype)?;
    CHECK.dense("weight", input.weight, &[latent_dim], dtype)?;
    CHECK.dense("inv_freq", input.inv_freq, &[rope_dim / 2], DType::F32)?;
    CHECK.dense("positions", input.positions, &[tokens], DType::I32)?;
    CHECK.dense("slots", input.slots, &[tokens], DType::I32)?;
    let kernel = MLA_KV_WRITE.get(CHECK, "q", dtype)?;
    let q_pe = cx.empty(&[tokens, heads * rope_dim], dtype)?;
    let args = MlaKvWriteArgs {
        q: cx.addr(q)?,
        kv_a: cx.addr(kv_a)?,
        weight: cx.addr(input.weight)?,
        inv_freq: cx.addr(input.inv_freq)?,
        positions: cx.addr(input.positions)?,
        slots: cx.addr(input.slots)?,
        q_pe: cx.addr(&q_pe)?,
        latents: cx.addr(input.latents)?,
        rope_keys: cx.addr(input.rope_keys)?,
        q_stride: q.row_stride() as i64,
        kv_a_stride: kv_a.row_stride() as i64,
        latent_page_stride: input.latents.row_stride() as i64,
        rope_page_stride: input.rope_keys.row_stride() as i64,
        num_pages: input.latents.dim(0) as i64,
        page_size: CHECK.u32("S", input.latents.dim(1))?,
        heads: CHECK.u32("H", heads)?,
        head_dim: CHECK.u32("Dn + R", q.dim(1) / heads)?,
        latent_dim: CHECK.u32("L", latent_dim)?,
        rope_dim: CHECK.u32("R", rope_dim)?,
        is_interleaved: input.is_interleaved.into(),
        eps: input.eps,
        rope_scale: input.rope_scale,
    };
    cx.launch(kernel, CHECK.block_per_row(q, THREADS)?, args)?;
    Ok(q_pe)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::Device;

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let (latents, odd) = (device.zeros(&[2, 4, 1, 64], DType::F32)?, device.zeros(&[2, 4, 1, 48], DType::F32)?);
        let rope_keys = device.zeros(&[2, 4, 1, 32], DType::F32)?;
        let (q, kv_a) = (device.zeros(&[2, 128], DType::F32)?, device.zeros(&[2, 96], DType::F32)?);
        let (weight, inv_freq) = (device.zeros(&[64], DType::F32)?, device.zeros(&[16], DType::F32)?);
        let (two, three) = (device.zeros(&[2], DType::I32)?, device.zeros(&[3], DType::I32)?);
        let good = MlaKvWrite {
            q: &q,
            kv_a: &kv_a,
            weight: &weight,
            inv_freq: &inv_freq,
            positions: &two,
            slots: &two,
            latents: &latents,
            rope_keys: &rope_keys,
            heads: 2,
            is_interleaved: true,
            eps: 0.0,
            rope_scale: 1.0,
        };
        let says = |input: MlaKvWrite<'_>| refusal(&device, |cx| mla_kv_write(cx, &input));
        assert!(says(MlaKvWrite { kv_a: &q, ..good }).contains("`kv_a` [2, 96], got [2, 128]"));
        assert!(says(MlaKvWrite { heads: 3, ..good }).contains("`q` [T, 3 * (Dn + 32)], got [2, 128]"));
        assert!(says(MlaKvWrite { slots: &three, ..good }).contains("`slots` [2], got [3]"));
        assert!(says(MlaKvWrite { weight: &inv_freq, ..good }).contains("`weight` [64], got [16]"));
        assert!(says(MlaKvWrite { rope_keys: &odd, ..good }).contains("R a multiple of 32 up to 128, got 48"));
        Ok(())
    }
}
