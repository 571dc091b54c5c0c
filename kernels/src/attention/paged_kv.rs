//! Paged keys and values, as both attention ops read them.

use bcg_runtime::{DType, DevicePtr, HostMemory, KernelArgs, OpStream, Result, Tensor};

use crate::check::Check;
use crate::float::{Float, dot, extend_f32};
use crate::softmax::softmax_mean;

/// The largest head dim that the kernels hold in registers.
pub const HEAD_DIM_MAX: usize = 256;

/// Tells whether the attention kernels take heads of `head_dim` dimensions: multiples of 32 up to [`HEAD_DIM_MAX`].
pub fn takes_head_dim(head_dim: usize) -> bool {
    (1..=HEAD_DIM_MAX).contains(&head_dim) && head_dim.is_multiple_of(32)
}

/// The pages of one layer, and which of them each sequence has.
///
/// Key `j` of sequence `b` lies in page `page_table[b, j / S]`, at offset `j % S`.
#[derive(Clone, Copy, Debug)]
pub struct PagedKv<'a> {
    /// `[P, S, Hkv, D]`: the pages of keys.
    pub k_cache: &'a Tensor,
    /// `[P, S, Hkv, D]`: the pages of values.
    pub v_cache: &'a Tensor,
    /// `[B, max_pages]` i32; entries after a sequence's last page are never read.
    pub page_table: &'a Tensor,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, KernelArgs)]
pub(super) struct PagedKvArgs {
    pub(super) k: DevicePtr,
    pub(super) v: DevicePtr,
    /// `[B, max_pages]`.
    #[points_to(const i32)]
    page_table: DevicePtr,
    /// Elements from one page of a cache to the next.
    pub(super) page_stride: i64,
    pub(super) num_pages: i64,
    max_pages: u32,
    page_size: u32,
    kv_heads: u32,
    head_dim: u32,
}

/// Refuses caches that the kernels cannot read or write.
pub(super) fn check_caches(check: Check, k_cache: &Tensor, v_cache: &Tensor, dtype: DType) -> Result<()> {
    check.rank("k_cache", k_cache, &["P", "S", "Hkv", "D"])?;
    check.shape("v_cache", v_cache, k_cache.shape())?;
    check.dtype("k_cache", k_cache, dtype)?;
    check.dtype("v_cache", v_cache, dtype)?;
    if k_cache.row_stride() != v_cache.row_stride() {
        let expected = format!("`v_cache` with pages {} elements apart, as `k_cache`", k_cache.row_stride());
        return Err(check.error(expected, v_cache.row_stride()));
    }
    let head_dim = k_cache.dim(3);
    if !takes_head_dim(head_dim) {
        return Err(check.error(format!("D a multiple of 32 up to {HEAD_DIM_MAX}"), head_dim));
    }
    if k_cache.dim(1) == 0 || k_cache.dim(2) == 0 {
        return Err(check.error("`k_cache` with S and Hkv above 0", format!("{:?}", k_cache.shape())));
    }
    Ok(())
}

impl PagedKv<'_> {
    /// Checks the caches against the queries `[rows, Hq D]` and returns Hq.
    pub(super) fn check(&self, check: Check, q: &Tensor, sequences: usize) -> Result<usize> {
        check.rank("q", q, &["T", "Hq D"])?;
        check_caches(check, self.k_cache, self.v_cache, q.dtype())?;
        check.rank("page_table", self.page_table, &["B", "max_pages"])?;
        check.dense("page_table", self.page_table, &[sequences, self.page_table.dim(1)], DType::I32)?;
        let (kv_heads, head_dim) = (self.k_cache.dim(2), self.k_cache.dim(3));
        if !q.dim(1).is_multiple_of(kv_heads * head_dim) {
            let expected = format!("`q` [T, Hq * {head_dim}] with Hq a multiple of {kv_heads}");
            return Err(check.error(expected, format!("{:?}", q.shape())));
        }
        Ok(q.dim(1) / head_dim)
    }

    pub(super) fn args(&self, check: Check, cx: &mut OpStream) -> Result<PagedKvArgs> {
        Ok(PagedKvArgs {
            k: cx.addr(self.k_cache)?,
            v: cx.addr(self.v_cache)?,
            page_table: cx.addr(self.page_table)?,
            page_stride: self.k_cache.row_stride() as i64,
            num_pages: self.k_cache.dim(0) as i64,
            max_pages: check.u32("max_pages", self.page_table.dim(1))?,
            page_size: check.u32("S", self.k_cache.dim(1))?,
            kv_heads: check.u32("Hkv", self.k_cache.dim(2))?,
            head_dim: check.u32("D", self.k_cache.dim(3))?,
        })
    }
}

/// The keys and values of one sequence and head, gathered from their pages in f32.
#[derive(Debug)]
pub(super) struct HeadKv {
    head_dim: usize,
    k: Vec<f32>,
    v: Vec<f32>,
    /// How many gathered keys come before key `j`: pages outside the cache are left out.
    before: Vec<usize>,
}

impl PagedKvArgs {
    pub(super) fn head_dim(&self) -> usize {
        self.head_dim as usize
    }

    pub(super) fn kv_heads(&self) -> usize {
        self.kv_heads as usize
    }

    /// Tells whether every key and value begins at a multiple of `elements` elements.
    pub(super) fn is_aligned(&self, elements: usize) -> bool {
        let bytes = 2 * elements as u64;
        let is_aligned = |address: DevicePtr| address.as_u64().is_multiple_of(bytes);
        is_aligned(self.k) && is_aligned(self.v) && (self.page_stride as usize).is_multiple_of(elements)
    }

    /// Gathers the first `len` keys and values of sequence `b`, as far as its page table goes.
    pub(super) fn gather<T: Float>(&self, memory: &HostMemory<'_>, b: usize, head: usize, len: i32) -> Result<HeadKv> {
        let (head_dim, page_size, max_pages) = (self.head_dim(), self.page_size as usize, self.max_pages as usize);
        let len = usize::try_from(len).unwrap_or(0).min(max_pages * page_size);
        let table = memory.view_at::<i32>(self.page_table, b * max_pages, len.div_ceil(page_size))?;
        let mut kv = HeadKv { head_dim, k: Vec::new(), v: Vec::new(), before: vec![0] };
        for key in 0..len {
            let page = i64::from(table[key / page_size].get());
            if (0..self.num_pages).contains(&page) {
                let token = key % page_size * self.kv_heads() + head;
                let place = (page * self.page_stride) as usize + token * head_dim;
                extend_f32(&mut kv.k, memory.view_at::<T>(self.k, place, head_dim)?);
                extend_f32(&mut kv.v, memory.view_at::<T>(self.v, place, head_dim)?);
            }
            kv.before.push(kv.k.len() / head_dim);
        }
        Ok(kv)
    }
}

impl HeadKv {
    /// Attends with one query to the first `keys` keys; the result is zeros where there is none.
    pub(super) fn attend(&self, query: &[f32], keys: i64, scale: f32) -> Vec<f32> {
        let keys = usize::try_from(keys).unwrap_or(0).min(self.before.len() - 1);
        let seen = self.before[keys];
        let scores = self.k.chunks(self.head_dim).take(seen).map(|key| dot(query, key) * scale).collect();
        softmax_mean(scores, &self.v, self.head_dim)
    }
}
