//! A model whose ranks live in several processes, its nodes: how they load it alike, and how node 0 tells the others of each
//! step.
//!
//! All nodes load the model by the same code and so do the same, up to and with the graphs that are captured ahead. Then
//! only node 0 plans: it sends each step, put together once (law L13), before it runs its own part, and the others run what
//! comes until it leaves. Of a step only the tokens are read, on node 0.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::time::Duration;

use bcg_runtime::{DeviceKind, SpanOptions, World};
use serde::{Deserialize, Serialize};

use super::rank::Rank;
use super::staged::StagedStep;
use super::{ModelRunner, ModelRunnerOptions};
use crate::checkpoint;
use crate::error::{Error, Result};

/// How much longer one node may take than another to load its weights or to time its products.
const LOAD_PATIENCE: Duration = Duration::from_secs(1800);

/// What every rank does with a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Work {
    /// The forward, and the next tokens.
    Launch,
    /// The logits of all rows.
    Score,
    /// The forward alone.
    Run,
    /// The inputs alone.
    Upload,
    /// A replay whose steps are timed.
    Timeline,
}

impl ModelRunner {
    /// Tells the other nodes, if there are any, to do a step that this one is about to do.
    pub(super) fn command(&mut self, work: Work, step: &StagedStep) -> Result<()> {
        if self.world().num_nodes() == 1 {
            return Ok(());
        }
        if self.device().kind() == DeviceKind::Host {
            // It works only while somebody waits for it, and before another node has its part of a step it meets nobody.
            self.synchronize()?;
        }
        let command = postcard::to_allocvec(&(work, step)).map_err(bcg_runtime::Error::other)?;
        Ok(self.world().command(&command)?)
    }

    /// Does what node 0 does, until it leaves in order.
    ///
    /// # Errors
    /// [`bcg_runtime::Error::RankLost`] if a rank is lost, by an error here or elsewhere, or because a node has ended.
    pub fn follow(&mut self) -> Result<()> {
        while let Some(command) = self.world().next_command()? {
            let (work, step): (Work, StagedStep) = postcard::from_bytes(&command).map_err(|error| {
                let error = bcg_runtime::Error::other(format!("a command of node 0 cannot be read ({error})"));
                self.world().lose(self.world().first_rank(), &error)
            })?;
            self.follow_step(work, step).map_err(|error| self.stages.ended(error))?;
        }
        Ok(())
    }

    fn follow_step(&mut self, work: Work, step: StagedStep) -> Result<()> {
        match work {
            Work::Launch => self.stages.on_ranks(step, |rank, step| rank.launch(step).map(drop)),
            Work::Score => self.stages.on_ranks(step, |rank, step| rank.score(step).map(drop)),
            Work::Run => self.stages.on_ranks(step, |rank, step| rank.run(step).map(drop)),
            Work::Upload => self.stages.on_ranks(step, |rank, step| rank.upload(step).map(drop)),
            Work::Timeline => self.stages.on_ranks(step, |rank, step| rank.timeline(step).map(drop)),
        }?;
        match self.device().kind() {
            // It works only while somebody waits for it, and node 0 waits for its own.
            DeviceKind::Host => self.synchronize(),
            DeviceKind::Cuda => Ok(()),
        }
    }

    /// Takes how rank 0 computes products on all ranks, whose own times would tell them otherwise.
    pub(super) fn take_matmuls_of_first(&mut self) -> Result<()> {
        let world = self.world().clone();
        if world.size() == 1 {
            return Ok(());
        }
        let own = if world.node() == 0 { self.device().matmul_choices() } else { Vec::new() };
        let choices = world.exchange("the timing of products", own, LOAD_PATIENCE)?.swap_remove(0);
        self.stages.on_each(move |rank: &mut Rank| match rank.runtime.rank() {
            0 => Ok(()),
            _ => rank.device().take_matmul_choices(&choices),
        })?;
        Ok(())
    }
}

/// Waits until all nodes have loaded their weights.
pub(super) fn loaded(world: &World) -> Result<()> {
    world.exchange("the loading of weights", Vec::new(), LOAD_PATIENCE)?;
    Ok(())
}

/// Returns the smallest of what the nodes say.
pub(super) fn least(world: &World, purpose: &'static str, number: usize) -> Result<usize> {
    let all = world.exchange(purpose, (number as u64).to_le_bytes().to_vec(), world.timeout())?;
    let numbers = all.iter().map(|bytes| bytes.as_slice().try_into().map_or(0, u64::from_le_bytes));
    Ok(numbers.min().map_or(number, |least| least as usize))
}

/// Adds what must be the same on all nodes of a model: the version, the checkpoint and the options.
pub(super) fn must_be_same(span: &mut SpanOptions, dir: &Path, options: &ModelRunnerOptions) -> Result<()> {
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let rows = [("version", version), ("checkpoint", fingerprint(dir)?), ("options", format!("{options:?}"))];
    span.same.extend(rows.map(|(name, value)| (name.to_owned(), value)));
    Ok(())
}

/// What tells a checkpoint from others: what is in its `config.json`, and the names and sizes of its weights.
fn fingerprint(dir: &Path) -> Result<String> {
    let mut hasher = DefaultHasher::new();
    let config = dir.join("config.json");
    let file_error = |source| Error::File { file: dir.to_owned(), source };
    checkpoint::read(&config, checkpoint::CONFIG_BYTES_MAX)?.hash(&mut hasher);
    let mut weights = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(file_error)? {
        let entry = entry.map_err(file_error)?;
        let name = entry.file_name();
        if Path::new(&name).extension().is_some_and(|extension| extension == "safetensors") {
            weights.push((name, std::fs::metadata(entry.path()).map_err(file_error)?.len()));
        }
    }
    weights.sort();
    weights.hash(&mut hasher);
    Ok(format!("{:016x} ({} files of weights)", hasher.finish(), weights.len()))
}
