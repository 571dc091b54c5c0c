//! What a router remembers of the prompts that it sent to one replica, so that no worker has to be asked what its prefix
//! cache holds.
//!
//! A prompt is cut into blocks of [`BLOCK_TOKENS`] tokens, and a block is named by a hash of its tokens and of the name of
//! the block before it: so a name stands for a whole prefix. Names are kept in two generations. What is used goes to the
//! young one; when that is full it becomes the old one, and what the old one held is forgotten. So a record of n names
//! holds between n / 2 and n of those that were used last, in a bounded number of bytes and without any order to keep.
//!
//! A record guesses: a prefix may be gone from the cache, or not be computed yet, and two prefixes may have one name. A
//! wrong guess costs a worse choice of replica, and nothing else.

use std::collections::HashSet;
use std::hash::{BuildHasher, Hasher, RandomState};

/// Tokens of a block. Prefixes are compared in whole blocks.
pub(crate) const BLOCK_TOKENS: usize = 64;

/// The most blocks that a record holds of a replica, 4 million tokens; it takes at most 2 MB.
const BLOCKS_MAX: usize = 1 << 16;

/// The name of a prefix that ends with a block.
pub(crate) type BlockName = u64;

/// Returns the names of the whole blocks of a prompt. Names are drawn anew for each process, so that nobody can make prompts
/// whose names are equal.
pub(crate) fn block_names(names: &RandomState, prompt: &[u32]) -> Vec<BlockName> {
    let mut before = 0;
    let name = |block: &[u32]| {
        let mut hasher = names.build_hasher();
        hasher.write_u64(before);
        std::hash::Hash::hash(block, &mut hasher);
        before = hasher.finish();
        before
    };
    prompt.chunks_exact(BLOCK_TOKENS).map(name).collect()
}

/// The blocks of the prompts that were sent to a replica last.
#[derive(Debug)]
pub(crate) struct PrefixRecord {
    /// The most blocks in one generation.
    generation_max: usize,
    young: HashSet<BlockName>,
    old: HashSet<BlockName>,
}

impl PrefixRecord {
    /// Makes a record of as many blocks as fit into a prefix cache of this many tokens.
    pub(crate) fn new(cache_tokens: usize) -> Self {
        let blocks = (cache_tokens / BLOCK_TOKENS).min(BLOCKS_MAX);
        Self { generation_max: blocks / 2, young: HashSet::new(), old: HashSet::new() }
    }

    /// Returns how many tokens of a prompt are cached, as far as is known. The last token never is: it has to run.
    pub(crate) fn cached_tokens(&self, blocks: &[BlockName], prompt_tokens: usize) -> usize {
        let is_known = |block: &&BlockName| self.young.contains(block) || self.old.contains(block);
        let known = blocks.iter().take_while(is_known).count();
        (known * BLOCK_TOKENS).min(prompt_tokens.saturating_sub(1))
    }

    /// Notes that a prompt was sent. Of one that is longer than the record, the begin is kept.
    pub(crate) fn note(&mut self, blocks: &[BlockName]) {
        for block in blocks.iter().take(self.generation_max) {
            if self.young.len() >= self.generation_max && !self.young.contains(block) {
                self.old = std::mem::take(&mut self.young);
            }
            self.young.insert(*block);
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.young.clear();
        self.old.clear();
    }

    /// Returns how many blocks it holds.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.young.union(&self.old).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(blocks: usize, first: u32) -> Vec<u32> {
        (first..).take(blocks * BLOCK_TOKENS).collect()
    }

    #[test]
    fn the_longest_known_prefix_counts_and_never_the_last_token() {
        let names = RandomState::new();
        let mut record = PrefixRecord::new(100 * BLOCK_TOKENS);
        let known = prompt(3, 0);
        record.note(&block_names(&names, &known));
        let cached = |prompt: &[u32]| record.cached_tokens(&block_names(&names, prompt), prompt.len());
        assert_eq!(cached(&[&known[..], &[7; 100]].concat()), 3 * BLOCK_TOKENS);
        assert_eq!(cached(&known), 3 * BLOCK_TOKENS - 1);
        assert_eq!(cached(&known[..3 * BLOCK_TOKENS - 1]), 2 * BLOCK_TOKENS);
        assert_eq!((cached(&known[1..]), cached(&known[BLOCK_TOKENS..]), cached(&[])), (0, 0, 0), "another begin");
    }

    #[test]
    fn what_was_used_last_stays_and_the_rest_is_forgotten() {
        let names = RandomState::new();
        let mut record = PrefixRecord::new(20 * BLOCK_TOKENS);
        let used = block_names(&names, &prompt(2, 1_000_000));
        for at in 0..50 {
            record.note(&used);
            record.note(&block_names(&names, &prompt(3, 1000 * at)));
            assert_eq!(record.cached_tokens(&used, 1000), 2 * BLOCK_TOKENS, "after {at}");
            assert!(record.len() <= 20, "{}", record.len());
        }
        assert_eq!(record.cached_tokens(&block_names(&names, &prompt(3, 0)), 1000), 0, "the first is long gone");
        record.note(&block_names(&names, &prompt(1000, 5_000_000)));
        assert!(record.len() <= 20, "a prompt that is too long");
        record.clear();
        assert_eq!(record.len(), 0);
    }

    #[test]
    fn without_a_cache_nothing_is_remembered() {
        let names = RandomState::new();
        let mut record = PrefixRecord::new(0);
        let blocks = block_names(&names, &prompt(3, 0));
        record.note(&blocks);
        assert_eq!((record.cached_tokens(&blocks, 1000), record.len()), (0, 0));
    }
}
