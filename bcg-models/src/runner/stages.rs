//! The stages of a pipeline, each a world of ranks: one stage, if the model is not divided so.
//!
//! A step goes through the stages in order: rank 0 of each works on the caller's thread, the others on threads of their own.
//! Nobody waits for a device in between (`links`).

use std::sync::Arc;

use bcg_runtime::{Device, RankThreads, World};

use super::rank::Rank;
use super::staged::StagedStep;
use crate::error::{Error, Result};

/// All ranks, by stage. There is at least one stage, and every stage has equally many ranks.
#[derive(Debug)]
pub(super) struct Stages {
    first: RankThreads<Rank>,
    others: Vec<RankThreads<Rank>>,
}

impl Stages {
    /// # Errors
    /// That there is no stage.
    pub(super) fn new(stages: Vec<RankThreads<Rank>>) -> Result<Self> {
        let mut stages = stages.into_iter();
        let first = stages.next().ok_or_else(|| bcg_runtime::Error::other("a model has at least one stage"))?;
        Ok(Self { first, others: stages.collect() })
    }

    pub(super) fn len(&self) -> usize {
        1 + self.others.len()
    }

    fn iter(&self) -> impl Iterator<Item = &RankThreads<Rank>> {
        std::iter::once(&self.first).chain(&self.others)
    }

    fn iter_mut(&mut self) -> impl Iterator<Item = &mut RankThreads<Rank>> {
        std::iter::once(&mut self.first).chain(&mut self.others)
    }

    /// The world of the first stage.
    pub(super) fn first_world(&self) -> &World {
        self.first.world()
    }

    /// The world of each stage.
    pub(super) fn worlds(&self) -> impl Iterator<Item = &World> {
        self.iter().map(RankThreads::world)
    }

    /// The devices of all ranks of this process, stage by stage.
    pub(super) fn devices(&self) -> impl Iterator<Item = &Device> {
        self.worlds().flat_map(|world| (0..world.num_local()).map(|rank| world.device(rank)))
    }

    /// Rank 0 of each stage, which works on the caller's thread.
    pub(super) fn leaders(&self) -> impl Iterator<Item = &Rank> {
        self.iter().map(RankThreads::first)
    }

    /// As [`leaders`](Self::leaders), to change them.
    pub(super) fn leaders_mut(&mut self) -> impl Iterator<Item = &mut Rank> {
        self.iter_mut().map(RankThreads::first_mut)
    }

    /// Rank 0 of the first stage, which puts steps together.
    pub(super) fn first(&self) -> &Rank {
        self.first.first()
    }

    /// As [`first`](Self::first), to change it.
    pub(super) fn first_mut(&mut self) -> &mut Rank {
        self.first.first_mut()
    }

    /// Rank 0 of the last stage, whose tokens the host reads.
    pub(super) fn last_mut(&mut self) -> &mut Rank {
        self.others.last_mut().unwrap_or(&mut self.first).first_mut()
    }

    /// Runs a step on every rank of this process, stage by stage, and returns what rank 0 of the last stage returned. A stage
    /// that fails keeps the step from those after it.
    pub(super) fn on_ranks<R: Send + 'static>(
        &mut self,
        step: StagedStep,
        f: fn(&mut Rank, &StagedStep) -> bcg_runtime::Result<R>,
    ) -> Result<R> {
        self.on_stages(self.len(), step, f)
    }

    /// As [`on_ranks`](Self::on_ranks), on the ranks of the first stage alone.
    pub(super) fn on_first<R: Send + 'static>(
        &mut self,
        step: StagedStep,
        f: fn(&mut Rank, &StagedStep) -> bcg_runtime::Result<R>,
    ) -> Result<R> {
        self.on_stages(1, step, f)
    }

    fn on_stages<R: Send + 'static>(
        &mut self,
        num_stages: usize,
        step: StagedStep,
        f: fn(&mut Rank, &StagedStep) -> bcg_runtime::Result<R>,
    ) -> Result<R> {
        if num_stages == 1 && self.first.world().size() == 1 {
            let rank = self.first.first_mut();
            let result = f(rank, &step);
            rank.inputs.take_back(step.batch);
            return Ok(result?);
        }
        let step = Arc::new(step);
        let mut last = Err(bcg_runtime::Error::other("a world has at least one rank").into());
        for ranks in self.iter_mut().take(num_stages) {
            let shared = Arc::clone(&step);
            match on_world(ranks, move |rank| f(rank, &shared)) {
                Ok(results) => last = results.into_iter().next().map_or(last, Ok),
                Err(error) => {
                    last = Err(error);
                    break;
                }
            }
        }
        if let Some(step) = Arc::into_inner(step) {
            self.first_mut().inputs.take_back(step.batch);
        }
        last
    }

    /// Calls `f` on every rank of this process, at once on those of a stage, and returns what it returned, in the order of the
    /// devices. If it fails on one rank of several of a stage, the others may wait for that one: so their world is lost, and
    /// they stop to wait.
    pub(super) fn on_each<R: Send + 'static>(
        &mut self,
        f: impl Fn(&mut Rank) -> bcg_runtime::Result<R> + Send + Sync + 'static,
    ) -> Result<Vec<R>> {
        let f = Arc::new(f);
        let mut all = Vec::new();
        for ranks in self.iter_mut() {
            let f = Arc::clone(&f);
            all.extend(on_world(ranks, move |rank| f(rank))?);
        }
        Ok(all)
    }

    /// Checks that no rank of a stage before the last one was lost while it computed what the last one read.
    pub(super) fn check(&self) -> Result<()> {
        self.leaders().take(self.len() - 1).try_for_each(|rank| Ok(rank.runtime.check_world()?))
    }

    /// What a failed step says: that a rank is lost, if one is, unless the context of a device is, which no new world in
    /// this process helps. The rank has its number among the ranks of all stages then.
    pub(super) fn ended(&mut self, error: Error) -> Error {
        let is_context_lost = matches!(&error, Error::Runtime(error) if error.is_context_lost());
        if is_context_lost {
            return error;
        }
        for (stage, ranks) in self.iter_mut().enumerate() {
            let Some(mut lost) = ranks.world().lost() else { continue };
            let lost_contexts = ranks.run(|rank| {
                let synchronized = rank.device().synchronize();
                Ok(synchronized.err().filter(bcg_runtime::Error::is_context_lost))
            });
            if let bcg_runtime::Error::RankLost { rank, .. } = &mut lost {
                *rank += stage * ranks.world().size();
            }
            let first = lost_contexts.into_iter().flatten().flatten().next();
            return first.unwrap_or(lost).into();
        }
        error
    }
}

/// Calls `f` on every rank of a stage at once.
fn on_world<R: Send + 'static>(
    ranks: &mut RankThreads<Rank>,
    f: impl Fn(&mut Rank) -> bcg_runtime::Result<R> + Send + Sync + 'static,
) -> Result<Vec<R>> {
    let world = ranks.world().clone();
    if world.size() == 1 {
        return Ok(vec![f(ranks.first_mut())?]);
    }
    if let Some(lost) = world.lost() {
        return Err(lost.into());
    }
    let results = ranks.run(move |rank| {
        f(rank).inspect_err(|error| {
            world.lose(rank.runtime.rank(), error);
        })
    });
    Ok(results?)
}
