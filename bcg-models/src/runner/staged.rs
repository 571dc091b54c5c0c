//! A step as every rank gets it: decided and put together once, on the caller's thread (law L13).

use serde::{Deserialize, Serialize};

use crate::batch::{SequenceInput, StagedBatch, StagedSampling};

/// How a forward runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Path {
    /// As the replay of the graph of its padded rows.
    Replay,
    /// As the capture of that graph.
    Capture,
    /// Operation by operation.
    Eager,
}

/// One step: what it runs, what it reads, and what is asked of its tokens.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct StagedStep {
    /// How it runs in the first stage.
    pub(super) path: Path,
    /// How it runs in the stages after the first one; as in the first one where there is nothing said. All of them run the
    /// same padded rows.
    pub(super) later_paths: Vec<Path>,
    pub(super) batch: StagedBatch,
    /// The slot for the tokens that it chooses.
    pub(super) slot: usize,
    /// The slot of the newest tokens that it takes and the host need not have read.
    pub(super) awaited: Option<usize>,
    /// `None` chooses the most likely tokens.
    pub(super) sampling: Option<StagedSampling>,
    pub(super) asked: StagedChoice,
}

/// What sequences ask of their logits, and about them.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct StagedChoice {
    /// The row, the token and the value of each bias.
    pub(super) bias_rows: Vec<i32>,
    pub(super) bias_tokens: Vec<i32>,
    pub(super) bias_values: Vec<f32>,
    /// The rows with a mask, and their masks' words.
    pub(super) mask_rows: Vec<i32>,
    pub(super) mask_words: Vec<i32>,
    /// The rows that ask for log probabilities.
    pub(super) logprob_rows: Vec<i32>,
    /// The most alternatives that one of them asks for.
    pub(super) most_logprobs: usize,
}

impl StagedStep {
    /// How it runs in a stage.
    pub(super) fn path(&self, stage: usize) -> Path {
        let later = stage.checked_sub(1).and_then(|later| self.later_paths.get(later));
        later.copied().unwrap_or(self.path)
    }
}

impl StagedChoice {
    pub(super) fn new(batch: &[SequenceInput<'_>]) -> Self {
        let mut staged = Self::default();
        for (sequence, row) in batch.iter().zip(0..) {
            for &(token, value) in sequence.logit_bias {
                staged.bias_rows.push(row);
                staged.bias_tokens.push(token.cast_signed());
                staged.bias_values.push(value);
            }
            if let Some(mask) = sequence.token_mask {
                staged.mask_rows.push(row);
                staged.mask_words.extend(mask.iter().map(|word| word.cast_signed()));
            }
            if let Some(count) = sequence.top_logprobs {
                staged.logprob_rows.push(row);
                staged.most_logprobs = staged.most_logprobs.max(count);
            }
        }
        staged
    }
}
