//! The buffers of a batch on the device, and how the host fills them: see the module above for what they mean.

use std::ops::Range;

use bcg_kernels::{DecodePlan, StateSlots, attention_prefill_plan, attention_prefill_plan_len, unpack_inputs};
use bcg_runtime::{DType, Device, Result, Rows, Runner, Staging, Tensor};

use super::{AttentionSplit, DecodeInputs, ForwardBatch, Phase, SequenceInput, TokenInputs};
use crate::sampling::SamplingParams;

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
///
/// A batch is one upload, of a buffer in which it lies section after section, up to the plan's last item and the used
/// columns of the page table, which go to their rows from there. Where sections begin depends on the phase and the padded
/// rows alone.
#[derive(Debug)]
pub struct InputBuffers {
    sections: Tensor,
    /// `[B, pages]`, as wide as the longest possible sequence needs.
    page_table: Tensor,
    decode_plan: DecodePlan,
    sampling: SamplingBuffers,
    /// `[B]` i32: what the step launched last chose.
    chosen: Tensor,
    staging: Staging,
    values: Vec<i32>,
    plan: Vec<i32>,
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

/// Sections begin at multiples of this many elements, for loads of 16 bytes.
const SECTION_ALIGNMENT: usize = 4;

/// The sections of a batch, in the order in which they lie in the buffer.
struct Sections<'a> {
    buffer: &'a Tensor,
    end: usize,
}

impl Sections<'_> {
    /// The next section, of `len` elements.
    fn next(&mut self, len: usize) -> Result<Tensor> {
        let begin = self.end;
        self.end = begin + len.next_multiple_of(SECTION_ALIGNMENT);
        self.buffer.rows(begin..begin + len)
    }

    fn states(&mut self, len: usize) -> Result<StateSlots> {
        Ok(StateSlots { read: self.next(len)?, write: self.next(len)? })
    }

    fn plan(&mut self, decode_plan: DecodePlan) -> Result<Tensor> {
        self.next(decode_plan.shape().iter().product())?.reshape(&decode_plan.shape())
    }

    /// The sections that captured code reads, and the last row of each sequence.
    fn captured(
        &mut self,
        phase: Phase,
        rows: usize,
        page_table: &Tensor,
        decode_plan: DecodePlan,
    ) -> Result<(TokenInputs, Tensor)> {
        let (token_ids, positions, slot_mapping) = (self.next(rows)?, self.next(rows)?, self.next(rows)?);
        let counts = self.next(2)?;
        let (num_valid, num_sequences) = (counts.rows(0..1)?, counts.rows(1..2)?);
        let last_rows = self.next(rows.min(page_table.dim(0)))?;
        let decode = match phase {
            Phase::Prefill => None,
            Phase::Decode => Some(DecodeInputs {
                kv_lens: self.next(rows)?,
                states: self.states(rows)?,
                page_table: page_table.rows(0..rows)?,
                plan: self.plan(decode_plan)?,
            }),
        };
        let is_less = last_rows.dim(0) < rows;
        let wanted = is_less.then(|| last_rows.clone());
        let inputs =
            TokenInputs { token_ids, positions, slot_mapping, num_valid, num_sequences, last_rows: wanted, decode };
        Ok((inputs, last_rows))
    }
}

/// Bytes of the sampling parameters of a batch, each of six parts rounded up.
fn sampling_bytes(sequences: usize) -> usize {
    sequences * (4 * size_of::<i32>() + 2 * size_of::<i64>()) + 6 * 16
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
    /// Allocates buffers for batches within `limits`.
    ///
    /// # Errors
    /// The device's.
    pub fn new(device: &Device, limits: BatchLimits, page_size: usize, decode_plan: DecodePlan) -> Result<Self> {
        let zeros = |len: usize, dtype| device.zeros(&[len], dtype);
        let BatchLimits { rows, sequences, pages_per_sequence } = limits;
        let aligned = |len: usize| len.next_multiple_of(SECTION_ALIGNMENT);
        let plan: usize = decode_plan.shape().iter().product();
        let plans = aligned(plan) + 2 * aligned(attention_prefill_plan_len(rows, sequences));
        // Tokens, positions, slots; lengths, states, starts, last rows, and starts and lengths of a mixed batch taken apart;
        // all plans; the numbers of valid rows and of sequences, and a decode's prefill plan without items.
        let sections = 3 * aligned(rows) + 7 * aligned(sequences + 1) + plans + 2 * SECTION_ALIGNMENT;
        let len = sections + sequences * pages_per_sequence;
        Ok(Self {
            sections: zeros(len, DType::I32)?,
            page_table: device.zeros(&[sequences, pages_per_sequence], DType::I32)?,
            sampling: SamplingBuffers {
                temperature: zeros(sequences, DType::F32)?,
                top_k: zeros(sequences, DType::I32)?,
                top_p: zeros(sequences, DType::F32)?,
                min_p: zeros(sequences, DType::F32)?,
                seed: zeros(sequences, DType::I64)?,
                step: zeros(sequences, DType::I64)?,
            },
            decode_plan,
            staging: Staging::new(device, (len * size_of::<i32>()).max(sampling_bytes(sequences)))?,
            values: Vec::with_capacity(len),
            chosen: device.zeros(&[limits.sequences], DType::I32)?,
            plan: Vec::with_capacity(plans),
            page_size,
        })
    }

    /// The inputs that a forward of `rows` padded rows reads.
    ///
    /// # Errors
    /// [`bcg_runtime::Error::Shape`] beyond the limits.
    pub fn token_inputs(&self, phase: Phase, rows: usize) -> Result<TokenInputs> {
        Sections { buffer: &self.sections, end: 0 }
            .captured(phase, rows, &self.page_table, self.decode_plan)
            .map(|(inputs, _)| inputs)
    }

    /// Uploads a batch for a forward of `phase` that is padded to `padded` rows. With `write_kv` off no key, value or state
    /// is kept: a dummy batch.
    ///
    /// # Errors
    /// [`bcg_runtime::Error::Shape`] beyond the limits; the driver's.
    ///
    /// # Panics
    /// If the batch has more than `padded` tokens, a sequence has too few pages, or one of a decode has several tokens.
    pub fn fill(
        &mut self,
        runner: &mut Runner,
        batch: &[SequenceInput<'_>],
        phase: Phase,
        padded: usize,
        write_kv: bool,
    ) -> Result<ForwardBatch> {
        let valid: usize = batch.iter().map(SequenceInput::num_new).sum();
        assert!(valid <= padded, "{valid} tokens do not fit into {padded} rows");
        assert!(phase == Phase::Prefill || Phase::of(batch) == phase, "a decode has one new token a sequence");
        let live = self.views(phase, batch, Rows { valid, padded })?;
        self.stage_tokens(batch, padded, write_kv);
        self.stage_sequences(batch, &live, write_kv);
        let staged = self.values.len();
        let width = self.stage_page_tables(batch);
        let all = self.sections.rows(0..self.values.len())?;
        self.staging.upload(runner, &[(&all, bytemuck::cast_slice(&self.values))])?;
        let packed = self.sections.rows(staged..self.values.len())?.reshape(&[batch.len(), width])?;
        let used = live.page_table.rows(0..batch.len())?.columns(0..width)?;
        let tokens = self.sections.rows(0..valid)?;
        runner.tail(&live, |cx| unpack_inputs(cx, &tokens, &self.chosen, &packed, &used))?;
        Ok(live)
    }

    /// Where the live batches of a phase and a padded size lie. Those without decodes and mixed ones differ in `split` only.
    fn views(&self, phase: Phase, batch: &[SequenceInput<'_>], rows: Rows) -> Result<ForwardBatch> {
        let capacity = rows.padded.min(self.page_table.dim(0));
        let mut sections = Sections { buffer: &self.sections, end: 0 };
        let (captured, last_rows) = sections.captured(phase, rows.padded, &self.page_table, self.decode_plan)?;
        let (kv_lens, states, plan_len) = match captured.decode {
            None => {
                let plan_len = attention_prefill_plan_len(rows.padded, capacity);
                (sections.next(capacity)?, sections.states(capacity)?, plan_len)
            }
            Some(decode) => (decode.kv_lens, decode.states, 1),
        };
        Ok(ForwardBatch {
            rows,
            num_sequences: batch.len(),
            phase,
            cu_seqlens_q: sections.next(capacity + 1)?,
            kv_lens,
            states,
            page_table: self.page_table.rows(0..capacity)?,
            last_rows: last_rows.rows(0..batch.len())?,
            prefill_plan: sections.next(plan_len)?,
            split: match (phase, num_decodes(batch)) {
                (Phase::Decode, _) | (Phase::Prefill, 0) => None,
                (Phase::Prefill, _) => Some(AttentionSplit {
                    prompt_starts: sections.next(capacity + 1)?,
                    prompt_plan: sections.next(plan_len)?,
                    decode_kv_lens: sections.next(capacity)?,
                    decode_plan: sections.plan(self.decode_plan)?,
                }),
            },
        })
    }

    /// Begins the staging with tokens, positions, slots and last rows.
    fn stage_tokens(&mut self, batch: &[SequenceInput<'_>], padded: usize, write_kv: bool) {
        let (staging, page_size) = (&mut self.values, self.page_size);
        staging.clear();
        push_section(staging, padded, 0, |staging| {
            for s in batch {
                staging.extend(s.tokens.iter().map(|token| token.cast_signed()));
                // As `unpack_inputs` reads it.
                staging.extend(s.chosen_row.map(|row| -1 - row as i32));
            }
        });
        push_section(staging, padded, 0, |staging| {
            batch.iter().for_each(|s| staging.extend(s.past_len as i32..s.kv_len() as i32));
        });
        let written = if write_kv { batch } else { &[] };
        push_section(staging, padded, -1, |staging| {
            written.iter().for_each(|s| push_slots(staging, s.pages, page_size, s.past_len..s.kv_len()));
        });
        let valid: usize = batch.iter().map(SequenceInput::num_new).sum();
        push_section(staging, 2, 0, |staging| staging.extend([valid as i32, batch.len() as i32]));
        push_section(staging, padded.min(self.page_table.dim(0)), 0, |staging| {
            staging.extend(ends(batch).map(|end| end - 1));
        });
    }

    /// Appends what is known of each sequence, and the plan of the phase's attention.
    fn stage_sequences(&mut self, batch: &[SequenceInput<'_>], live: &ForwardBatch, write_state: bool) {
        let (staging, plan) = (&mut self.values, &mut self.plan);
        let capacity = live.kv_lens.dim(0);
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
        if live.phase == Phase::Decode {
            self.decode_plan.fill(&staging[lens.start..][..batch.len()], plan);
            push_section(staging, plan.len(), 0, |staging| staging.extend_from_slice(plan));
        }
        let starts = push_section(staging, capacity + 1, live.rows.valid as i32, |staging| {
            staging.push(0);
            staging.extend(ends(batch));
        });
        let planned = if live.phase == Phase::Prefill { batch.len() } else { 0 };
        attention_prefill_plan(&staging[starts.clone()][..=planned], &staging[lens.clone()][..planned], plan);
        let plan_len = live.prefill_plan.dim(0);
        push_section(staging, plan_len, 0, |staging| staging.extend_from_slice(plan));
        if live.split.is_none() {
            return;
        }
        let decodes = num_decodes(batch);
        let prompt_starts = push_section(staging, capacity + 1, live.rows.valid as i32, |staging| {
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

    /// Appends the page tables, as wide as the longest sequence needs, and returns the width.
    fn stage_page_tables(&mut self, batch: &[SequenceInput<'_>]) -> usize {
        let pages_of = |sequence: &SequenceInput<'_>| sequence.kv_len().div_ceil(self.page_size);
        let width = batch.iter().map(pages_of).max().unwrap_or(1);
        let begin = self.values.len();
        for (i, sequence) in batch.iter().enumerate() {
            self.values.extend(sequence.pages[..pages_of(sequence)].iter().map(|page| page.cast_signed()));
            self.values.resize(begin + (i + 1) * width, 0);
        }
        width
    }

    /// `[B]` i32: where each step leaves the tokens that it chose, for the next one.
    pub fn chosen(&self) -> &Tensor {
        &self.chosen
    }

    /// Uploads the sampling parameters of a batch.
    ///
    /// # Errors
    /// As [`fill`](Self::fill).
    pub fn fill_sampling(&mut self, runner: &mut Runner, batch: &[SequenceInput<'_>]) -> Result<SamplingBuffers> {
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
        let temperature = floats(|params| params.temperature);
        let top_k =
            |sequence: &SequenceInput<'_>| sequence.sampling.top_k.map_or(0, |k| i32::try_from(k).unwrap_or(i32::MAX));
        let top_k: Vec<i32> = batch.iter().map(top_k).collect();
        let (top_p, min_p) = (floats(|params| params.top_p), floats(|params| params.min_p));
        let seed: Vec<i64> = batch.iter().map(|sequence| sequence.sampling.seed.cast_signed()).collect();
        let step: Vec<i64> = batch.iter().map(|sequence| sequence.num_drawn.cast_signed()).collect();
        let parts: [(&Tensor, &[u8]); 6] = [
            (&buffers.temperature, bytemuck::cast_slice(&temperature)),
            (&buffers.top_k, bytemuck::cast_slice(&top_k)),
            (&buffers.top_p, bytemuck::cast_slice(&top_p)),
            (&buffers.min_p, bytemuck::cast_slice(&min_p)),
            (&buffers.seed, bytemuck::cast_slice(&seed)),
            (&buffers.step, bytemuck::cast_slice(&step)),
        ];
        self.staging.upload(runner, &parts)?;
        Ok(buffers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::PagePool;
    use bcg_runtime::{LiveBatch, RunnerOptions};

    const LIMITS: BatchLimits = BatchLimits { rows: 16, sequences: 8, pages_per_sequence: 4 };

    fn input<'a>(
        tokens: &'a [u32],
        past_len: usize,
        pages: &'a [u32],
        sampling: &'a SamplingParams,
    ) -> SequenceInput<'a> {
        SequenceInput::new(tokens, past_len, pages, sampling)
    }

    #[test]
    fn padded_rows_write_nothing_and_belong_to_no_sequence() {
        let device = Device::host();
        let mut runner = Runner::new(&device, RunnerOptions::default()).expect("a runner");
        let mut buffers = InputBuffers::new(&device, LIMITS, 4, DecodePlan::new(&device, 4, 2)).expect("buffers");
        let params = SamplingParams::greedy();
        let batch = [input(&[7, 8, 9], 3, &[5, 2], &params), input(&[6], 0, &[1], &params)];
        let live = buffers.fill(&mut runner, &batch, Phase::Prefill, 6, true).expect("filled");
        let tokens = buffers.token_inputs(Phase::Prefill, 6).expect("views");
        let mut read = |tensor: &Tensor| runner.read::<i32>(tensor).expect("read");
        assert_eq!(read(&tokens.token_ids), [7, 8, 9, 6, 0, 0]);
        assert_eq!(read(&tokens.positions), [3, 4, 5, 0, 0, 0]);
        assert_eq!(read(&tokens.slot_mapping), [23, 8, 9, 4, -1, -1]);
        assert_eq!((read(&tokens.num_valid), read(&tokens.num_sequences)), (vec![4], vec![2]));
        assert_eq!(read(&live.cu_seqlens_q), [0, 3, 4, 4, 4, 4, 4]);
        assert_eq!(read(&live.kv_lens), [6, 1, 0, 0, 0, 0]);
        assert_eq!(live.page_table.shape(), [6, LIMITS.pages_per_sequence]);
        assert_eq!(read(&live.page_table.columns(0..2).expect("columns"))[..4], [5, 2, 1, 0]);
        assert_eq!(read(&live.last_rows), [2, 3]);
        assert_eq!(read(&live.prefill_plan)[..5], [2, 0, 0, 1, 3]);
        assert_eq!(live.rows(), Some(Rows { valid: 4, padded: 6 }));
        assert!(live.phase() == Phase::Prefill && tokens.decode.is_none());
    }

    #[test]
    fn a_padded_decode_has_a_row_without_keys_for_each_padded_row() {
        let device = Device::host();
        let mut runner = Runner::new(&device, RunnerOptions::default()).expect("a runner");
        let mut buffers = InputBuffers::new(&device, LIMITS, 4, DecodePlan::new(&device, 4, 2)).expect("buffers");
        let params = SamplingParams::greedy();
        let batch = [input(&[7], 3, &[5], &params), input(&[6], 4, &[1, 3], &params)];
        let live = buffers.fill(&mut runner, &batch, Phase::Decode, 4, false).expect("filled");
        assert!(live.phase() == Phase::Decode && live.num_sequences() == 2);
        let tokens = buffers.token_inputs(Phase::Decode, 4).expect("views");
        let decode = tokens.decode.expect("a decode");
        assert_eq!(runner.read::<i32>(&decode.kv_lens).expect("read"), [4, 5, 0, 0]);
        assert_eq!(decode.page_table.shape(), [4, LIMITS.pages_per_sequence]);
        let table = runner.read::<i32>(&decode.page_table.columns(0..2).expect("columns")).expect("read");
        assert_eq!(table[..4], [5, 0, 1, 3]);
        assert_eq!(runner.read::<i32>(&live.last_rows).expect("read"), [0, 1]);
        assert_eq!(runner.read::<i32>(&tokens.slot_mapping).expect("read"), [-1; 4]);
    }

    #[test]
    fn states_are_read_behind_the_first_tokens_and_written_unless_the_batch_is_a_dummy() {
        let device = Device::host();
        let mut runner = Runner::new(&device, RunnerOptions::default()).expect("a runner");
        let mut buffers = InputBuffers::new(&device, LIMITS, 4, DecodePlan::new(&device, 4, 2)).expect("buffers");
        let (params, pool) = (SamplingParams::greedy(), PagePool::with_states(8, 4, 3));
        let leases = [0, 3, 5].map(|past_len| (pool.lease(2).expect("a lease"), past_len));
        leases[2].0.state().expect("a state").commit(5);
        let batch: Vec<_> = leases
            .iter()
            .map(|(lease, past_len)| SequenceInput {
                state: lease.state(),
                ..input(&[7], *past_len, lease.pages(), &params)
            })
            .collect();
        for phase in Phase::ALL {
            let live = buffers.fill(&mut runner, &batch, phase, 4, true).expect("filled");
            let slots = match buffers.token_inputs(phase, 4).expect("views").decode {
                Some(decode) => decode.states,
                None => live.states,
            };
            assert_eq!(runner.read::<i32>(&slots.read).expect("read"), [-1, 2, 5, -1]);
            assert_eq!(runner.read::<i32>(&slots.write).expect("read"), [1, 3, 4, -1]);
            buffers.fill(&mut runner, &batch, phase, 4, false).expect("a dummy");
            assert_eq!(runner.read::<i32>(&slots.write).expect("read"), [-1; 4]);
        }
    }

    #[test]
    fn batches_of_one_size_lie_at_the_same_places() {
        let device = Device::host();
        let mut runner = Runner::new(&device, RunnerOptions::default()).expect("a runner");
        let mut buffers = InputBuffers::new(&device, LIMITS, 4, DecodePlan::new(&device, 4, 2)).expect("buffers");
        let (params, pages) = (SamplingParams::greedy(), [0, 1, 2, 3]);
        let long = [input(&[1; 9], 7, &pages, &params)];
        let many = [input(&[1, 2], 0, &pages, &params); 5];
        let one = [input(&[1], 15, &pages, &params)];
        let all = [input(&[1], 0, &pages, &params); 8];
        for (phase, padded, batches) in [
            (Phase::Prefill, 12, [&long[..], &many]),
            (Phase::Prefill, 8, [&one, &many[..4]]),
            (Phase::Decode, 8, [&one, &all]),
        ] {
            let [first, second] = batches.map(|batch| {
                let live = buffers.fill(&mut runner, batch, phase, padded, true).expect("filled");
                assert_eq!(live.last_rows.shape(), [batch.len()]);
                // A tensor's description has its dtype, its shape and its address.
                let StateSlots { read, write } = live.states;
                [live.cu_seqlens_q, live.kv_lens, live.page_table, live.prefill_plan, read, write]
                    .map(|t| format!("{t:?}"))
            });
            assert_eq!(first, second);
        }
    }

    #[test]
    fn the_largest_batches_fit_their_buffers() {
        let device = Device::host();
        let mut runner = Runner::new(&device, RunnerOptions::default()).expect("a runner");
        let mut buffers = InputBuffers::new(&device, LIMITS, 4, DecodePlan::new(&device, 4, 2)).expect("buffers");
        let (params, pages) = (SamplingParams::greedy(), [0, 1, 2, 3]);
        let prefill = [input(&[1, 2], 14, &pages, &params); 8];
        buffers.fill(&mut runner, &prefill, Phase::Prefill, 16, true).expect("the largest prefill");
        let decode = [input(&[1], 15, &pages, &params); 8];
        buffers.fill(&mut runner, &decode, Phase::Decode, 8, true).expect("the largest decode");
    }
}
