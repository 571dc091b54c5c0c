//! The host's half of a step's inputs: what is uploaded, put together once, whatever the number of ranks (law L13).

use std::ops::Range;

use bcg_kernels::{attention_prefill_plan, attention_prefill_plan_len};
use bcg_runtime::Rows;
use serde::{Deserialize, Serialize};

use super::buffers::{InputBuffers, SECTION_ALIGNMENT};
use super::{Phase, SequenceInput};
use crate::sampling::SamplingParams;

/// A batch as it is uploaded: the same values to the same places on every rank.
#[derive(Debug, Serialize, Deserialize)]
pub struct StagedBatch {
    pub(super) phase: Phase,
    #[serde(with = "RowsOnTheWire")]
    pub(super) rows: Rows,
    pub(super) num_sequences: usize,
    /// Prompts that sequences with one new token lead.
    pub(super) is_mixed: bool,
    /// Section after section, and behind them the used columns of the page table.
    pub(super) values: Vec<i32>,
    /// The columns of the page table that are used.
    pub(super) width: usize,
    /// The lists of what is pushed; in the prefill role only.
    pub(super) pushed: Vec<i32>,
}

impl StagedBatch {
    /// The phase that the batch is run in.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The batch's rows.
    pub fn rows(&self) -> Rows {
        self.rows
    }

    /// Sequences in the batch.
    pub fn num_sequences(&self) -> usize {
        self.num_sequences
    }
}

/// [`Rows`], as other nodes get them.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Rows")]
struct RowsOnTheWire {
    valid: usize,
    padded: usize,
}

/// The sampling parameters of a batch, one value for each sequence, as they are uploaded.
#[derive(Debug, Serialize, Deserialize)]
pub struct StagedSampling {
    pub(super) temperature: Vec<f32>,
    /// 0 keeps all.
    pub(super) top_k: Vec<i32>,
    pub(super) top_p: Vec<f32>,
    pub(super) min_p: Vec<f32>,
    pub(super) seed: Vec<i64>,
    pub(super) step: Vec<i64>,
}

impl StagedSampling {
    /// Puts together the parameters of a batch.
    pub fn new(batch: &[SequenceInput<'_>]) -> Self {
        let floats = |field: fn(&SamplingParams) -> f32| -> Vec<f32> {
            batch.iter().map(|sequence| field(sequence.sampling)).collect()
        };
        let top_k =
            |sequence: &SequenceInput<'_>| sequence.sampling.top_k.map_or(0, |k| i32::try_from(k).unwrap_or(i32::MAX));
        Self {
            temperature: floats(|params| params.temperature),
            top_k: batch.iter().map(top_k).collect(),
            top_p: floats(|params| params.top_p),
            min_p: floats(|params| params.min_p),
            seed: batch.iter().map(|sequence| sequence.sampling.seed.cast_signed()).collect(),
            step: batch.iter().map(|sequence| sequence.num_drawn.cast_signed()).collect(),
        }
    }
}

/// Appends a section of `len` values, padded to where the next one begins, and returns where it lies. `push` appends the
/// first values, `padding` stands for the others.
fn push_section(staging: &mut Vec<i32>, len: usize, padding: i32, push: impl FnOnce(&mut Vec<i32>)) -> Range<usize> {
    let begin = staging.len();
    push(staging);
    debug_assert!(staging.len() <= begin + len, "a section holds {len} values");
    staging.resize(begin + len, padding);
    staging.resize((begin + len).next_multiple_of(SECTION_ALIGNMENT), 0);
    begin..begin + len
}

/// The row after the last one of each sequence.
fn ends(batch: &[SequenceInput<'_>]) -> impl Iterator<Item = i32> {
    batch.iter().scan(0, |end, sequence| {
        *end += sequence.num_new() as i32;
        Some(*end)
    })
}

/// The sequences at the front of the batch that have one new token.
fn num_decodes(batch: &[SequenceInput<'_>]) -> usize {
    batch.iter().take_while(|sequence| sequence.num_new() == 1).count()
}

/// Appends the slots of these positions of a sequence, page by page.
fn push_slots(staging: &mut Vec<i32>, pages: &[u32], page_size: usize, positions: Range<usize>) {
    let mut begin = positions.start;
    while begin < positions.end {
        let page = begin / page_size;
        let end = positions.end.min((page + 1) * page_size);
        let first = pages[page] as usize * page_size + begin % page_size;
        staging.extend((first..first + (end - begin)).map(|slot| slot as i32));
        begin = end;
    }
}

impl InputBuffers {
    /// Puts together a batch for a forward of `phase` that is padded to `padded` rows. With `write_kv` off no key, value or
    /// state is kept: a dummy batch.
    ///
    /// # Panics
    /// If the batch has more than `padded` tokens, a sequence has too few pages, or one of a decode has several tokens.
    pub fn stage(&mut self, batch: &[SequenceInput<'_>], phase: Phase, padded: usize, write_kv: bool) -> StagedBatch {
        let valid: usize = batch.iter().map(SequenceInput::num_new).sum();
        assert!(valid <= padded, "{valid} tokens do not fit into {padded} rows");
        assert!(phase == Phase::Prefill || Phase::of(batch) == phase, "a decode has one new token a sequence");
        let mut staged = StagedBatch {
            phase,
            rows: Rows { valid, padded },
            num_sequences: batch.len(),
            is_mixed: phase == Phase::Prefill && num_decodes(batch) > 0,
            values: std::mem::take(&mut self.values),
            width: 0,
            pushed: std::mem::take(&mut self.pushed),
        };
        self.stage_tokens(&mut staged, batch, write_kv);
        self.stage_sequences(&mut staged, batch, write_kv);
        self.stage_page_tables(&mut staged, batch);
        if let Some(push) = &self.push {
            push.stage(&mut staged.pushed, if write_kv { batch } else { &[] }, self.page_size);
        }
        staged
    }

    /// Takes the memory of a batch that is uploaded back, for the next one.
    pub fn take_back(&mut self, staged: StagedBatch) {
        (self.values, self.pushed) = (staged.values, staged.pushed);
    }

    /// Begins the staging with tokens, positions, slots and last rows.
    fn stage_tokens(&self, staged: &mut StagedBatch, batch: &[SequenceInput<'_>], write_kv: bool) {
        let (staging, page_size, Rows { valid, padded }) = (&mut staged.values, self.page_size, staged.rows);
        staging.clear();
        push_section(staging, padded, 0, |staging| {
            for s in batch {
                staging.extend(s.tokens.iter().map(|token| token.cast_signed()));
                // As `unpack_inputs` reads it.
                staging.extend(s.chosen.map(|token| -1 - self.chosen_slots.index_of(token) as i32));
            }
        });
        push_section(staging, padded, 0, |staging| {
            batch.iter().for_each(|s| staging.extend(s.past_len as i32..s.kv_len() as i32));
        });
        let written = if write_kv { batch } else { &[] };
        push_section(staging, padded, -1, |staging| {
            written.iter().for_each(|s| push_slots(staging, s.pages, page_size, s.past_len..s.kv_len()));
        });
        push_section(staging, 2, 0, |staging| staging.extend([valid as i32, batch.len() as i32]));
        push_section(staging, self.capacity(padded), 0, |staging| {
            staging.extend(ends(batch).map(|end| end - 1));
        });
    }

    /// Appends what is known of each sequence, and the plan of the phase's attention.
    fn stage_sequences(&mut self, staged: &mut StagedBatch, batch: &[SequenceInput<'_>], write_state: bool) {
        let (capacity, plan_len) = (self.capacity(staged.rows.padded), self.prefill_plan_len(staged));
        let StagedBatch { phase, rows, is_mixed, values: staging, .. } = staged;
        let plan = &mut self.plan;
        let lens = push_section(staging, capacity, 0, |staging| {
            staging.extend(batch.iter().map(|sequence| sequence.kv_len() as i32));
        });
        let slots = |sequence: &SequenceInput<'_>| sequence.state.map(|state| state.slots(sequence.past_len));
        let number = |slot: Option<u32>| slot.map_or(-1, u32::cast_signed);
        push_section(staging, capacity, -1, |staging| {
            staging.extend(batch.iter().map(|sequence| number(slots(sequence).and_then(|(read, _)| read))));
        });
        let written = if write_state { batch } else { &[] };
        push_section(staging, capacity, -1, |staging| {
            staging.extend(written.iter().map(|sequence| number(slots(sequence).map(|(_, write)| write))));
        });
        if *phase == Phase::Decode {
            self.decode_plan.fill(&staging[lens.start..][..batch.len()], plan);
            push_section(staging, plan.len(), 0, |staging| staging.extend_from_slice(plan));
        }
        let starts = push_section(staging, capacity + 1, rows.valid as i32, |staging| {
            staging.push(0);
            staging.extend(ends(batch));
        });
        let planned = if *phase == Phase::Prefill { batch.len() } else { 0 };
        attention_prefill_plan(&staging[starts.clone()][..=planned], &staging[lens.clone()][..planned], plan);
        push_section(staging, plan_len, 0, |staging| staging.extend_from_slice(plan));
        if !*is_mixed {
            return;
        }
        let decodes = num_decodes(batch);
        let prompt_starts = push_section(staging, capacity + 1, rows.valid as i32, |staging| {
            // Each of those at the front has one row.
            staging.extend_from_within(starts);
            let begin = staging.len() - (capacity + 1);
            staging[begin..begin + decodes].fill(decodes as i32);
        });
        attention_prefill_plan(&staging[prompt_starts][..=planned], &staging[lens.clone()][..planned], plan);
        push_section(staging, plan_len, 0, |staging| staging.extend_from_slice(plan));
        let decode_lens = lens.start..lens.start + decodes;
        push_section(staging, capacity, 0, |staging| staging.extend_from_within(decode_lens.clone()));
        self.decode_plan.fill(&staging[decode_lens], plan);
        push_section(staging, plan.len(), 0, |staging| staging.extend_from_slice(plan));
    }

    /// Appends the page tables, as wide as the longest sequence needs.
    fn stage_page_tables(&self, staged: &mut StagedBatch, batch: &[SequenceInput<'_>]) {
        let pages_of = |sequence: &SequenceInput<'_>| sequence.kv_len().div_ceil(self.page_size);
        let (width, values) = (batch.iter().map(pages_of).max().unwrap_or(1), &mut staged.values);
        let begin = values.len();
        for (i, sequence) in batch.iter().enumerate() {
            values.extend(sequence.pages[..pages_of(sequence)].iter().map(|page| page.cast_signed()));
            values.resize(begin + (i + 1) * width, 0);
        }
        staged.width = width;
    }

    /// The most sequences of a batch of some padded rows.
    pub(super) fn capacity(&self, padded: usize) -> usize {
        padded.min(self.limits.sequences)
    }

    /// The room for the order of the work of prompts.
    pub(super) fn prefill_plan_len(&self, staged: &StagedBatch) -> usize {
        match staged.phase {
            Phase::Prefill => attention_prefill_plan_len(staged.rows.padded, self.capacity(staged.rows.padded)),
            Phase::Decode => 1,
        }
    }
}
