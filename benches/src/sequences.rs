//! Batches of made-up sequences, for what is timed.

use anyhow::Result;
use bcg_models::state::PageLease;
use bcg_models::{ModelRunner, SamplingParams, SequenceInput};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// The sequences of a batch, with pages of their own.
#[derive(Debug)]
pub struct Sequences {
    /// Tokens of the longest sequence; shorter ones take its first.
    tokens: Vec<u32>,
    new_lens: Vec<usize>,
    past_len: usize,
    leases: Vec<PageLease>,
    sampling: SamplingParams,
}

impl Sequences {
    /// Makes `count` sequences with `new_len` new tokens each, after `past_len` tokens that the KV cache holds already.
    ///
    /// Pages are taken in turns, so that no sequence's pages lie side by side: as in a server that decodes for a while.
    ///
    /// # Errors
    /// If the KV cache is too small.
    pub fn new(runner: &ModelRunner, count: usize, new_len: usize, past_len: usize) -> Result<Self> {
        Self::of_lens(runner, vec![new_len; count], past_len)
    }

    /// As [`Sequences::new`], with as many new tokens for each sequence as `new_lens` says.
    ///
    /// # Errors
    /// As [`Sequences::new`].
    pub fn of_lens(runner: &ModelRunner, new_lens: Vec<usize>, past_len: usize) -> Result<Self> {
        let (vocab, longest) = (runner.config().vocab_size as u32, new_lens.iter().copied().max().unwrap_or(0));
        let mut random = SmallRng::seed_from_u64(1);
        let tokens = (0..longest).map(|_| random.random_range(0..vocab)).collect();
        let mut leases = new_lens.iter().map(|_| runner.pages().lease(0)).collect::<Result<Vec<_>, _>>()?;
        for _ in 0..runner.pages().pages_for(past_len + longest) {
            leases.iter_mut().try_for_each(|lease| lease.grow(1))?;
        }
        let sequences = Self { tokens, new_lens, past_len, leases, sampling: SamplingParams::greedy() };
        sequences.rewind();
        Ok(sequences)
    }

    /// Lets the states, whatever they hold, stand for the past again: a step moved them on.
    pub fn rewind(&self) {
        self.leases.iter().filter_map(PageLease::state).for_each(|state| state.assume(self.past_len));
    }

    /// Returns the new tokens of all sequences.
    pub fn num_tokens(&self) -> usize {
        self.new_lens.iter().sum()
    }

    /// Returns what a step of them takes.
    pub fn inputs(&self) -> Vec<SequenceInput<'_>> {
        let leases = self.leases.iter().zip(&self.new_lens);
        leases
            .map(|(lease, &new_len)| SequenceInput {
                state: lease.state(),
                ..SequenceInput::new(&self.tokens[..new_len], self.past_len, lease.pages(), &self.sampling)
            })
            .collect()
    }
}
