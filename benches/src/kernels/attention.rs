//! Attention over paged keys and values: prefill of new tokens, perhaps after a prefix, and decode.

use std::fmt;
use std::str::FromStr;

use anyhow::Result;
use bcg_kernels::{self as ops, DecodePlan, PagedKv};
use bcg_models::layers::Heads;
use bcg_runtime::{DType, Tensor};

use super::cases::{Case, PAGE, Shapes, each};
use super::lab::Lab;

/// A batch of prefill attention: `BxT`, or `BxT+P` after a prefix of `P` tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillShape {
    sequences: usize,
    tokens: usize,
    pub(super) prefix: usize,
}

/// A batch of decode attention: `BxL`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeShape {
    pub(super) sequences: usize,
    pub(super) tokens: usize,
}

fn positive(text: &str) -> Option<usize> {
    text.parse().ok().filter(|&number| number > 0)
}

impl FromStr for PrefillShape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (batch, prefix) = text.split_once('+').unwrap_or((text, "0"));
        let DecodeShape { sequences, tokens } = batch.parse()?;
        let prefix = prefix.parse().map_err(|_| format!("`{prefix}` is no number of tokens"))?;
        Ok(Self { sequences, tokens, prefix })
    }
}

impl FromStr for DecodeShape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (sequences, tokens) =
            text.split_once('x').ok_or("a batch is written as sequences x tokens, such as 16x512")?;
        match (positive(sequences), positive(tokens)) {
            (Some(sequences), Some(tokens)) => Ok(Self { sequences, tokens }),
            _ => Err(format!("`{text}`: sequences and tokens are numbers of at least 1")),
        }
    }
}

impl fmt::Display for PrefillShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sequences, tokens, prefix } = self;
        if *prefix == 0 { write!(f, "{sequences}x{tokens}") } else { write!(f, "{sequences}x{tokens}+{prefix}") }
    }
}

impl fmt::Display for DecodeShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.sequences, self.tokens)
    }
}

impl PrefillShape {
    /// New tokens of each sequence: `tokens` in the mean; several sequences range from a sixteenth of it to about twice.
    pub(super) fn lens(&self) -> Vec<usize> {
        let Self { sequences, tokens, .. } = *self;
        let step = tokens / sequences;
        (0..sequences).map(|index| tokens + 2 * index * step - (sequences - 1) * step).collect()
    }
}

/// Pages in a shuffled order, as after many requests, for sequences of these lengths.
pub(super) struct Pages {
    pub(super) table: Vec<i32>,
    pub(super) width: usize,
    pub(super) count: usize,
}

impl Pages {
    pub(super) fn new(lens: &[usize]) -> Self {
        let width = lens.iter().map(|len| len.div_ceil(PAGE)).max().unwrap_or(1);
        let count: usize = lens.iter().map(|len| len.div_ceil(PAGE)).sum();
        let mut order: Vec<i32> = (0..count as i32).collect();
        let mut state = 1_u64;
        for last in (1..count).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            order.swap(last, (state >> 33) as usize % (last + 1));
        }
        let mut table = Vec::with_capacity(lens.len() * width);
        let mut next = 0;
        for len in lens {
            let pages = len.div_ceil(PAGE);
            table.extend(&order[next..next + pages]);
            table.resize(table.len() + width - pages, 0);
            next += pages;
        }
        Self { table, width, count }
    }
}

/// The cache and the page table of one launch.
struct Cache {
    k: Tensor,
    v: Tensor,
    page_table: Tensor,
}

impl Cache {
    fn new(lab: &mut Lab, dtype: DType, heads: Heads, lens: &[usize]) -> Result<Self> {
        let pages = Pages::new(lens);
        let shape = [pages.count, PAGE, heads.kv, heads.dim];
        Ok(Self {
            k: lab.random(&shape, dtype)?,
            v: lab.random(&shape, dtype)?,
            page_table: lab.tensor(&pages.table)?.reshape(&[lens.len(), pages.width])?,
        })
    }

    fn view(&self) -> PagedKv<'_> {
        PagedKv { k_cache: &self.k, v_cache: &self.v, page_table: &self.page_table }
    }
}

pub(super) fn as_i32(numbers: &[usize]) -> Vec<i32> {
    numbers.iter().map(|&number| number as i32).collect()
}

/// Bytes of queries and outputs, and of the keys and values that are read, each once.
fn bytes(model: &Shapes, heads: Heads, queries: usize, keys: usize) -> usize {
    2 * (queries * heads.q + keys * heads.kv) * heads.dim * model.size()
}

/// Operations of the two products, for this many pairs of a query and a key that it sees.
fn flops(heads: Heads, pairs: usize) -> usize {
    4 * pairs * heads.q * heads.dim
}

/// Causal attention of new tokens.
pub(super) fn prefill(model: &Shapes, heads: Heads, shape: PrefillShape) -> Case {
    let new = shape.lens();
    let lens: Vec<usize> = new.iter().map(|new| new + shape.prefix).collect();
    let queries: usize = new.iter().sum();
    let pairs: usize = new.iter().map(|new| new * shape.prefix + new * (new + 1) / 2).sum();
    let bytes = bytes(model, heads, queries, lens.iter().sum());
    let dtype = model.config.dtype;
    let starts: Vec<usize> = (0..=new.len()).map(|end| new[..end].iter().sum()).collect();
    let scale = (heads.dim as f32).sqrt().recip();
    let prepare = each(move |lab| {
        let q = lab.random(&[queries, heads.q * heads.dim], dtype)?;
        let cache = Cache::new(lab, dtype, heads, &lens)?;
        let (starts, lens, mut plan) = (as_i32(&starts), as_i32(&lens), vec![]);
        ops::attention_prefill_plan(&starts, &lens, &mut plan);
        let (starts, lens, plan) = (lab.tensor(&starts)?, lab.tensor(&lens)?, lab.tensor(&plan)?);
        Ok(Box::new(move |cx| Ok(vec![ops::attention_prefill(cx, &q, &cache.view(), &starts, &lens, &plan, scale)?])))
    });
    model.case("attention_prefill", shape.to_string(), bytes, flops(heads, pairs), prepare)
}

/// Attention of one new token for each sequence.
pub(super) fn decode(model: &Shapes, heads: Heads, shape: DecodeShape) -> Case {
    let DecodeShape { sequences, tokens } = shape;
    let dtype = model.config.dtype;
    let scale = (heads.dim as f32).sqrt().recip();
    let prepare = each(move |lab| {
        let q = lab.random(&[sequences, heads.q * heads.dim], dtype)?;
        let lens = vec![tokens; sequences];
        let cache = Cache::new(lab, dtype, heads, &lens)?;
        let lens = as_i32(&lens);
        let decode_plan = DecodePlan::new(lab.device(), heads.q, heads.kv);
        let mut plan = Vec::new();
        decode_plan.fill(&lens, &mut plan);
        let (lens, plan) = (lab.tensor(&lens)?, lab.tensor(&plan)?.reshape(&decode_plan.shape())?);
        Ok(Box::new(move |cx| Ok(vec![ops::attention_decode(cx, &q, &cache.view(), &lens, &plan, scale)?])))
    });
    let bytes = bytes(model, heads, sequences, sequences * tokens);
    model.case("attention_decode", shape.to_string(), bytes, flops(heads, sequences * tokens), prepare)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_written_as_they_are_read() {
        for text in ["1x8192", "16x512", "1x512+8192"] {
            assert_eq!(text.parse::<PrefillShape>().expect("a shape").to_string(), text);
        }
        assert_eq!("64x1024".parse::<DecodeShape>().expect("a shape").to_string(), "64x1024");
        for wrong in ["", "16", "0x4", "4x0", "ax4"] {
            wrong.parse::<DecodeShape>().expect_err(wrong);
            wrong.parse::<PrefillShape>().expect_err(wrong);
        }
        "1x4+b".parse::<PrefillShape>().expect_err("no prefix");
    }

    #[test]
    fn ragged_lengths_have_the_named_mean() {
        let lens = "16x512".parse::<PrefillShape>().expect("a shape").lens();
        assert_eq!((lens[0], lens[15], lens.iter().sum::<usize>()), (32, 992, 16 * 512));
        assert_eq!("1x300".parse::<PrefillShape>().expect("a shape").lens(), [300]);
    }

    #[test]
    fn every_page_has_one_owner() {
        let pages = Pages::new(&[40, 16, 1]);
        assert_eq!((pages.width, pages.count), (3, 5));
        let mut owned = [&pages.table[0..3], &pages.table[3..4], &pages.table[6..7]].concat();
        owned.sort_unstable();
        assert_eq!(owned, [0, 1, 2, 3, 4]);
    }
}
