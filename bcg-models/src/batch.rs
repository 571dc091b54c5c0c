//! A batch on its way through the model: what the host knows of it, and the device buffers that the forward reads.
//!
//! Two kinds of device inputs, and the line between them is law L1:
//! - [`TokenInputs`] are read by captured code. Their addresses and (padded) sizes are frozen, their contents are uploaded
//!   before each forward.
//! - [`ForwardBatch`] is the live batch, which only breaks can see: sequence starts, lengths, page table, and the number of
//!   sequences, which is never frozen.
//!
//! A padded row has token 0, position 0 and slot −1 (nothing is written to the KV cache), and belongs to no sequence.

use bcg_runtime::{DType, Device, LiveBatch, Result, Rows, Runner, Tensor};

use crate::sampling::SamplingParams;

/// One sequence's part of a step.
#[derive(Debug, Clone, Copy)]
pub struct SequenceInput<'a> {
    /// The new tokens, at least one.
    pub tokens: &'a [u32],
    /// Tokens of the sequence that the KV cache holds already.
    pub past_len: usize,
    /// The sequence's pages, with room for `past_len + tokens.len()` tokens.
    pub pages: &'a [u32],
    /// How the next token is chosen.
    pub sampling: &'a SamplingParams,
    /// How many tokens the sequence has drawn before; with the seed it fixes the random choice.
    pub step: u64,
    /// `Some(n)` returns the token's log probability and those of the `n` most likely tokens.
    pub top_logprobs: Option<usize>,
    /// Returns the logits of the last row.
    pub logits: bool,
}

impl SequenceInput<'_> {
    /// Tokens that the KV cache holds after the step.
    pub fn kv_len(&self) -> usize {
        self.past_len + self.tokens.len()
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
}

/// The live batch.
#[derive(Debug)]
pub struct ForwardBatch {
    rows: Rows,
    num_sequences: usize,
    is_decode: bool,
    /// `[B + 1]` i32: the first row of each sequence, and the end of the last one.
    pub cu_seqlens_q: Tensor,
    /// `[B]` i32, new tokens included. In a decode, `[T]` with 0 for padded rows.
    pub kv_lens: Tensor,
    /// `[B, pages]` i32, as wide as the longest sequence needs. In a decode, `[T, pages]`.
    pub page_table: Tensor,
    /// `[B]` i32: the last row of each sequence.
    pub last_rows: Tensor,
}

impl ForwardBatch {
    /// Sequences in the batch.
    pub fn num_sequences(&self) -> usize {
        self.num_sequences
    }

    /// Whether each sequence has exactly one new token.
    pub fn is_decode(&self) -> bool {
        self.is_decode
    }
}

impl LiveBatch for ForwardBatch {
    fn rows(&self) -> Option<Rows> {
        Some(self.rows)
    }
}

/// How large a batch can get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchLimits {
    /// Rows, padded ones included.
    pub rows: usize,
    /// Sequences, and rows of a padded decode.
    pub sequences: usize,
    /// Pages of one sequence.
    pub pages_per_sequence: usize,
}

/// The device buffers of all batches, at fixed addresses, and the host memory in which they are put together.
#[derive(Debug)]
pub struct InputBuffers {
    tokens: TokenInputs,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    page_table: Tensor,
    last_rows: Tensor,
    sampling: SamplingBuffers,
    staging: Vec<i32>,
    page_size: usize,
}

/// The sampling parameters of a batch, one value for each sequence.
#[derive(Debug, Clone)]
pub struct SamplingBuffers {
    /// `[B]` f32.
    pub temperature: Tensor,
    /// `[B]` i32; 0 keeps all.
    pub top_k: Tensor,
    /// `[B]` f32.
    pub top_p: Tensor,
    /// `[B]` f32.
    pub min_p: Tensor,
    /// `[B]` i64.
    pub seed: Tensor,
    /// `[B]` i64.
    pub step: Tensor,
}

impl InputBuffers {
    /// Allocates buffers for batches within `limits`.
    ///
    /// # Errors
    /// The device's.
    pub fn new(device: &Device, limits: BatchLimits, page_size: usize) -> Result<Self> {
        let zeros = |len: usize, dtype| device.zeros(&[len], dtype);
        let (rows, sequences) = (limits.rows, limits.sequences);
        Ok(Self {
            tokens: TokenInputs {
                token_ids: zeros(rows, DType::I32)?,
                positions: zeros(rows, DType::I32)?,
                slot_mapping: zeros(rows, DType::I32)?,
            },
            cu_seqlens_q: zeros(sequences + 1, DType::I32)?,
            kv_lens: zeros(sequences, DType::I32)?,
            page_table: zeros(sequences * limits.pages_per_sequence, DType::I32)?,
            last_rows: zeros(sequences, DType::I32)?,
            sampling: SamplingBuffers {
                temperature: zeros(sequences, DType::F32)?,
                top_k: zeros(sequences, DType::I32)?,
                top_p: zeros(sequences, DType::F32)?,
                min_p: zeros(sequences, DType::F32)?,
                seed: zeros(sequences, DType::I64)?,
                step: zeros(sequences, DType::I64)?,
            },
            staging: Vec::new(),
            page_size,
        })
    }

    /// The inputs that a forward of `rows` padded rows reads.
    ///
    /// # Errors
    /// [`bcg_runtime::Error::Shape`] beyond the limits.
    pub fn token_inputs(&self, rows: usize) -> Result<TokenInputs> {
        Ok(TokenInputs {
            token_ids: self.tokens.token_ids.rows(0..rows)?,
            positions: self.tokens.positions.rows(0..rows)?,
            slot_mapping: self.tokens.slot_mapping.rows(0..rows)?,
        })
    }

    /// Uploads a batch that is padded to `padded` rows. With `write_kv` off no key or value is kept: a dummy batch.
    ///
    /// # Errors
    /// [`bcg_runtime::Error::Shape`] beyond the limits; the driver's.
    ///
    /// # Panics
    /// If the batch has more than `padded` tokens, or a sequence has too few pages.
    pub fn fill(
        &mut self,
        runner: &mut Runner,
        batch: &[SequenceInput<'_>],
        padded: usize,
        write_kv: bool,
    ) -> Result<ForwardBatch> {
        let valid: usize = batch.iter().map(|sequence| sequence.tokens.len()).sum();
        assert!(valid <= padded, "{valid} tokens do not fit into {padded} rows");
        let is_decode = batch.iter().all(|sequence| sequence.tokens.len() == 1);
        self.fill_tokens(runner, batch, padded, write_kv)?;
        // Rows of the per-sequence tensors: a decode has one for each row, padded rows have no keys.
        let slots = if is_decode { padded } else { batch.len() };
        let cu_seqlens_q = self.cu_seqlens_q.rows(0..batch.len() + 1)?;
        let mut end = 0;
        let ends = batch.iter().map(|sequence| {
            end += sequence.tokens.len() as i32;
            end
        });
        self.staging.clear();
        self.staging.push(0);
        self.staging.extend(ends);
        runner.upload(&cu_seqlens_q, &self.staging)?;

        let last_rows = self.last_rows.rows(0..batch.len())?;
        self.staging.remove(0);
        self.staging.iter_mut().for_each(|end| *end -= 1);
        runner.upload(&last_rows, &self.staging)?;

        let kv_lens = self.kv_lens.rows(0..slots)?;
        self.staging.clear();
        self.staging.extend(batch.iter().map(|sequence| sequence.kv_len() as i32));
        self.staging.resize(slots, 0);
        runner.upload(&kv_lens, &self.staging)?;

        let page_table = self.fill_page_table(runner, batch, slots)?;
        let rows = Rows { valid, padded };
        Ok(ForwardBatch { rows, num_sequences: batch.len(), is_decode, cu_seqlens_q, kv_lens, page_table, last_rows })
    }

    fn fill_tokens(
        &mut self,
        runner: &mut Runner,
        batch: &[SequenceInput<'_>],
        padded: usize,
        write_kv: bool,
    ) -> Result<()> {
        let inputs = self.token_inputs(padded)?;
        self.staging.clear();
        self.staging.extend(batch.iter().flat_map(|sequence| sequence.tokens).map(|&token| token.cast_signed()));
        self.staging.resize(padded, 0);
        runner.upload(&inputs.token_ids, &self.staging)?;

        let positions = || batch.iter().flat_map(|sequence| sequence.past_len..sequence.kv_len());
        self.staging.clear();
        self.staging.extend(positions().map(|position| position as i32));
        self.staging.resize(padded, 0);
        runner.upload(&inputs.positions, &self.staging)?;

        let page_size = self.page_size;
        self.staging.clear();
        for sequence in batch {
            let slot = |position: usize| {
                let page = sequence.pages[position / page_size] as usize;
                if write_kv { (page * page_size + position % page_size) as i32 } else { -1 }
            };
            self.staging.extend((sequence.past_len..sequence.kv_len()).map(slot));
        }
        self.staging.resize(padded, -1);
        runner.upload(&inputs.slot_mapping, &self.staging)
    }

    fn fill_page_table(&mut self, runner: &mut Runner, batch: &[SequenceInput<'_>], slots: usize) -> Result<Tensor> {
        let pages_of = |sequence: &SequenceInput<'_>| sequence.kv_len().div_ceil(self.page_size);
        let width = batch.iter().map(pages_of).max().unwrap_or(1);
        self.staging.clear();
        for sequence in batch {
            let begin = self.staging.len();
            self.staging.extend(sequence.pages[..pages_of(sequence)].iter().map(|page| page.cast_signed()));
            self.staging.resize(begin + width, 0);
        }
        self.staging.resize(slots * width, 0);
        let page_table = self.page_table.rows(0..slots * width)?.reshape(&[slots, width])?;
        runner.upload(&page_table, &self.staging)?;
        Ok(page_table)
    }

    /// Uploads the sampling parameters of a batch.
    ///
    /// # Errors
    /// As [`fill`](Self::fill).
    pub fn fill_sampling(&self, runner: &mut Runner, batch: &[SequenceInput<'_>]) -> Result<SamplingBuffers> {
        let rows = |tensor: &Tensor| tensor.rows(0..batch.len());
        let buffers = SamplingBuffers {
            temperature: rows(&self.sampling.temperature)?,
            top_k: rows(&self.sampling.top_k)?,
            top_p: rows(&self.sampling.top_p)?,
            min_p: rows(&self.sampling.min_p)?,
            seed: rows(&self.sampling.seed)?,
            step: rows(&self.sampling.step)?,
        };
        let floats = |field: fn(&SamplingParams) -> f32| -> Vec<f32> {
            batch.iter().map(|sequence| field(sequence.sampling)).collect()
        };
        runner.upload(&buffers.temperature, &floats(|params| params.temperature))?;
        runner.upload(&buffers.top_p, &floats(|params| params.top_p))?;
        runner.upload(&buffers.min_p, &floats(|params| params.min_p))?;
        let top_k =
            |sequence: &SequenceInput<'_>| sequence.sampling.top_k.map_or(0, |k| i32::try_from(k).unwrap_or(i32::MAX));
        runner.upload(&buffers.top_k, &batch.iter().map(top_k).collect::<Vec<_>>())?;
        let seeds: Vec<i64> = batch.iter().map(|sequence| sequence.sampling.seed.cast_signed()).collect();
        runner.upload(&buffers.seed, &seeds)?;
        let steps: Vec<i64> = batch.iter().map(|sequence| sequence.step.cast_signed()).collect();
        runner.upload(&buffers.step, &steps)?;
        Ok(buffers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bcg_runtime::RunnerOptions;

    const LIMITS: BatchLimits = BatchLimits { rows: 16, sequences: 8, pages_per_sequence: 4 };

    fn input<'a>(
        tokens: &'a [u32],
        past_len: usize,
        pages: &'a [u32],
        sampling: &'a SamplingParams,
    ) -> SequenceInput<'a> {
        SequenceInput { tokens, past_len, pages, sampling, step: 0, top_logprobs: None, logits: false }
    }

    #[test]
    fn padded_rows_write_nothing_and_belong_to_no_sequence() {
        let device = Device::host();
        let mut runner = Runner::new(&device, RunnerOptions::default()).expect("a runner");
        let mut buffers = InputBuffers::new(&device, LIMITS, 4).expect("buffers");
        let params = SamplingParams::greedy();
        let batch = [input(&[7, 8, 9], 3, &[5, 2], &params), input(&[6], 0, &[1], &params)];
        let live = buffers.fill(&mut runner, &batch, 6, true).expect("filled");
        let tokens = buffers.token_inputs(6).expect("views");
        let mut read = |tensor: &Tensor| runner.read::<i32>(tensor).expect("read");
        assert_eq!(read(&tokens.token_ids), [7, 8, 9, 6, 0, 0]);
        assert_eq!(read(&tokens.positions), [3, 4, 5, 0, 0, 0]);
        assert_eq!(read(&tokens.slot_mapping), [23, 8, 9, 4, -1, -1]);
        assert_eq!(read(&live.cu_seqlens_q), [0, 3, 4]);
        assert_eq!(read(&live.kv_lens), [6, 1]);
        assert_eq!(read(&live.page_table), [5, 2, 1, 0]);
        assert_eq!(read(&live.last_rows), [2, 3]);
        assert_eq!(live.rows(), Some(Rows { valid: 4, padded: 6 }));
        assert!(!live.is_decode());
    }

    #[test]
    fn a_padded_decode_has_a_row_without_keys_for_each_padded_row() {
        let device = Device::host();
        let mut runner = Runner::new(&device, RunnerOptions::default()).expect("a runner");
        let mut buffers = InputBuffers::new(&device, LIMITS, 4).expect("buffers");
        let params = SamplingParams::greedy();
        let batch = [input(&[7], 3, &[5], &params), input(&[6], 4, &[1, 3], &params)];
        let live = buffers.fill(&mut runner, &batch, 4, false).expect("filled");
        assert!(live.is_decode() && live.num_sequences() == 2);
        assert_eq!(runner.read::<i32>(&live.kv_lens).expect("read"), [4, 5, 0, 0]);
        assert_eq!(runner.read::<i32>(&live.page_table).expect("read"), [5, 0, 1, 3, 0, 0, 0, 0]);
        let tokens = buffers.token_inputs(4).expect("views");
        assert_eq!(runner.read::<i32>(&tokens.slot_mapping).expect("read"), [-1; 4]);
    }
}
