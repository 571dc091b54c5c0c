//! The buffers of a batch on the device, and how they are filled: see the module above for what they mean.

use bcg_kernels::{DecodePlan, StateSlots, attention_prefill_plan_len, unpack_inputs};
use bcg_runtime::{DType, Device, Result, Runner, Staging, Tensor};

use super::chosen::ChosenSlots;
use super::push::PushBuffers;
use super::stage::{StagedBatch, StagedSampling};
use super::{AttentionSplit, DecodeInputs, ForwardBatch, Phase, SequenceInput, TokenInputs};

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
    sampling: SamplingBuffers,
    /// `[slots * B]` i32: what the latest steps chose.
    chosen: Tensor,
    /// Which step's tokens lie where in `chosen`.
    pub(super) chosen_slots: ChosenSlots,
    staging: Staging,
    pub(super) decode_plan: DecodePlan,
    /// Host memory of the batches that are put together here.
    pub(super) values: Vec<i32>,
    /// Host memory of one plan.
    pub(super) plan: Vec<i32>,
    /// In the prefill role.
    pub(super) push: Option<PushBuffers>,
    /// Host memory of the lists of what is pushed.
    pub(super) pushed: Vec<i32>,
    pub(super) limits: BatchLimits,
    pub(super) page_size: usize,
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

/// Uploads of a step: its batch, and its sampling parameters.
const UPLOADS: usize = 2;

/// Sections begin at multiples of this many elements, for loads of 16 bytes.
pub(super) const SECTION_ALIGNMENT: usize = 4;

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
        let inputs = TokenInputs {
            token_ids,
            positions,
            slot_mapping,
            num_valid,
            num_sequences,
            last_rows: wanted,
            decode,
            received: None,
        };
        Ok((inputs, last_rows))
    }
}

/// Bytes of the sampling parameters of a batch, each of six parts rounded up.
fn sampling_bytes(sequences: usize) -> usize {
    sequences * (4 * size_of::<i32>() + 2 * size_of::<i64>()) + 6 * 16
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
            chosen: zeros(sequences, DType::I32)?,
            chosen_slots: ChosenSlots::new(1, sequences),
            staging: Staging::new(device, (len * size_of::<i32>()).max(sampling_bytes(sequences)))?,
            decode_plan,
            values: Vec::with_capacity(len),
            plan: Vec::with_capacity(plans),
            push: None,
            pushed: Vec::new(),
            limits,
            page_size,
        })
    }

    /// Makes these the buffers of the prefill role, whose steps push what they write to the decode role.
    ///
    /// # Errors
    /// The device's.
    pub fn pushing(self, device: &Device) -> Result<Self> {
        Ok(Self { push: Some(PushBuffers::new(device, self.limits)?), ..self })
    }

    /// Makes them those of a stage of a pipeline, which leaves the tokens of its latest steps in `chosen`, `[slots * B]` i32
    /// with room for the most sequences in each slot, and has the inputs of a step more on their way than there are slots.
    ///
    /// # Errors
    /// The device's.
    pub fn in_pipeline(self, device: &Device, chosen: Tensor) -> Result<Self> {
        let capacity = self.limits.sequences;
        let num_slots = chosen.dim(0) / capacity;
        let staging = Staging::with_slots(device, self.staging.bytes(), UPLOADS * (num_slots + 1))?;
        Ok(Self { chosen_slots: ChosenSlots::new(num_slots, capacity), chosen, staging, ..self })
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

    /// Puts a batch together and uploads it: [`stage`](Self::stage), then [`upload`](Self::upload).
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    ///
    /// # Panics
    /// As [`stage`](Self::stage).
    pub fn fill(
        &mut self,
        runner: &mut Runner,
        batch: &[SequenceInput<'_>],
        phase: Phase,
        padded: usize,
        write_kv: bool,
    ) -> Result<ForwardBatch> {
        let staged = self.stage(batch, phase, padded, write_kv);
        let live = self.upload(runner, &staged);
        self.take_back(staged);
        live
    }

    /// Uploads a batch, and returns it as it lies on this device.
    ///
    /// # Errors
    /// [`bcg_runtime::Error::Shape`] beyond the limits; the driver's.
    pub fn upload(&mut self, runner: &mut Runner, staged: &StagedBatch) -> Result<ForwardBatch> {
        let StagedBatch { num_sequences, values, width, .. } = staged;
        let live = self.views(staged)?;
        let all = self.sections.rows(0..values.len())?;
        self.staging.upload(runner, &[(&all, bytemuck::cast_slice(values))])?;
        if let Some(push) = &mut self.push {
            push.upload(runner, &staged.pushed)?;
        }
        let tables = values.len() - num_sequences * width;
        let packed = self.sections.rows(tables..values.len())?.reshape(&[*num_sequences, *width])?;
        let used = live.page_table.rows(0..*num_sequences)?.columns(0..*width)?;
        let tokens = self.sections.rows(0..staged.rows.valid)?;
        runner.tail(&live, |cx| unpack_inputs(cx, &tokens, &self.chosen, &packed, &used))?;
        Ok(live)
    }

    /// Where the live batches of a phase and a padded size lie. Those without decodes and mixed ones differ in `split` only.
    fn views(&self, staged: &StagedBatch) -> Result<ForwardBatch> {
        let StagedBatch { phase, rows, num_sequences, .. } = *staged;
        let (capacity, plan_len) = (self.capacity(rows.padded), self.prefill_plan_len(staged));
        let mut sections = Sections { buffer: &self.sections, end: 0 };
        let (captured, last_rows) = sections.captured(phase, rows.padded, &self.page_table, self.decode_plan)?;
        let (kv_lens, states) = match captured.decode {
            None => (sections.next(capacity)?, sections.states(capacity)?),
            Some(decode) => (decode.kv_lens, decode.states),
        };
        Ok(ForwardBatch {
            rows,
            num_sequences,
            phase,
            cu_seqlens_q: sections.next(capacity + 1)?,
            kv_lens,
            states,
            page_table: self.page_table.rows(0..capacity)?,
            last_rows: last_rows.rows(0..num_sequences)?,
            prefill_plan: sections.next(plan_len)?,
            push: self.push.as_ref().map(|push| push.lists.clone()),
            split: if staged.is_mixed {
                Some(AttentionSplit {
                    prompt_starts: sections.next(capacity + 1)?,
                    prompt_plan: sections.next(plan_len)?,
                    decode_kv_lens: sections.next(capacity)?,
                    decode_plan: sections.plan(self.decode_plan)?,
                })
            } else {
                None
            },
        })
    }

    /// Where a step of `num_sequences` sequences leaves the tokens that it chose, in a slot, for later steps: `[B]` i32.
    ///
    /// # Errors
    /// [`bcg_runtime::Error::Shape`] beyond the limits.
    pub fn chosen(&self, slot: usize, num_sequences: usize) -> Result<Tensor> {
        let first = slot * self.limits.sequences;
        self.chosen.rows(first..first + num_sequences)
    }

    /// The slots of the tokens that the latest steps chose.
    pub fn chosen_slots(&self) -> &ChosenSlots {
        &self.chosen_slots
    }

    /// Notes that a step of so many sequences was launched.
    pub fn launched(&mut self, num_sequences: usize) {
        self.chosen_slots.launched(num_sequences);
    }

    /// Uploads the sampling parameters of a batch.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn upload_sampling(&mut self, runner: &mut Runner, staged: &StagedSampling) -> Result<SamplingBuffers> {
        let rows = |tensor: &Tensor| tensor.rows(0..staged.seed.len());
        let buffers = SamplingBuffers {
            temperature: rows(&self.sampling.temperature)?,
            top_k: rows(&self.sampling.top_k)?,
            top_p: rows(&self.sampling.top_p)?,
            min_p: rows(&self.sampling.min_p)?,
            seed: rows(&self.sampling.seed)?,
            step: rows(&self.sampling.step)?,
        };
        let parts: [(&Tensor, &[u8]); 6] = [
            (&buffers.temperature, bytemuck::cast_slice(&staged.temperature)),
            (&buffers.top_k, bytemuck::cast_slice(&staged.top_k)),
            (&buffers.top_p, bytemuck::cast_slice(&staged.top_p)),
            (&buffers.min_p, bytemuck::cast_slice(&staged.min_p)),
            (&buffers.seed, bytemuck::cast_slice(&staged.seed)),
            (&buffers.step, bytemuck::cast_slice(&staged.step)),
        ];
        self.staging.upload(runner, &parts)?;
        Ok(buffers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::SamplingParams;
    use crate::state::PagePool;
    use bcg_runtime::{LiveBatch, Rows, RunnerOptions};

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
