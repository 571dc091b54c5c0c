//! What joins the stages of a pipeline: memory of a stage that the one before it writes, and the events that order both.
//!
//! Rank r of a stage hands on to rank r of the next one. There is one place for the rows of a step: the stage before
//! computes the next step meanwhile, and only its copy waits until they were read. Everything is enqueued; no thread waits,
//! but on host devices, which cannot wait for each other.
//!
//! What orders the tokens: the first stage waits, before a step that takes tokens which the host has not read, for the event
//! of the step that chose them. The other way round the hidden states do it: a slot is written by the end of a step, whose
//! beginning on the first stage comes after all that read the slot before.

use std::sync::Arc;

use bcg_runtime::{DType, Device, Event, LiveBatch, Result, Runner, Tensor};

use crate::batch::{ForwardBatch, Received};
use crate::registry::StageOutput;

/// What joins a rank to the same rank of other stages.
#[derive(Debug, Clone, Default)]
pub(super) struct Links {
    /// From the stage before; the first stage has none.
    pub(super) before: Option<Arc<Boundary>>,
    /// To the stage after; the last stage has none.
    pub(super) after: Option<Arc<Boundary>>,
    /// From the last stage to the first, of several.
    pub(super) tokens: Option<Arc<TokenPath>>,
}

impl Links {
    /// Makes those of one rank of each stage, in the order of the stages: of one stage, none. A boundary has room for `rows`
    /// rows of `width` elements, the tokens' path for `sequences` tokens of as many steps as there are stages.
    pub(super) fn for_rank(
        devices: &[Device],
        [rows, width]: [usize; 2],
        dtype: DType,
        sequences: usize,
    ) -> Result<Vec<Self>> {
        let mut links = vec![Self::default(); devices.len()];
        for (stage, pair) in devices.windows(2).enumerate() {
            let boundary = Arc::new(Boundary::new(&pair[0], &pair[1], [rows, width], dtype)?);
            links[stage].after = Some(Arc::clone(&boundary));
            links[stage + 1].before = Some(boundary);
        }
        if let [first, .., last] = devices {
            let tokens = Arc::new(TokenPath::new(first, last, devices.len(), sequences)?);
            links[0].tokens = Some(Arc::clone(&tokens));
            links[devices.len() - 1].tokens = Some(tokens);
        }
        Ok(links)
    }

    /// Makes the coming forward wait for what the stage before hands on.
    pub(super) fn receive(&self, runner: &Runner) -> Result<()> {
        self.before.as_ref().map_or(Ok(()), |before| runner.wait_for(&before.written))
    }

    /// Says that the forward, or what was enqueued of it before it failed, has read its input.
    pub(super) fn end_reading(&self, runner: &Runner) -> Result<()> {
        self.before.as_ref().map_or(Ok(()), |before| runner.record(&before.read))
    }

    /// Hands a forward's output on to the stage after.
    pub(super) fn hand_on(&self, runner: &mut Runner, live: &ForwardBatch, output: &StageOutput) -> Result<()> {
        let (Some(after), Some(residual)) = (&self.after, &output.residual) else { return Ok(()) };
        let to = after.rows(live.rows().map_or(0, |rows| rows.padded))?;
        runner.wait_for(&after.read)?;
        runner.tail(live, |cx| {
            cx.copy(&to.branch, &output.hidden)?;
            cx.copy(&to.residual, residual)
        })?;
        runner.record(&after.written)
    }

    /// Makes the coming upload wait for the tokens of a slot, in the first stage.
    pub(super) fn await_tokens(&self, runner: &Runner, slot: Option<usize>) -> Result<()> {
        match (&self.before, &self.tokens, slot) {
            (None, Some(tokens), Some(slot)) => runner.wait_for(&tokens.written[slot]),
            _ => Ok(()),
        }
    }

    /// Tells the first stage the tokens that the last one chose, `[B]` i32, in a slot.
    pub(super) fn tell_tokens(
        &self,
        runner: &mut Runner,
        live: &ForwardBatch,
        chosen: &Tensor,
        slot: usize,
    ) -> Result<()> {
        let (Some(_), Some(tokens)) = (&self.before, &self.tokens) else { return Ok(()) };
        let first = slot * tokens.sequences;
        let to = tokens.chosen.rows(first..first + chosen.dim(0))?;
        runner.tail(live, |cx| cx.copy(&to, chosen))?;
        runner.record(&tokens.written[slot])
    }
}

/// The place where a stage finds what the one before it hands on.
#[derive(Debug)]
pub(super) struct Boundary {
    /// `[rows, C]` each, in the memory of the stage that reads them.
    all: Received,
    /// Recorded by the stage that writes, after its copy.
    written: Event,
    /// Recorded by the stage that reads, after its forward.
    read: Event,
}

impl Boundary {
    fn new(from: &Device, to: &Device, shape: [usize; 2], dtype: DType) -> Result<Self> {
        let with = std::slice::from_ref(from);
        let place = || to.zeros_shared(with, &shape, dtype);
        let all = Received { branch: place()?, residual: place()? };
        Ok(Self { all, written: Event::new(from)?, read: Event::new(to)? })
    }

    /// The first rows.
    pub(super) fn rows(&self, rows: usize) -> Result<Received> {
        Ok(Received { branch: self.all.branch.rows(0..rows)?, residual: self.all.residual.rows(0..rows)? })
    }
}

/// Where the first stage finds the tokens that the last one chose.
#[derive(Debug)]
pub(super) struct TokenPath {
    /// `[slots * B]` i32, in the memory of the first stage.
    pub(super) chosen: Tensor,
    /// Tokens that a slot has room for.
    sequences: usize,
    /// Recorded by the last stage when the tokens of a slot are there.
    written: Vec<Event>,
}

impl TokenPath {
    fn new(first: &Device, last: &Device, num_slots: usize, sequences: usize) -> Result<Self> {
        let chosen = first.zeros_shared(std::slice::from_ref(last), &[num_slots * sequences], DType::I32)?;
        let written = (0..num_slots).map(|_| Event::new(last)).collect::<Result<_>>()?;
        Ok(Self { chosen, sequences, written })
    }
}
