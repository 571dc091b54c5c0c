//! How decode attention is spread over a persistent grid; `persistent_decode.cuh` reads the plans.
//!
//! The work is a list: for each sequence, for each of its items (query heads that share a key-value head), the item's
//! tiles of [`TILE`] keys. Each block takes a stretch of the list, all of about the same cost, so that one long sequence
//! is spread over many blocks. An item on several blocks leaves a piece on each, which the kernel merges.
//!
//! - Grid and size depend on the device alone, so a captured kernel reads any plan.
//! - A sequence without keys takes no part: padding a batch changes no other sequence's stretches, and so no bit.

use std::mem::offset_of;

use bcg_runtime::{Device, DevicePtr, HostMemory, KernelArgs, Result};

use crate::check::Check;

/// Keys of a tile.
pub(crate) const TILE: usize = 64;
/// Blocks that fit on a multiprocessor together.
const BLOCKS_PER_MULTIPROCESSOR: usize = 2;
/// Query heads of an item, at most.
const ITEM_HEADS_MAX: usize = 16;
/// Tiles that the begin and the end of an item cost as much as, where blocks are never short of work.
const ITEM_COST: usize = 1;
/// Tiles per block from which on blocks are never short of work.
const BUSY_TILES: usize = 4;

/// A block's share of the work, as the kernels read it: a row of the plan.
#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
pub(crate) struct BlockPlan {
    /// Where the block begins: sequence, item, tile.
    sequence: i32,
    item: i32,
    tile: i32,
    /// How many tiles the block takes.
    tiles: i32,
    /// The block on which the block's first item begins, and the one on which its last item ends.
    first: i32,
    last: i32,
    /// Keys of the sequence that the block begins with.
    len: i32,
    /// The kernel's counter: pieces that are written of the item that begins but does not end on this block; 0 between
    /// runs.
    arrivals: u32,
}

/// Numbers of a row of the plan, and where some of them stand in it.
pub(crate) const WIDTH: usize = size_of::<BlockPlan>() / size_of::<i32>();
const TILES: usize = offset_of!(BlockPlan, tiles) / size_of::<i32>();
const LAST: usize = offset_of!(BlockPlan, last) / size_of::<i32>();

/// The shape of the plans by which [`attention_decode`](crate::attention_decode()) spreads its work over a device.
///
/// A plan is made once for each forward and serves all layers.
///
/// # Example
/// ```
/// use bcg_kernels::DecodePlan;
/// use bcg_runtime::Device;
///
/// let device = Device::host();
/// let decode_plan = DecodePlan::new(&device, 32, 8);
/// let mut values = Vec::new();
/// decode_plan.fill(&[1000, 30, 0], &mut values);
/// let plan = device.tensor(&decode_plan.shape(), &values)?;
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodePlan {
    blocks: usize,
    items: usize,
}

impl DecodePlan {
    /// Describes the plans for a model's heads on a device.
    ///
    /// # Panics
    /// If `kv_heads` is 0.
    pub fn new(device: &Device, q_heads: usize, kv_heads: usize) -> Self {
        let blocks = BLOCKS_PER_MULTIPROCESSOR * device.num_multiprocessors() as usize;
        Self::of_grid(blocks, q_heads, kv_heads)
    }

    /// Describes the plans for a kernel of `blocks` blocks.
    pub(crate) fn of_grid(blocks: usize, q_heads: usize, kv_heads: usize) -> Self {
        let group = q_heads / kv_heads;
        Self { blocks, items: kv_heads * group.div_ceil(Self::item_heads(group)) }
    }

    /// The shape of a plan's tensor, i32; whatever the batch.
    pub fn shape(self) -> [usize; 2] {
        [self.blocks, WIDTH]
    }

    /// Query heads of an item, which the kernel keeps together.
    pub(crate) fn item_heads(group: usize) -> usize {
        if group <= 8 { 8 } else { ITEM_HEADS_MAX }
    }

    /// Refuses a plan of other lengths than `kv_lens`, on the host device.
    pub(crate) fn check(self, check: Check, memory: &HostMemory<'_>, plan: DevicePtr, kv_lens: &[i32]) -> Result<()> {
        let plan = memory.load::<i32>(plan, self.shape().iter().product())?;
        let mut expected = Vec::with_capacity(plan.len());
        self.fill(kv_lens, &mut expected);
        if plan != expected {
            return Err(check.error("`plan` filled with the contents of `kv_lens`", "a plan of other lengths"));
        }
        Ok(())
    }

    /// Writes the plan for sequences of these lengths into `out`, in place of what it held.
    pub fn fill(self, kv_lens: &[i32], out: &mut Vec<i32>) {
        out.clear();
        out.resize(self.blocks * WIDTH, 0);
        let tiles_of = |len: i32| usize::try_from(len).unwrap_or(0).div_ceil(TILE);
        let tiles: usize = self.items * kv_lens.iter().map(|&len| tiles_of(len)).sum::<usize>();
        let items = self.items * kv_lens.iter().filter(|&&len| len > 0).count();
        let item_cost = if tiles < BUSY_TILES * self.blocks { 0 } else { ITEM_COST };
        let cost = tiles + item_cost * items;
        let share = |block: usize| cost / self.blocks + usize::from(block < cost % self.blocks);
        let (mut block, mut left) = (0, share(0));
        for (sequence, &len) in kv_lens.iter().enumerate().filter(|(_, len)| **len > 0) {
            for item in 0..self.items {
                let (mut first, mut place, end) = (None, 0, item_cost + tiles_of(len));
                while place < end {
                    while left == 0 {
                        block += 1;
                        left = share(block);
                    }
                    let taken = left.min(end - place);
                    let tile = place.saturating_sub(item_cost);
                    (place, left) = (place + taken, left - taken);
                    let tiles = place.saturating_sub(item_cost) - tile;
                    if tiles == 0 {
                        continue;
                    }
                    let row = &mut out[block * WIDTH..][..WIDTH];
                    let first = *first.get_or_insert(block);
                    if row[TILES] == 0 {
                        let [sequence, item, tile, first] = [sequence, item, tile, first].map(|n| n as i32);
                        row.copy_from_slice(&[sequence, item, tile, 0, first, block as i32, len, 0]);
                    }
                    row[TILES] += tiles as i32;
                }
                for row in out[first.unwrap_or(block) * WIDTH..block * WIDTH].chunks_mut(WIDTH) {
                    row[LAST] = block as i32;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each block takes: (sequence, item, tile) of each of its tiles, by walking as the kernel does.
    fn walk(kv_lens: &[i32], items: usize, plan: &[i32]) -> Vec<Vec<(usize, usize, usize)>> {
        let tiles_of =
            |sequence: usize| kv_lens[sequence].max(0) as usize / TILE + usize::from(kv_lens[sequence] % 64 > 0);
        let of_block = |row: &[i32]| {
            let [mut sequence, mut item, mut tile] = [row[0], row[1], row[2]].map(|n| n as usize);
            let mut taken = vec![];
            for _ in 0..row[TILES] {
                while tile == tiles_of(sequence) {
                    tile = 0;
                    item += 1;
                    if item == items {
                        (sequence, item) = (sequence + 1, 0);
                    }
                }
                taken.push((sequence, item, tile));
                tile += 1;
            }
            taken
        };
        plan.chunks(WIDTH).map(of_block).collect()
    }

    fn batches() -> Vec<Vec<i32>> {
        let ragged = |count: i32| (0..count).map(|i| i * i * 37 % 1009 * i32::from(i % 5 != 0)).collect();
        let mut long = vec![256; 63];
        long.push(32_768);
        vec![vec![], vec![0, 0], vec![1], vec![64], vec![65, 0, 63], vec![4096; 64], long, ragged(7), ragged(200)]
    }

    const DECODE_PLANS: [DecodePlan; 4] = [
        DecodePlan { blocks: 8, items: 1 },
        DecodePlan { blocks: 8, items: 3 },
        DecodePlan { blocks: 264, items: 8 },
        DecodePlan { blocks: 1, items: 2 },
    ];

    #[test]
    fn a_plan_takes_each_tile_once_in_equal_shares() {
        for (decode_plan, kv_lens) in DECODE_PLANS.iter().flat_map(|plan| batches().into_iter().map(move |b| (plan, b)))
        {
            let mut plan = vec![7; 3];
            decode_plan.fill(&kv_lens, &mut plan);
            assert_eq!(plan.len(), decode_plan.shape().iter().product::<usize>());
            let taken = walk(&kv_lens, decode_plan.items, &plan);
            let mut expected = vec![];
            for (sequence, &len) in kv_lens.iter().enumerate() {
                let tiles = (len.max(0) as usize).div_ceil(TILE);
                for item in 0..decode_plan.items {
                    expected.extend((0..tiles).map(|tile| (sequence, item, tile)));
                }
            }
            assert_eq!(taken.concat(), expected, "{decode_plan:?} {kv_lens:?}");
            let begun = expected.iter().filter(|place| place.2 == 0).count();
            let bound = (expected.len() + ITEM_COST * begun) / decode_plan.blocks + 1;
            assert!(taken.iter().all(|tiles| tiles.len() <= bound), "over {bound}: {decode_plan:?} {kv_lens:?}");
        }
    }

    #[test]
    fn a_plan_knows_on_which_blocks_an_item_lies() {
        for (decode_plan, kv_lens) in DECODE_PLANS.iter().flat_map(|plan| batches().into_iter().map(move |b| (plan, b)))
        {
            let mut plan = vec![];
            decode_plan.fill(&kv_lens, &mut plan);
            let taken = walk(&kv_lens, decode_plan.items, &plan);
            let of_item = |place: &(usize, usize, usize)| (place.0, place.1);
            let has = |block: usize, item| taken[block].iter().any(|place| of_item(place) == item);
            for (block, row) in plan.chunks(WIDTH).enumerate().filter(|(_, row)| row[TILES] > 0) {
                let (begin, end) = (of_item(&taken[block][0]), of_item(taken[block].last().expect("a tile")));
                assert_eq!(Some(row[4] as usize), (0..decode_plan.blocks).find(|&block| has(block, begin)));
                assert_eq!(Some(row[LAST] as usize), (0..decode_plan.blocks).rfind(|&block| has(block, end)));
                assert_eq!((row[6], row[7]), (kv_lens[begin.0], 0));
            }
        }
    }

    #[test]
    fn sequences_without_keys_change_no_share() {
        for (decode_plan, kv_lens) in DECODE_PLANS.iter().flat_map(|plan| batches().into_iter().map(move |b| (plan, b)))
        {
            let (mut plan, mut padded) = (vec![], vec![]);
            decode_plan.fill(&kv_lens, &mut plan);
            decode_plan.fill(&[&kv_lens[..], &[0; 9]].concat(), &mut padded);
            assert_eq!(plan, padded);
        }
    }
}
