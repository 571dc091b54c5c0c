//! One rank: its share of the model on its device, and what it does of a step. All ranks of a stage do the same, by one
//! [`StagedStep`], and none of them looks at its own state to choose (law L13).

use std::sync::Arc;

use bcg_kernels as ops;
use bcg_runtime::{Context, Device, GraphCache, LiveBatch, OpStream, Readback, Result, Runner, Tensor, Timeline};

use super::choose::{self, Readbacks};
use super::links::Links;
use super::staged::{Path, StagedStep};
use super::{DUMMY_SEQUENCE_TOKENS, RankMemory};
use crate::batch::{ForwardBatch, InputBuffers, Phase};
use crate::registry::{Model, StageOutput};
use crate::state::{CacheLayout, Caches};

/// The rows whose hidden states a forward returns.
#[derive(Clone, Copy, PartialEq, Eq)]
enum HiddenRows {
    /// Each sequence's last row, if the model can end the others early.
    Last,
    /// Every row of the batch.
    All,
}

/// What a rank leaves of a step.
#[derive(Debug)]
pub(super) struct Launched {
    /// The tokens on their way to the host, on the rank whose tokens it reads.
    pub(super) readback: Option<Readback>,
    /// `[B, V]`.
    pub(super) logits: Tensor,
}

/// The graphs of a phase.
pub(super) type StageGraphs = GraphCache<ForwardBatch, StageOutput>;

/// A rank's share of a loaded model, with its KV cache, its graphs and the stream they run on.
#[derive(Debug)]
pub(super) struct Rank {
    // Dropped in this order: graphs before the memory and the stream that they use.
    pub(super) prefill_graphs: StageGraphs,
    pub(super) decode_graphs: StageGraphs,
    pub(super) inputs: InputBuffers,
    /// The stage of the pipeline that it is a rank of.
    pub(super) stage: usize,
    /// What its layers keep between steps.
    pub(super) layout: CacheLayout,
    pub(super) caches: Arc<Caches>,
    pub(super) model: Arc<dyn Model>,
    /// The stream and the memory that forwards run with, eagerly or as graphs.
    pub(super) runtime: Runner,
    /// What joins it to the same rank of other stages: other devices may free its memory once this rank's stream, above, has
    /// run all work on it.
    pub(super) links: Links,
    /// The bytes of its weights.
    pub(super) weight_bytes: usize,
    /// Where chosen tokens go on the host, on the rank whose tokens the host reads: rank 0 of the last stage.
    pub(super) readbacks: Option<Readbacks>,
}

impl Rank {
    pub(super) fn device(&self) -> &Device {
        self.runtime.device()
    }

    pub(super) fn graphs(&self, phase: Phase) -> &StageGraphs {
        match phase {
            Phase::Prefill => &self.prefill_graphs,
            Phase::Decode => &self.decode_graphs,
        }
    }

    pub(super) fn graphs_and_runtime(&mut self, phase: Phase) -> (&mut StageGraphs, &mut Runner) {
        let graphs = match phase {
            Phase::Prefill => &mut self.prefill_graphs,
            Phase::Decode => &mut self.decode_graphs,
        };
        (graphs, &mut self.runtime)
    }

    /// What is captured: the model on the input buffers' first `rows` rows.
    fn forward(
        &self,
        phase: Phase,
        rows: usize,
        wanted: HiddenRows,
    ) -> Result<impl Fn(&mut Context<'_, ForwardBatch>) -> Result<StageOutput> + Send + Sync + use<>> {
        let (model, caches) = (Arc::clone(&self.model), Arc::clone(&self.caches));
        let mut inputs = self.inputs.token_inputs(phase, rows)?;
        if wanted == HiddenRows::All {
            inputs.last_rows = None;
        }
        inputs.received = self.links.before.as_ref().map(|before| before.rows(rows)).transpose()?;
        Ok(move |cx: &mut Context<'_, ForwardBatch>| model.forward(cx, &inputs, &caches))
    }

    /// Uploads a step's inputs.
    pub(super) fn upload(&mut self, step: &StagedStep) -> Result<ForwardBatch> {
        self.links.await_tokens(&self.runtime, step.awaited)?;
        self.inputs.upload(&mut self.runtime, &step.batch)
    }

    /// Uploads a step and enqueues its forward, from what the stage before hands on to what the stage after gets. Returns
    /// the batch as it lies here, and the forward's output.
    pub(super) fn run(&mut self, step: &StagedStep) -> Result<(ForwardBatch, StageOutput)> {
        self.run_as(step, |rank, live| rank.forward_once(step, live))
    }

    /// As [`run`](Self::run), with the forward that `forward` enqueues.
    fn run_as(
        &mut self,
        step: &StagedStep,
        forward: impl FnOnce(&mut Self, &ForwardBatch) -> Result<StageOutput>,
    ) -> Result<(ForwardBatch, StageOutput)> {
        let live = self.upload(step)?;
        self.links.receive(&self.runtime)?;
        let output = forward(self, &live);
        // After a failure too: what was enqueued before it reads the input.
        let output = self.links.end_reading(&self.runtime).and(output)?;
        self.links.hand_on(&mut self.runtime, &live, &output)?;
        Ok((live, output))
    }

    /// Enqueues a forward in the way that the step says.
    fn forward_once(&mut self, step: &StagedStep, live: &ForwardBatch) -> Result<StageOutput> {
        let (phase, size) = (step.batch.phase(), step.batch.rows().padded);
        match step.path(self.stage) {
            Path::Replay => {
                let (graphs, runtime) = self.graphs_and_runtime(phase);
                graphs.replay(size, runtime, live)
            }
            Path::Capture => {
                let forward = self.forward(phase, size, HiddenRows::Last)?;
                let (graphs, runtime) = self.graphs_and_runtime(phase);
                match graphs.capture(size, runtime, live, forward) {
                    Ok(output) => Ok(output),
                    // The cache counted it and does not try this size again; the batch is served all the same.
                    Err(_) => self.run_eagerly(live, HiddenRows::Last),
                }
            }
            Path::Eager => self.run_eagerly(live, HiddenRows::Last),
        }
    }

    fn run_eagerly(&mut self, live: &ForwardBatch, wanted: HiddenRows) -> Result<StageOutput> {
        let rows = live.rows().map_or(0, |rows| rows.padded);
        let forward = self.forward(live.phase(), rows, wanted)?;
        self.runtime.eager(live, forward)
    }

    /// Enqueues a step: its forward and, in the last stage, the logits of each sequence's last row, `[B, V]`, its next token,
    /// `[B]`, and, on the rank whose tokens the host reads, the copy of that to the host. `None` in another stage.
    pub(super) fn launch(&mut self, step: &StagedStep) -> Result<Option<Launched>> {
        let (live, output) = self.run(step)?;
        if self.links.after.is_some() {
            return Ok(None);
        }
        let sampling =
            step.sampling.as_ref().map(|staged| self.inputs.upload_sampling(&mut self.runtime, staged)).transpose()?;
        let model = Arc::clone(&self.model);
        let chosen = self.inputs.chosen(step.slot, step.batch.num_sequences())?;
        let (logits, logprobs) = self.runtime.tail(&live, |cx| {
            let last = last_hidden(cx, &live, &output.hidden)?; // [B, C]
            let logits = model.logits(cx, &last)?;
            choose::adjust(cx, &logits, &step.asked)?;
            choose::choose(cx, &logits, sampling.as_ref(), &chosen)?;
            let logprobs = choose::logprobs(cx, &logits, &chosen, &step.asked)?;
            Ok((logits, logprobs))
        })?;
        self.links.tell_tokens(&mut self.runtime, &live, &chosen, step.slot)?;
        let Some(readbacks) = &self.readbacks else { return Ok(Some(Launched { readback: None, logits })) };
        let mut readback = readbacks.take(self.runtime.device())?;
        match &logprobs {
            None => self.runtime.read_back(&[&chosen], &mut readback)?,
            Some((ids, values)) => self.runtime.read_back(&[&chosen, ids, values], &mut readback)?,
        }
        Ok(Some(Launched { readback: Some(readback), logits }))
    }

    /// Runs every kernel of a step once, those that choose the most likely tokens and those that draw.
    pub(super) fn warm_up(&mut self, step: &StagedStep) -> Result<()> {
        let (live, output) = self.run_as(step, |rank, live| rank.run_eagerly(live, HiddenRows::Last))?;
        if self.links.after.is_some() {
            return Ok(());
        }
        let sampling =
            step.sampling.as_ref().map(|staged| self.inputs.upload_sampling(&mut self.runtime, staged)).transpose()?;
        let chosen = self.inputs.chosen(step.slot, step.batch.num_sequences())?;
        let model = Arc::clone(&self.model);
        self.runtime.tail(&live, |cx| {
            let last = last_hidden(cx, &live, &output.hidden)?;
            let logits = model.logits(cx, &last)?;
            choose::choose(cx, &logits, None, &chosen)?;
            choose::choose(cx, &logits, sampling.as_ref(), &chosen)
        })
    }

    /// Captures the graph of a step's size, without running it.
    pub(super) fn capture_ahead(&mut self, step: &StagedStep) -> Result<()> {
        let live = self.upload(step)?;
        let (phase, size) = (step.batch.phase(), step.batch.rows().padded);
        let forward = self.forward(phase, size, HiddenRows::Last)?;
        let (graphs, runtime) = self.graphs_and_runtime(phase);
        graphs.capture_ahead(size, runtime, &live, forward)
    }

    /// Times the steps of a replay.
    pub(super) fn timeline(&mut self, step: &StagedStep) -> Result<Timeline> {
        let live = self.upload(step)?;
        let (graphs, runtime) = self.graphs_and_runtime(step.batch.phase());
        graphs.timeline(step.batch.rows().padded, runtime, &live)
    }

    /// Runs a sequence eagerly; returns the logits of all its rows on the rank whose tokens the host reads.
    pub(super) fn score(&mut self, step: &StagedStep) -> Result<Vec<Vec<f32>>> {
        let (live, output) = self.run_as(step, |rank, live| rank.run_eagerly(live, HiddenRows::All))?;
        if self.links.after.is_some() {
            return Ok(Vec::new());
        }
        let (model, rows, reads) = (Arc::clone(&self.model), step.batch.rows().valid, self.readbacks.is_some());
        self.runtime.tail(&live, |cx| {
            let mut logits = Vec::with_capacity(rows);
            for first in (0..rows).step_by(DUMMY_SEQUENCE_TOKENS) {
                let chunk = output.hidden.rows(first..(first + DUMMY_SEQUENCE_TOKENS).min(rows))?;
                let chunk = model.logits(cx, &chunk)?;
                if reads {
                    logits.extend(cx.read::<f32>(&chunk)?.chunks(chunk.dim(1)).map(<[f32]>::to_vec));
                }
            }
            Ok(logits)
        })
    }

    /// What the rank takes of its device.
    pub(super) fn memory(&self) -> RankMemory {
        RankMemory {
            weight_bytes: self.weight_bytes,
            cache_bytes: self.caches.kv.size_bytes() + self.caches.states.size_bytes(),
            arena_bytes: self.runtime.arena_stats().mapped_bytes,
            graph_bytes: self.prefill_graphs.graph_bytes() + self.decode_graphs.graph_bytes(),
        }
    }
}

/// The hidden states of each sequence's last row, `[B, C]`.
fn last_hidden(cx: &mut OpStream, live: &ForwardBatch, hidden: &Tensor) -> Result<Tensor> {
    if live.rows().is_some_and(|rows| rows.padded > hidden.dim(0)) {
        // The model has kept them, in the order of the sequences.
        return hidden.rows(0..live.num_sequences());
    }
    ops::gather_rows(cx, hidden, &live.last_rows)
}
