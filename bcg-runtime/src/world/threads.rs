//! A thread for each rank but the first, which runs on the caller's: all do the same at the same time.

use std::fmt;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::World;
use super::meeting::looks;
use crate::error::catch_panic;
use crate::{Error, Result};

type Job<S> = Arc<dyn Fn(&mut S) + Send + Sync>;

/// The state of each rank, and the threads that work on it.
///
/// # Example
/// ```
/// use bcg_runtime::{Device, RankThreads, World, WorldOptions};
/// let world = World::new(vec![Device::host(), Device::host()], WorldOptions::default())?;
/// let mut ranks = RankThreads::start(&world, vec![10, 20])?;
/// assert_eq!(ranks.run(|number: &mut i32| { *number += 1; Ok(*number) })?, [11, 21]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub struct RankThreads<S> {
    world: World,
    first: S,
    others: Vec<RankThread<S>>,
}

struct RankThread<S> {
    jobs: Option<SyncSender<Job<S>>>,
    thread: Option<JoinHandle<()>>,
}

impl<S: Send + 'static> RankThreads<S> {
    /// Starts a thread for each rank but the first, each with its state.
    ///
    /// # Errors
    /// [`Error::Option`] if there is not one state for each rank; [`Error::Other`] if the system starts no more threads.
    pub fn start(world: &World, states: Vec<S>) -> Result<Self> {
        if states.len() != world.size() {
            let message = format!("{} states for {} ranks; give one for each rank", states.len(), world.size());
            return Err(Error::Option { option: "RankThreads::start", message });
        }
        let mut states = states.into_iter();
        let first = states.next().ok_or_else(|| Error::other("a world has at least one rank"))?;
        let mut ranks = Self { world: world.clone(), first, others: Vec::new() };
        for (at, state) in states.enumerate() {
            ranks.others.push(RankThread::start(at + 1, state, looks(world.size()))?);
        }
        Ok(ranks)
    }

    /// Runs `f` on every rank at once, and returns what it returned, in the order of the ranks.
    ///
    /// # Errors
    /// The error of the rank that failed first, whose world is lost unless all ranks failed alike.
    pub fn run<R: Send + 'static>(
        &mut self,
        f: impl Fn(&mut S) -> Result<R> + Send + Sync + 'static,
    ) -> Result<Vec<R>> {
        if self.others.is_empty() {
            return Ok(vec![catch_panic(|| f(&mut self.first))?]);
        }
        let f = Arc::new(f);
        let results: Arc<Mutex<Vec<Option<Result<R>>>>> =
            Arc::new(Mutex::new((0..self.world.size()).map(|_| None).collect()));
        let (done, all_done) = sync_channel::<()>(self.others.len());
        for (at, other) in self.others.iter().enumerate() {
            let (f, results, done, world) = (Arc::clone(&f), Arc::clone(&results), done.clone(), self.world.clone());
            other.submit(Arc::new(move |state: &mut S| {
                let result = run_rank(&world, at + 1, state, &*f);
                results.lock().unwrap_or_else(PoisonError::into_inner)[at + 1] = Some(result);
                let _ = done.send(()); // the caller waits for it, or is gone
            }));
        }
        drop(done);
        let own = run_rank(&self.world, 0, &mut self.first, &*f);
        // Ends when each thread has sent or dropped its end.
        let looks = looks(self.world.size());
        while receive(&all_done, looks).is_some() {}
        let mut results = std::mem::take(&mut *results.lock().unwrap_or_else(PoisonError::into_inner));
        results[0] = Some(own);
        let ended = || Err(Error::other("the thread of a rank has ended"));
        let (mut values, mut lost, mut first) = (Vec::with_capacity(results.len()), None, None);
        for result in results {
            match result.unwrap_or_else(ended) {
                Ok(value) => values.push(value),
                Err(error @ Error::RankLost { .. }) => lost = lost.or(Some(error)),
                Err(error) => first = first.or(Some(error)),
            }
        }
        // The rank that failed by itself says more than those that say that it is lost.
        match first.or(lost) {
            Some(error) => Err(error),
            None => Ok(values),
        }
    }

    /// Returns the state of rank 0, between runs.
    pub fn first(&self) -> &S {
        &self.first
    }

    /// As [`RankThreads::first`], to change it. Ranks differ then in what `f` changes.
    pub fn first_mut(&mut self) -> &mut S {
        &mut self.first
    }

    /// Returns the world.
    pub fn world(&self) -> &World {
        &self.world
    }
}

/// Takes the next value; nothing once no sender is left. Looks that often before it sleeps: to wake up costs more than the
/// host's work of a replay.
fn receive<T>(queue: &Receiver<T>, looks: u32) -> Option<T> {
    for _ in 0..looks {
        match queue.try_recv() {
            Ok(value) => return Some(value),
            Err(TryRecvError::Disconnected) => return None,
            Err(TryRecvError::Empty) => std::hint::spin_loop(),
        }
    }
    queue.recv().ok()
}

fn run_rank<S, R>(world: &World, rank: usize, state: &mut S, f: &(impl Fn(&mut S) -> Result<R> + ?Sized)) -> Result<R> {
    let result = catch_panic(|| f(state));
    if let Err(error @ Error::Panic { .. }) = &result {
        world.lose(rank, error);
    }
    result
}

impl<S: Send + 'static> RankThread<S> {
    fn start(rank: usize, mut state: S, looks: u32) -> Result<Self> {
        let (jobs, queue): (SyncSender<Job<S>>, Receiver<Job<S>>) = sync_channel(1);
        let run = move || {
            while let Some(job) = receive(&queue, looks) {
                job(&mut state);
            }
        };
        let thread = std::thread::Builder::new().name(format!("rank {rank}")).spawn(run);
        Ok(Self { jobs: Some(jobs), thread: Some(thread.map_err(Error::other)?) })
    }

    fn submit(&self, job: Job<S>) {
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(job); // a thread that has ended drops the job, which the caller notices
        }
    }
}

impl<S> Drop for RankThread<S> {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // its panics were caught
        }
    }
}

impl<S> fmt::Debug for RankThreads<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RankThreads").field("world", &self.world).finish_non_exhaustive()
    }
}
