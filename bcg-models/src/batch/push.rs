//! Where a step in the prefill role sends what it writes: to pages and state slots of the decode role.
//!
//! Lists of runs of rows lie in static buffers that each step fills, so what a break launches is the same for every batch.
//! A run is a part of a page, or the state of a sequence whose prompt ends in the step.

use bcg_kernels::{PushRows, push_rows};
use bcg_runtime::{DType, Device, OpStream, Result, Runner, Staging, Tensor};

use super::{BatchLimits, ForwardBatch, SequenceInput};
use crate::state::{LayerKv, LayerState};

/// Numbers of a run: its first row here, its first row there, its rows, and 0.
const RUN: usize = 4;

/// Where the keys, values and state of a sequence go in the decode role.
#[derive(Debug, Clone, Copy)]
pub struct Push<'a> {
    /// The sequence's pages there, with room for all of its tokens after the step.
    pub pages: &'a [u32],
    /// The first of its tokens that is not there yet.
    pub from: usize,
    /// The slot there of the state after the step, if its prompt ends.
    pub state: Option<u32>,
}

/// Runs of rows that a step copies, in static buffers.
#[derive(Debug, Clone)]
struct PushList {
    /// `[N, 4]` i32, as [`PushRows::runs`] says.
    runs: Tensor,
    /// `[1]` i32.
    count: Tensor,
}

impl PushList {
    /// Copies runs of at most `rows_max` rows of `sources` to `targets`.
    fn push(&self, cx: &mut OpStream, [sources, targets]: [[&Tensor; 2]; 2], rows_max: usize) -> Result<()> {
        let Self { runs, count } = self;
        push_rows(cx, &PushRows { sources, targets, runs, count, rows_max })
    }
}

/// The lists of a batch.
#[derive(Debug, Clone)]
pub(super) struct PushLists {
    kv: PushList,
    states: PushList,
}

impl ForwardBatch {
    /// Pushes keys and values of a layer to the decode role; does nothing in other runs.
    ///
    /// # Errors
    /// Those of enqueuing.
    pub fn push_kv(&self, cx: &mut OpStream, kv: &LayerKv) -> Result<()> {
        let (Some(lists), Some([far_k, far_v])) = (&self.push, &kv.far) else { return Ok(()) };
        // `[P S, …]`
        let rows = |cache: &Tensor| cache.reshape(&[cache.dim(0) * cache.dim(1), cache.dim(2) * cache.dim(3)]);
        let (k, v, far_k, far_v) = (rows(&kv.k)?, rows(&kv.v)?, rows(far_k)?, rows(far_v)?);
        lists.kv.push(cx, [[&k, &v], [&far_k, &far_v]], kv.k.dim(1))
    }

    /// Pushes states of a layer to the decode role, those of sequences whose prompts end; does nothing in other runs.
    ///
    /// # Errors
    /// Those of enqueuing.
    pub fn push_states(&self, cx: &mut OpStream, state: &LayerState) -> Result<()> {
        let (Some(lists), Some([far_conv, far_ssm])) = (&self.push, &state.far) else { return Ok(()) };
        lists.states.push(cx, [[&state.conv, &state.ssm], [far_conv, far_ssm]], 1)
    }
}

/// The device buffer of the lists, and how it is filled.
///
/// One upload has both counts, the room for a run of every sequence's state, and the runs of keys and values.
#[derive(Debug)]
pub(super) struct PushBuffers {
    buffer: Tensor,
    pub(super) lists: PushLists,
    staging: Staging,
    sequences: usize,
}

impl PushBuffers {
    pub(super) fn new(device: &Device, limits: BatchLimits) -> Result<Self> {
        let BatchLimits { sequences, pages_per_sequence, .. } = limits;
        let len = RUN * (1 + sequences + sequences * pages_per_sequence);
        let buffer = device.zeros(&[len], DType::I32)?;
        let list = |count: usize, first: usize, runs: usize| {
            let runs = buffer.rows(RUN * first..RUN * (first + runs))?.reshape(&[runs, RUN])?;
            Ok::<_, bcg_runtime::Error>(PushList { runs, count: buffer.rows(count..count + 1)? })
        };
        let lists =
            PushLists { kv: list(0, 1 + sequences, sequences * pages_per_sequence)?, states: list(1, 1, sequences)? };
        Ok(Self { buffer, lists, staging: Staging::new(device, len * size_of::<i32>())?, sequences })
    }

    /// Puts the lists of a batch together. One that is not pushed, a dummy batch, has empty ones.
    pub(super) fn stage(&self, values: &mut Vec<i32>, batch: &[SequenceInput<'_>], page_size: usize) {
        let pushed = || batch.iter().filter_map(|sequence| Some((sequence, sequence.push?)));
        values.clear();
        values.resize(RUN, 0);
        for (sequence, push) in pushed() {
            let source = sequence.state.map(|state| state.slots(sequence.past_len).1);
            if let Some((source, target)) = source.zip(push.state) {
                values.extend([source.cast_signed(), target.cast_signed(), 1, 0]);
            }
        }
        values[1] = (values.len() / RUN - 1) as i32;
        values.resize(RUN * (1 + self.sequences), 0);
        for (sequence, push) in pushed() {
            push_runs(values, [sequence.pages, push.pages], page_size, push.from..sequence.kv_len());
        }
        values[0] = (values.len() / RUN - 1 - self.sequences) as i32;
    }

    pub(super) fn upload(&mut self, runner: &mut Runner, values: &[i32]) -> Result<()> {
        self.staging.upload(runner, &[(&self.buffer.rows(0..values.len())?, bytemuck::cast_slice(values))])
    }
}

/// Appends the runs of these tokens of a sequence, page by page.
fn push_runs(values: &mut Vec<i32>, [pages, far_pages]: [&[u32]; 2], page_size: usize, tokens: std::ops::Range<usize>) {
    let mut begin = tokens.start;
    while begin < tokens.end {
        let (page, offset) = (begin / page_size, begin % page_size);
        let end = tokens.end.min((page + 1) * page_size);
        let slot = |pages: &[u32]| (pages[page] as usize * page_size + offset) as i32;
        values.extend([slot(pages), slot(far_pages), (end - begin) as i32, 0]);
        begin = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::SamplingParams;
    use crate::state::PagePool;
    use bcg_runtime::Device;

    #[test]
    fn lists_hold_the_parts_of_pages_that_are_not_there_yet_and_the_states_of_prompts_that_end() -> crate::Result<()> {
        let limits = BatchLimits { rows: 16, sequences: 2, pages_per_sequence: 4 };
        let buffers = PushBuffers::new(&Device::host(), limits)?;
        let (params, pool) = (SamplingParams::greedy(), PagePool::with_states(8, 4, 2));
        let (first, second) = (pool.lease(1)?, pool.lease(3)?);
        let far = [7, 5, 6];
        let input = |tokens, past_len, lease| SequenceInput::new(tokens, past_len, lease, &params);
        let batch = [
            SequenceInput {
                state: first.state(),
                push: Some(Push { pages: &far, from: 0, state: None }),
                ..input(&[1, 2], 0, first.pages())
            },
            SequenceInput {
                state: second.state(),
                push: Some(Push { pages: &far, from: 2, state: Some(9) }),
                ..input(&[1, 2, 3], 6, second.pages())
            },
        ];
        let mut values = Vec::new();
        buffers.stage(&mut values, &batch, 4);
        let states = [3, 9, 1, 0, 0, 0, 0, 0];
        let kv = [0, 28, 2, 0, 6, 30, 2, 0, 8, 20, 4, 0, 12, 24, 1, 0];
        assert_eq!(values, [&[4, 1, 0, 0][..], &states, &kv].concat());
        buffers.stage(&mut values, &[], 4);
        assert_eq!(values, [0; 12]);
        Ok(())
    }
}
