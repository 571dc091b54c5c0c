//! The thread of an engine: loads its model, or both of a pair, works with it, and loads it again if it is lost.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use super::super::model::StepModel;
use super::super::roles::{PairThread, Roles};
use super::super::scheduler::Scheduler;
use super::super::worker::{EngineEnd, Exit, MessageSender, Requests, Shared, Worker, channel};
use super::LocalOptions;

/// Where an engine's thread says what it has loaded: the senders of its workers, to the first of which requests are sent.
pub(super) type Ready = SyncSender<anyhow::Result<(Vec<MessageSender>, LocalOptions)>>;

/// The worker's thread: makes a model and works with it, and again if it is lost.
pub(super) fn work<M, F>(mut load: F, ready: &Ready, shared: &Arc<Shared>)
where
    M: StepModel,
    F: FnMut() -> anyhow::Result<(M, Scheduler, LocalOptions)>,
{
    let (runner, scheduler, options) = match load() {
        Ok(loaded) => loaded,
        Err(error) => return drop(ready.send(Err(error))),
    };
    let (sender, receiver) = channel();
    let (queue_timeout, captures_lazily) = (options.queue.queue_timeout, options.watchdog.captures_lazily);
    if ready.send(Ok((vec![sender], options))).is_err() {
        return;
    }
    let mut requests = Requests::new(receiver, queue_timeout, captures_lazily);
    let run = |(runner, scheduler)| Worker::new(runner, scheduler, &mut requests, shared.clone()).run();
    let again = || load().map(|(runner, scheduler, _)| (runner, scheduler));
    if let Some(error) = work_with((runner, scheduler), again, run, shared) {
        requests.fail_all(&shared.metrics, &error);
    }
}

/// As [`work`], with a model for each of two roles, which are loaded and lost together.
pub(super) fn work_in_roles<M, F>(mut load: F, ready: &Ready, shared: &[Arc<Shared>; 2])
where
    M: StepModel + Send,
    F: FnMut() -> anyhow::Result<(Roles<M>, LocalOptions)>,
{
    let (roles, options) = match load() {
        Ok(loaded) => loaded,
        Err(error) => return drop(ready.send(Err(error))),
    };
    let (queue_timeout, captures_lazily) = (options.queue.queue_timeout, options.watchdog.captures_lazily);
    let mut pair = PairThread::new(shared.clone(), |receiver| Requests::new(receiver, queue_timeout, captures_lazily));
    if ready.send(Ok((pair.senders().to_vec(), options))).is_err() {
        return;
    }
    let again = || load().map(|(roles, _)| roles);
    if let Some(error) = work_with(roles, again, |roles| pair.run(roles), &shared[0]) {
        pair.fail_all(&error);
    }
}

/// Works with what was loaded, and with what `load` makes if it is lost. Returns why the engine gives up, if it
/// does.
fn work_with<T>(
    first: T,
    mut load: impl FnMut() -> anyhow::Result<T>,
    mut run: impl FnMut(T) -> Exit,
    shared: &Shared,
) -> Option<String> {
    let worked = catch_unwind(AssertUnwindSafe(|| {
        let exit = run(first);
        go_on(exit, &mut load, &mut run, shared)
    }));
    let error = match worked {
        Ok(Ok(())) => return None,
        Ok(Err(error)) => error,
        Err(_) => "the engine's thread panicked; see the log".to_owned(),
    };
    tracing::error!(error, "the engine gives up");
    shared.end_with(EngineEnd::GaveUp(error.clone()));
    Some(error)
}

/// A model that is lost again sooner than this after it was loaded is not loaded once more.
const RELOADS_APART: Duration = Duration::from_secs(60);

/// Loads the model again if that can help, and works on. An error says why the engine gives up.
fn go_on<T>(
    mut exit: Exit,
    load: &mut impl FnMut() -> anyhow::Result<T>,
    run: &mut impl FnMut(T) -> Exit,
    shared: &Shared,
) -> Result<(), String> {
    let mut loaded_at: Option<Instant> = None;
    loop {
        let error = match exit {
            Exit::Stopped => return Ok(()),
            Exit::ContextLost(error) => {
                return Err(format!("the device's context is lost ({error}): only a new process can use the device"));
            }
            Exit::ModelLost(error) => error,
        };
        if loaded_at.is_some_and(|at| at.elapsed() < RELOADS_APART) {
            return Err(format!("the device is lost a second time: {error}"));
        }
        tracing::error!(error, "the device is lost: loading the model again");
        shared.set_failure(Some(format!("the device is lost ({error}); the model is being loaded again")));
        let loaded = load().map_err(|again| {
            format!("the device is lost ({error}), and the model cannot be loaded again: {again:#}")
        })?;
        tracing::info!("the model is loaded again");
        shared.set_failure(None);
        loaded_at = Some(Instant::now());
        exit = run(loaded);
    }
}
