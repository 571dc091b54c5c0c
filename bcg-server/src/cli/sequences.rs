//! Batches of made-up sequences, for what is timed.

use anyhow::Result;
use bcg_models::state::PageLease;
use bcg_models::{ModelRunner, SamplingParams, SequenceInput};

/// The sequences of a batch, with pages of their own.
#[derive(Debug)]
pub(super) struct Sequences {
    tokens: Vec<u32>,
    past_len: usize,
    leases: Vec<PageLease>,
    sampling: SamplingParams,
}

impl Sequences {
    /// Makes `count` sequences with `new_len` new tokens each, behind `past_len` tokens that the KV cache holds already.
    ///
    /// Pages are taken in turns, so that no sequence's pages lie side by side: as in a server that decodes for a while.
    pub(super) fn new(runner: &ModelRunner, count: usize, new_len: usize, past_len: usize) -> Result<Self> {
        let vocab = runner.config().vocab_size as u64;
        let tokens = (1..=new_len as u64).map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) % vocab) as u32).collect();
        let mut leases = (0..count).map(|_| runner.pages().lease(0)).collect::<Result<Vec<_>, _>>()?;
        for _ in 0..runner.pages().pages_for(past_len + new_len) {
            leases.iter_mut().try_for_each(|lease| lease.grow(1))?;
        }
        Ok(Self { tokens, past_len, leases, sampling: SamplingParams::greedy() })
    }

    /// Returns the new tokens of all sequences.
    pub(super) fn num_tokens(&self) -> usize {
        self.tokens.len() * self.leases.len()
    }

    /// Returns what a step of them takes.
    pub(super) fn inputs(&self) -> Vec<SequenceInput<'_>> {
        let leases = self.leases.iter();
        leases
            .map(|lease| SequenceInput {
                tokens: &self.tokens,
                past_len: self.past_len,
                pages: lease.pages(),
                sampling: &self.sampling,
                step: 0,
                top_logprobs: None,
                logits: false,
            })
            .collect()
    }
}
