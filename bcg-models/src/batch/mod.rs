//! A batch on its way through the model: what the host knows of it, and the device buffers that the forward reads.
//!
//! Two kinds of device inputs, and the line between them is law L1:
//! - [`TokenInputs`] are read by captured code. Their addresses and (padded) sizes are frozen, their contents are uploaded
//!   before each forward. In a decode they hold all that attention reads, so a decode is one graph without breaks.
//! - [`ForwardBatch`] is the live batch, which only breaks can see: sequence starts, lengths, page table, and the number of
//!   sequences, which is never frozen.
//!
//! A padded row has token 0, position 0 and slot −1 (nothing is written to the KV cache), and belongs to no sequence.
//! Captured code that mixes rows reads from `num_valid` where they begin.
//! What attention reads is padded to a capacity of sequences, which have no rows and no keys: addresses and shapes depend
//! on the phase and the padded rows alone, so every batch of one size makes the same launches, breaks included.

mod buffers;
mod chosen;
mod push;
mod stage;

use bcg_kernels::{StateSlots, gather_rows};
use bcg_runtime::{LiveBatch, OpStream, Result, Rows, Tensor};
use serde::{Deserialize, Serialize};

use crate::sampling::SamplingParams;
use crate::state::StateLease;

pub use buffers::{BatchLimits, InputBuffers, SamplingBuffers};
pub use chosen::{ChosenSlots, ChosenToken};
pub use push::Push;
pub use stage::{StagedBatch, StagedSampling};

/// One sequence's part of a step.
#[derive(Debug, Clone, Copy)]
pub struct SequenceInput<'a> {
    /// The new tokens that the host knows; at least one, unless there is a `chosen` one.
    pub tokens: &'a [u32],
    /// One more new token, which the host need not know yet: one that the step launched last chose, or, with a pipeline of
    /// S stages, one of the last S steps.
    pub chosen: Option<ChosenToken>,
    /// Tokens of the sequence that the KV cache holds already.
    pub past_len: usize,
    /// The sequence's pages, with room for `past_len + tokens.len()` tokens.
    pub pages: &'a [u32],
    /// The sequence's state, for a model with state-space layers; without one (a dummy batch) a step starts from zeros and
    /// keeps no state.
    pub state: Option<&'a StateLease>,
    /// How the next token is chosen.
    pub sampling: &'a SamplingParams,
    /// How many tokens the sequence has drawn before; with the seed it fixes the random choice.
    pub num_drawn: u64,
    /// Tokens and what is added to their logits; each token once.
    pub logit_bias: &'a [(u32, f32)],
    /// The tokens that may be chosen, those whose bit `token % 32` of word `token / 32` is set; `None` allows all.
    pub token_mask: Option<&'a [u32]>,
    /// `Some(n)` returns the token's log probability and those of the `n` most likely tokens.
    pub top_logprobs: Option<usize>,
    /// Returns the logits of the last row.
    pub logits: bool,
    /// In the prefill role, where what the step writes goes besides.
    pub push: Option<Push<'a>>,
}

impl<'a> SequenceInput<'a> {
    /// New tokens after `past_len` tokens, without a state and with nothing asked for but the next token.
    pub fn new(tokens: &'a [u32], past_len: usize, pages: &'a [u32], sampling: &'a SamplingParams) -> Self {
        Self {
            tokens,
            chosen: None,
            past_len,
            pages,
            state: None,
            sampling,
            num_drawn: 0,
            logit_bias: &[],
            token_mask: None,
            top_logprobs: None,
            logits: false,
            push: None,
        }
    }

    /// New tokens, the one that the host need not know included.
    pub fn num_new(&self) -> usize {
        self.tokens.len() + usize::from(self.chosen.is_some())
    }

    /// Tokens that the KV cache holds after the step.
    pub fn kv_len(&self) -> usize {
        self.past_len + self.num_new()
    }
}

/// What a forward is, by the shape of its batch. Each phase has graphs of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Phase {
    /// Some sequence has several new tokens; others may have one (a mixed batch). Attention is a break.
    Prefill,
    /// Each sequence has exactly one new token. Everything is captured, attention too.
    Decode,
}

impl Phase {
    /// Both phases.
    pub const ALL: [Self; 2] = [Self::Prefill, Self::Decode];

    /// The name in messages and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }

    /// The phase of a batch.
    pub fn of(batch: &[SequenceInput<'_>]) -> Self {
        if batch.iter().all(|sequence| sequence.num_new() == 1) { Self::Decode } else { Self::Prefill }
    }
}

/// What captured code reads of a batch, one value for each padded row.
#[derive(Debug, Clone)]
pub struct TokenInputs {
    /// `[T]` i32.
    pub token_ids: Tensor,
    /// `[T]` i32: each token's position in its sequence.
    pub positions: Tensor,
    /// `[T]` i32: `page * S + offset`, or −1.
    pub slot_mapping: Tensor,
    /// `[1]` i32: the rows that are not padding.
    pub num_valid: Tensor,
    /// `[1]` i32: the sequences of the batch.
    pub num_sequences: Tensor,
    /// `[Bmax]` i32: the last row of each sequence, and 0 after the last sequence. `None` if there are no more rows than that,
    /// or if the hidden states of all rows are wanted.
    pub last_rows: Option<Tensor>,
    /// What attention reads in a decode; in a prefill, the live batch has it.
    pub decode: Option<DecodeInputs>,
    /// What the stage before hands on; `None` in the first stage of a pipeline.
    pub received: Option<Received>,
}

/// What a stage of a pipeline gets from the one before it.
#[derive(Debug, Clone)]
pub struct Received {
    /// `[T, C]`: what the last sublayer of that stage returned, which no norm has added to the stream yet. Of several ranks
    /// each has its part of a sum, from the same rank of that stage.
    pub branch: Tensor,
    /// `[T, C]`: the residual stream.
    pub residual: Tensor,
}

impl TokenInputs {
    /// Keeps the rows of `x`, `[T, C]`, whose hidden states are wanted: `[Bmax, C]`, or all if there is no choice.
    ///
    /// # Errors
    /// Those of [`gather_rows`].
    pub fn keep_wanted(&self, cx: &mut OpStream, x: Tensor) -> Result<Tensor> {
        match &self.last_rows {
            Some(last_rows) => gather_rows(cx, &x, last_rows),
            None => Ok(x),
        }
    }

    /// The rows that are not padding among those that [`keep_wanted`](Self::keep_wanted) keeps, `[1]` i32.
    pub fn num_wanted(&self) -> &Tensor {
        if self.last_rows.is_some() { &self.num_sequences } else { &self.num_valid }
    }
}

/// What captured attention reads of a decode.
#[derive(Debug, Clone)]
pub struct DecodeInputs {
    /// `[T]` i32: keys of each sequence, the new one included; 0 for padded rows.
    pub kv_lens: Tensor,
    /// `[T, pages]` i32, as wide as the longest possible sequence needs.
    pub page_table: Tensor,
    /// How attention is spread over the device; see [`DecodePlan`](bcg_kernels::DecodePlan).
    pub plan: Tensor,
    /// `[T]` slots.
    pub states: StateSlots,
}

/// A mixed batch taken apart for attention: what has one new token goes to the kernel of decodes, which reads keys at the
/// speed of memory, and not to that of prompts, which would work on 128 rows for each.
///
/// The sequences with one new token are those at the front of the batch; any others count as prompts. A batch without such
/// sequences is not taken apart, so it launches one kernel a layer and a mixed one two: a graph holds an executable for
/// each of the two.
#[derive(Debug)]
pub struct AttentionSplit {
    /// `[Bmax + 1]` i32: as `cu_seqlens_q`, with sequences at the front that have no rows.
    pub prompt_starts: Tensor,
    /// The plan of [`attention_prefill`](bcg_kernels::attention_prefill) for them.
    pub prompt_plan: Tensor,
    /// `[Bmax]` i32: keys of each sequence at the front; 0 after the last one of them.
    pub decode_kv_lens: Tensor,
    /// The plan of [`attention_decode`](bcg_kernels::attention_decode) for them.
    pub decode_plan: Tensor,
}

/// The live batch.
///
/// Apart from `last_rows`, its tensors have room for the most sequences of the padded rows, Bmax: all batches of a phase
/// and a padded size have the same addresses and shapes. Sequences after the last one are empty.
#[derive(Debug)]
pub struct ForwardBatch {
    rows: Rows,
    num_sequences: usize,
    phase: Phase,
    /// `[Bmax + 1]` i32: the first row of each sequence, and from there on the end of the last one.
    pub cu_seqlens_q: Tensor,
    /// `[Bmax]` i32, new tokens included; 0 after the last sequence.
    pub kv_lens: Tensor,
    /// `[Bmax, pages]` i32, as wide as the longest possible sequence needs. Only the pages of the sequences' tokens count.
    pub page_table: Tensor,
    /// `[Bmax]` slots.
    pub states: StateSlots,
    /// `[B]` i32: the last row of each sequence.
    pub last_rows: Tensor,
    /// The order of the work of [`mla_prefill`](bcg_kernels::mla_prefill()), which takes all sequences, with room for the
    /// longest one; without items in a decode.
    pub prefill_plan: Tensor,
    /// `None` in a decode, and in a prefill that no sequence with one new token leads.
    pub split: Option<AttentionSplit>,
    /// In the prefill role, what goes to the decode role.
    push: Option<push::PushLists>,
}

impl ForwardBatch {
    /// Sequences in the batch.
    pub fn num_sequences(&self) -> usize {
        self.num_sequences
    }

    /// The batch's phase.
    pub fn phase(&self) -> Phase {
        self.phase
    }
}

impl LiveBatch for ForwardBatch {
    fn rows(&self) -> Option<Rows> {
        Some(self.rows)
    }
}
