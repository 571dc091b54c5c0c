//! Which blocks a capture takes, from when to when.
//!
//! A log lives as long as a capture. Its moments are steps of the graph, and within a step the order in which blocks
//! are taken and freed: the host's order, which is the order in which the device's work uses them.

/// A moment of a graph's forward: how far it is in taking and freeing arena blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment {
    /// The step, counting segments and breaks together.
    pub step: usize,
    /// How many blocks were taken and freed in this step before.
    pub order: usize,
}

/// A block of the arena, and how long a graph's forward holds it; see
/// [`Description`](crate::Description) for where it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockLifetime {
    /// Where the block begins, in bytes from the arena's base.
    pub offset: usize,
    /// The size of the block, in bytes.
    pub bytes: usize,
    /// When the block is taken.
    pub from: Moment,
    /// When the block is free again; a block that the output uses is held to the end, which is one step past the last.
    pub to: Moment,
}

/// The blocks of the capture that is open.
#[derive(Debug, Default)]
pub(super) struct BlockLog {
    now: Moment,
    blocks: Vec<BlockLifetime>,
    /// The indices of the `blocks` that are held now.
    held: Vec<usize>,
}

impl BlockLog {
    pub(super) fn begin_step(&mut self, step: usize) {
        if step != self.now.step {
            self.now = Moment { step, order: 0 };
        }
    }

    pub(super) fn taken(&mut self, offset: usize, bytes: usize) {
        let from = self.tick();
        self.held.push(self.blocks.len());
        self.blocks.push(BlockLifetime { offset, bytes, from, to: from });
    }

    pub(super) fn freed(&mut self, offset: usize) {
        // Blocks that are held do not overlap, so the offset names one of them.
        if let Some(at) = self.held.iter().rposition(|&block| self.blocks[block].offset == offset) {
            let block = self.held.swap_remove(at);
            self.blocks[block].to = self.tick();
        }
    }

    /// Returns the blocks in the order in which they were taken; those still held are held to the end.
    pub(super) fn end(mut self, num_steps: usize) -> Vec<BlockLifetime> {
        let end = Moment { step: num_steps, order: 0 };
        self.held.into_iter().for_each(|block| self.blocks[block].to = end);
        self.blocks
    }

    fn tick(&mut self) -> Moment {
        let now = self.now;
        self.now.order += 1;
        now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_held_from_the_moment_it_is_taken_until_it_is_freed_or_the_end() {
        let mut log = BlockLog::default();
        log.taken(0, 512);
        log.taken(512, 256);
        log.freed(0);
        log.begin_step(1);
        log.taken(0, 1024);
        log.begin_step(1); // again: the same step
        log.freed(512);
        let moment = |step, order| Moment { step, order };
        assert_eq!(
            log.end(2),
            [
                BlockLifetime { offset: 0, bytes: 512, from: moment(0, 0), to: moment(0, 2) },
                BlockLifetime { offset: 512, bytes: 256, from: moment(0, 1), to: moment(1, 1) },
                BlockLifetime { offset: 0, bytes: 1024, from: moment(1, 0), to: moment(2, 0) },
            ]
        );
    }
}
