//! From options to running replicas.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use bcg_models::{ModelRunner, Progress, Stage};

use super::super::load::Loader;
use super::super::local::{LocalEngine, Replica, Siblings};
use super::super::model::StepModel;
use super::super::options::EngineOptions;
use super::super::roles;
use super::Replicas;

/// Loads `dp` replicas at once and returns them once all serve. `progress` sees how far they are together; it is called
/// again if a device is lost and a model loaded once more.
///
/// # Errors
/// As [`load::start`](crate::load::start), of the first replica that cannot be loaded; with several, the error names it.
pub fn start(
    options: &EngineOptions,
    progress: impl FnMut(Progress) + Send + 'static,
) -> anyhow::Result<Replicas<LocalEngine>> {
    start_with(options, progress, |_, runner| Ok(runner))
}

/// As [`start`], with what `model` makes of a replica's number and runner: a model that counts, or one that fails on purpose.
///
/// # Errors
/// As [`start`]; what `model` returns.
pub fn start_with<M: StepModel + Send>(
    options: &EngineOptions,
    progress: impl FnMut(Progress) + Send + 'static,
    model: impl Fn(usize, ModelRunner) -> anyhow::Result<M> + Send + Sync + 'static,
) -> anyhow::Result<Replicas<LocalEngine>> {
    options.check()?;
    options.check_first_node()?;
    if let Some(gpus) = options.role_gpus() {
        let pair = roles::start_with(Loader::new(options, 0), gpus, progress, move |runner| model(0, runner))?;
        return Ok(Replicas::new(vec![pair]));
    }
    let (model, dp) = (Arc::new(model), options.dp);
    let progress = Arc::new(Mutex::new(Joined::new(dp, Box::new(progress))));
    let siblings = Siblings::new(options.queue());
    let start_one = |index: usize| {
        let (loader, model, progress) = (Loader::new(options, index), Arc::clone(&model), Arc::clone(&progress));
        let load = move || {
            let update = |done| progress.lock().unwrap_or_else(PoisonError::into_inner).update(index, done);
            let loaded = loader.load(&mut { update }, &mut |runner| model(index, runner));
            progress.lock().unwrap_or_else(PoisonError::into_inner).ended(index);
            loaded
        };
        match dp {
            1 => LocalEngine::start(load),
            _ => {
                let replica = Replica { index, siblings: siblings.clone() };
                LocalEngine::start_replica(replica, load).with_context(|| format!("replica {index}"))
            }
        }
    };
    let engines: Vec<anyhow::Result<LocalEngine>> = std::thread::scope(|scope| {
        let start_one = &start_one;
        let threads: Vec<_> = (0..dp).map(|index| scope.spawn(move || start_one(index))).collect();
        let panicked = |_| Err(anyhow::anyhow!("a thread panicked while it waited for a replica"));
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
    });
    Ok(Replicas::new(engines.into_iter().collect::<anyhow::Result<_>>()?))
}

/// How far one replica is.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// At which of the stages, in the order in which they were seen first.
    stage_idx: usize,
    done: usize,
}

/// Makes one progress of those of all replicas: of the stage that the slowest is at, the sum.
struct Joined {
    stages: Vec<Stage>,
    /// Of each replica. `usize::MAX` is after the last stage.
    places: Vec<Place>,
    progress: Box<dyn FnMut(Progress) + Send>,
}

impl Joined {
    fn new(replicas: usize, progress: Box<dyn FnMut(Progress) + Send>) -> Self {
        Self { stages: Vec::new(), places: vec![Place { stage_idx: 0, done: 0 }; replicas], progress }
    }

    fn update(&mut self, replica: usize, Progress { stage, done, total }: Progress) {
        let stage_idx = self.stages.iter().position(|known| *known == stage).unwrap_or_else(|| {
            self.stages.push(stage);
            self.stages.len() - 1
        });
        self.places[replica] = Place { stage_idx, done };
        if self.places.iter().any(|place| place.stage_idx < stage_idx) {
            return;
        }
        let of_place = |place: &Place| if place.stage_idx > stage_idx { total } else { place.done };
        let done = self.places.iter().map(of_place).sum();
        (self.progress)(Progress { stage, done, total: total * self.places.len() });
    }

    /// Notes that a replica is loaded, or never will be.
    fn ended(&mut self, replica: usize) {
        self.places[replica].stage_idx = usize::MAX;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_progress_of_all_is_that_of_the_slowest_stage() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sees = Arc::clone(&seen);
        let mut joined = Joined::new(2, Box::new(move |progress| sees.lock().expect("no panic").push(progress)));
        let at = |stage, done, total| Progress { stage, done, total };
        joined.update(0, at(Stage::LoadWeights, 4, 10));
        joined.update(0, at(Stage::LoadWeights, 10, 10));
        joined.update(0, at(Stage::WarmUp, 0, 1));
        joined.update(1, at(Stage::LoadWeights, 5, 10));
        joined.update(1, at(Stage::LoadWeights, 10, 10));
        joined.update(1, at(Stage::WarmUp, 1, 1));
        joined.ended(0);
        joined.update(1, at(Stage::Capture, 3, 3));
        let expected = [
            at(Stage::LoadWeights, 4, 20),
            at(Stage::LoadWeights, 10, 20),
            at(Stage::LoadWeights, 15, 20),
            at(Stage::LoadWeights, 20, 20),
            at(Stage::WarmUp, 1, 2),
            at(Stage::Capture, 6, 6),
        ];
        assert_eq!(*seen.lock().expect("no panic"), expected);
    }
}
