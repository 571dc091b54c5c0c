//! The arena's blocks along the steps of a forward.

use bcg_runtime::{BlockLifetime, Description, Moment};

/// The blocks of a graph, placed: a step is one unit long, and its moments lie evenly in it.
pub(super) struct Memory {
    /// In the order in which they are taken.
    pub(super) blocks: Vec<Placed>,
    /// Bytes in use from each moment on, in order.
    pub(super) usage: Vec<(f64, usize)>,
}

/// A block, and from where to where in the forward it is held.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Placed {
    pub(super) block: BlockLifetime,
    pub(super) from: f64,
    pub(super) to: f64,
}

impl Memory {
    /// Places the blocks of a graph.
    pub(super) fn new(description: &Description) -> Self {
        let blocks = &description.blocks;
        let num_steps = description.segments.len() + description.breaks.len();
        let mut num_moments = vec![0; num_steps];
        for moment in blocks.iter().flat_map(|block| [block.from, block.to]).filter(|moment| moment.step < num_steps) {
            num_moments[moment.step] += 1;
        }
        let place = |moment: Moment| match num_moments.get(moment.step) {
            Some(&moments) => moment.step as f64 + (moment.order + 1) as f64 / f64::from(moments + 1),
            None => num_steps as f64,
        };
        let placed = blocks
            .iter()
            .map(|&block| Placed { block, from: place(block.from), to: place(block.to) })
            .collect::<Vec<_>>();
        Self { usage: usage(&placed), blocks: placed }
    }

    /// Returns the most bytes that are in use at one moment.
    pub(super) fn peak_bytes(&self) -> usize {
        self.usage.iter().map(|&(_, bytes)| bytes).max().unwrap_or(0)
    }
}

fn usage(blocks: &[Placed]) -> Vec<(f64, usize)> {
    let mut changes: Vec<(f64, i64)> = blocks
        .iter()
        .flat_map(|placed| {
            let bytes = placed.block.bytes as i64;
            [(placed.from, bytes), (placed.to, -bytes)]
        })
        .collect();
    changes.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut in_use = 0;
    changes
        .into_iter()
        .map(|(at, change)| {
            in_use += change;
            (at, in_use.max(0) as usize)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::inspected;
    use super::*;

    #[test]
    fn moments_of_a_step_lie_evenly_in_it_and_the_last_one_is_the_end() {
        let memory = Memory::new(&inspected(false).description);
        let places: Vec<_> = memory.blocks.iter().map(|placed| (placed.from, placed.to)).collect();
        assert_eq!(places, [(0.25, 0.75), (0.5, 3.0), (1.5, 2.5)]);
        assert_eq!(memory.usage, [(0.25, 512), (0.5, 1536), (0.75, 1024), (1.5, 1280), (2.5, 1024), (3.0, 0)]);
        assert_eq!(memory.peak_bytes(), 1536);
    }
}
