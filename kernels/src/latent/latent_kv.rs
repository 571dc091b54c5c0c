//! Paged latents and rope keys, as the ops of latent attention read them.

use bcg_runtime::{DType, DevicePtr, HostMemory, KernelArgs, OpStream, Result, Tensor};

use crate::check::Check;
use crate::float::{Float, dot, extend_f32};
use crate::softmax::softmax_mean;

/// The widest latent and rope key that the kernels for any dtype hold in registers.
pub(super) const LATENT_DIM_MAX: usize = 512;
pub(super) const ROPE_DIM_MAX: usize = 128;

/// Warps that attend to the keys of one sequence together, in the kernels for any dtype.
pub(super) const ATTEND_WARPS: u32 = 8;

/// The pages of one layer of latent attention, and which of them each sequence has.
///
/// All heads share the keys: key `j` of sequence `b` is a latent and a rotated rope key, in page `page_table[b, j / S]`, at
/// offset `j % S`.
#[derive(Clone, Copy, Debug)]
pub struct LatentKv<'a> {
    /// `[P, S, 1, L]`: the pages of normalised latents.
    pub latents: &'a Tensor,
    /// `[P, S, 1, R]`: the pages of rotated rope keys.
    pub rope_keys: &'a Tensor,
    /// `[B, max_pages]` i32; entries after a sequence's last page are never read.
    pub page_table: &'a Tensor,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, KernelArgs)]
pub(super) struct LatentKvArgs {
    latents: DevicePtr,
    rope_keys: DevicePtr,
    /// `[B, max_pages]`.
    #[points_to(const i32)]
    page_table: DevicePtr,
    /// Elements from one page of a cache to the next.
    latent_page_stride: i64,
    rope_page_stride: i64,
    num_pages: i64,
    max_pages: u32,
    page_size: u32,
    latent_dim: u32,
    rope_dim: u32,
}

/// Refuses caches that the kernels cannot read or write; returns L and R.
pub(super) fn check_caches(check: Check, latents: &Tensor, rope_keys: &Tensor, dtype: DType) -> Result<(usize, usize)> {
    check.rank("latents", latents, &["P", "S", "1", "L"])?;
    check.rank("rope_keys", rope_keys, &["P", "S", "1", "R"])?;
    let (pages, page_size) = (latents.dim(0), latents.dim(1));
    let (latent_dim, rope_dim) = (latents.dim(3), rope_keys.dim(3));
    check.shape("latents", latents, &[pages, page_size, 1, latent_dim])?;
    check.shape("rope_keys", rope_keys, &[pages, page_size, 1, rope_dim])?;
    check.dtype("latents", latents, dtype)?;
    check.dtype("rope_keys", rope_keys, dtype)?;
    for (letter, dim, max) in [("L", latent_dim, LATENT_DIM_MAX), ("R", rope_dim, ROPE_DIM_MAX)] {
        if dim == 0 || !dim.is_multiple_of(32) || dim > max {
            return Err(check.error(format!("{letter} a multiple of 32 up to {max}"), dim));
        }
    }
    if page_size == 0 {
        return Err(check.error("`latents` with S above 0", format!("{:?}", latents.shape())));
    }
    Ok((latent_dim, rope_dim))
}

impl LatentKv<'_> {
    /// Checks the caches and the page table; returns L and R.
    pub(super) fn check(&self, check: Check, dtype: DType, sequences: usize) -> Result<(usize, usize)> {
        let dims = check_caches(check, self.latents, self.rope_keys, dtype)?;
        check.rank("page_table", self.page_table, &["B", "max_pages"])?;
        check.dense("page_table", self.page_table, &[sequences, self.page_table.dim(1)], DType::I32)?;
        Ok(dims)
    }

    pub(super) fn args(&self, check: Check, cx: &mut OpStream) -> Result<LatentKvArgs> {
        Ok(LatentKvArgs {
            latents: cx.addr(self.latents)?,
            rope_keys: cx.addr(self.rope_keys)?,
            page_table: cx.addr(self.page_table)?,
            latent_page_stride: self.latents.row_stride() as i64,
            rope_page_stride: self.rope_keys.row_stride() as i64,
            num_pages: self.latents.dim(0) as i64,
            max_pages: check.u32("max_pages", self.page_table.dim(1))?,
            page_size: check.u32("S", self.latents.dim(1))?,
            latent_dim: check.u32("L", self.latents.dim(3))?,
            rope_dim: check.u32("R", self.rope_keys.dim(3))?,
        })
    }
}

/// The latents and rope keys of one sequence, gathered from their pages in f32.
#[derive(Debug)]
pub(super) struct SequenceKv {
    pub(super) latents: Vec<f32>,
    pub(super) rope_keys: Vec<f32>,
    /// How many gathered keys come before key `j`: pages outside the cache are left out.
    pub(super) before: Vec<usize>,
}

impl LatentKvArgs {
    pub(super) fn latent_dim(&self) -> usize {
        self.latent_dim as usize
    }

    pub(super) fn rope_dim(&self) -> usize {
        self.rope_dim as usize
    }

    /// Tells whether every latent and rope key begins at a multiple of 16 bytes.
    pub(super) fn is_in_words(&self) -> bool {
        let is_aligned = |address: DevicePtr| address.as_u64().is_multiple_of(16);
        let is_whole = |stride: i64| stride % 8 == 0;
        is_aligned(self.latents)
            && is_aligned(self.rope_keys)
            && is_whole(self.latent_page_stride)
            && is_whole(self.rope_page_stride)
    }

    /// Gathers the first `len` keys of sequence `b`, as far as its page table goes.
    pub(super) fn gather<T: Float>(&self, memory: &HostMemory<'_>, b: usize, len: i32) -> Result<SequenceKv> {
        let (page_size, max_pages) = (self.page_size as usize, self.max_pages as usize);
        let len = usize::try_from(len).unwrap_or(0).min(max_pages * page_size);
        let table = memory.view_at::<i32>(self.page_table, b * max_pages, len.div_ceil(page_size))?;
        let mut kv = SequenceKv { latents: Vec::new(), rope_keys: Vec::new(), before: vec![0] };
        for key in 0..len {
            let page = i64::from(table[key / page_size].get());
            if (0..self.num_pages).contains(&page) {
                let view = |pages: DevicePtr, stride: i64, dim: usize| {
                    let place = (page * stride) as usize + key % page_size * dim;
                    memory.view_at::<T>(pages, place, dim)
                };
                extend_f32(&mut kv.latents, view(self.latents, self.latent_page_stride, self.latent_dim())?);
                extend_f32(&mut kv.rope_keys, view(self.rope_keys, self.rope_page_stride, self.rope_dim())?);
            }
            kv.before.push(kv.latents.len() / self.latent_dim());
        }
        Ok(kv)
    }
}

/// The parts of queries or keys of one head: `nope` without positions, `rope` rotated.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parts<'a> {
    pub(super) nope: &'a [f32],
    pub(super) rope: &'a [f32],
}

/// Attends with one query to all of `keys`; `values` has as many rows, of `width` elements. Zeros where there is no key.
pub(super) fn attend(query: Parts<'_>, keys: Parts<'_>, values: &[f32], width: usize, scale: f32) -> Vec<f32> {
    let keys = keys.nope.chunks(query.nope.len()).zip(keys.rope.chunks(query.rope.len()));
    let scores = keys.map(|(nope, rope)| (dot(query.nope, nope) + dot(query.rope, rope)) * scale).collect();
    softmax_mean(scores, values, width)
}
