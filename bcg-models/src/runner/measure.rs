//! Parts of a step, for those who time them. They leave a sequence's state where it was, so that a batch can be run
//! again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bcg_kernels::fill_random;
use bcg_runtime::{ReplayMode, Timeline};

use super::nodes::Work;
use super::rank::Rank;
use super::staged::{Path, StagedStep};
use super::{ModelRunner, num_rows};
use crate::batch::{Phase, SequenceInput};
use crate::error::Result;

/// How a forward is run, for [`ModelRunner::forward_only`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForwardPath {
    /// It is the replay of a graph where there is one, as in [`ModelRunner::step`].
    Graph,
    /// It is the replay of a graph where there is one, launched segment by segment.
    Chain,
    /// It runs eagerly, whatever is captured.
    Eager,
}

impl ModelRunner {
    /// Fills all keys, values and states of this process's ranks with nearly normal numbers: values decide how much power a chip draws.
    ///
    /// # Errors
    /// The device's.
    pub fn fill_caches(&mut self) -> Result<()> {
        self.stages.on_each(|rank| {
            let caches = Arc::clone(&rank.caches);
            rank.runtime.eager(&(), move |cx| {
                let kv = caches.kv.layers().iter().flat_map(|layer| [&layer.k, &layer.v]);
                let states = caches.states.layers().iter().flat_map(|layer| [&layer.conv, &layer.ssm]);
                kv.chain(states).try_for_each(|tensor| fill_random(cx, tensor, 1, 0.0, 1.0))
            })?;
            rank.runtime.synchronize()
        })?;
        Ok(())
    }

    /// Uploads a batch and enqueues its forward, up to the hidden states: no logits, no tokens. Does not wait for it.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn forward_only(&mut self, batch: &[SequenceInput<'_>], path: ForwardPath) -> Result<()> {
        self.check(batch)?;
        match path {
            ForwardPath::Graph => {
                let step = self.stage(batch);
                self.run_only(step)
            }
            ForwardPath::Chain => {
                self.set_replay_mode(ReplayMode::Chain)?;
                let step = self.stage(batch);
                let ran = self.run_only(step);
                self.set_replay_mode(ReplayMode::default())?;
                ran
            }
            ForwardPath::Eager => {
                let step = self.stage_as(batch, Phase::of(batch), (num_rows(batch), Path::Eager), true);
                self.run_only(step)
            }
        }
    }

    fn run_only(&mut self, step: StagedStep) -> Result<()> {
        self.command(Work::Run, &step)?;
        self.stages.on_ranks(step, |rank, step| rank.run(step).map(drop))
    }

    /// Sets how graphs are replayed from now on, by the ranks of this process.
    ///
    /// # Errors
    /// [`bcg_runtime::Error::RankLost`] if a rank is lost.
    pub fn set_replay_mode(&mut self, mode: ReplayMode) -> Result<()> {
        self.stages.on_each(move |rank| {
            rank.runtime.set_replay_mode(mode);
            Ok(())
        })?;
        Ok(())
    }

    /// Times the steps of a batch's replay, without upload, logits and tokens; with several ranks or stages, those of the first
    /// one. It replays the batch several times.
    ///
    /// # Errors
    /// As [`step`](Self::step); [`bcg_runtime::Error::NotCaptured`] if no graph is captured for this batch.
    pub fn timeline(&mut self, batch: &[SequenceInput<'_>]) -> Result<Timeline> {
        self.check(batch)?;
        let step = self.stage(batch);
        if step.path != Path::Replay {
            let name = format!("{} of {} rows", step.batch.phase().name(), step.batch.rows().padded);
            let reason = "this size was not captured, or was dropped";
            return Err(bcg_runtime::Error::NotCaptured { name, reason }.into());
        }
        self.command(Work::Timeline, &step)?;
        self.stages.on_first(step, Rank::timeline)
    }

    /// Decides how a batch would be run, uploads it, and returns its phase and padded rows.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn upload_only(&mut self, batch: &[SequenceInput<'_>]) -> Result<(Phase, usize)> {
        self.check(batch)?;
        let step = self.stage(batch);
        let of_step = (step.batch.phase(), step.batch.rows().padded);
        self.command(Work::Upload, &step)?;
        self.stages.on_ranks(step, |rank, step| rank.upload(step).map(drop))?;
        Ok(of_step)
    }

    /// Runs a greedy step and returns for how long the host worked: until all was enqueued, and, once the device had
    /// finished, until the tokens were read.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_host_time(&mut self, batch: &[SequenceInput<'_>]) -> Result<Duration> {
        let begun = Instant::now();
        let pending = self.enqueue(batch)?;
        let enqueued = begun.elapsed();
        self.synchronize()?;
        let begun = Instant::now();
        self.collect(pending)?;
        Ok(enqueued + begun.elapsed())
    }

    /// Waits until what was enqueued has run.
    ///
    /// # Errors
    /// The first error of that work.
    pub fn synchronize(&mut self) -> Result<()> {
        self.stages.on_each(|rank| rank.runtime.synchronize()).map(drop)
    }
}
