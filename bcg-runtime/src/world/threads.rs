//! A thread for each rank but the first, which runs on the caller's: all do the same at the same time.
//!
//! To wake a thread up costs more than the host's work of a replay, so a thread that waits looks for a while before it sleeps,
//! where there are cores enough.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use super::World;
use super::meeting::looks;
use crate::error::catch_panic;
use crate::{Error, Result};

type Job<S> = Box<dyn FnOnce(&mut S) + Send>;

/// The state of each rank of this process, and the threads that work on it.
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
    looks: u32,
}

struct RankThread<S> {
    board: Arc<Board<S>>,
    thread: Option<JoinHandle<()>>,
}

/// Where a thread finds its next job.
struct Board<S> {
    job: Mutex<Option<Job<S>>>,
    /// How many jobs were posted.
    num_posted: AtomicU64,
    is_over: AtomicBool,
}

/// The results of a run, as far as they are there.
struct Run<R> {
    results: Vec<Mutex<Option<Result<R>>>>,
    num_left: AtomicUsize,
    /// Who waits for all of them.
    caller: Thread,
}

impl<S: Send + 'static> RankThreads<S> {
    /// Starts a thread for each rank but the first, each with its state.
    ///
    /// # Errors
    /// [`Error::Option`] if there is not one state for each rank of this process; [`Error::Other`] if the system starts no more threads.
    pub fn start(world: &World, states: Vec<S>) -> Result<Self> {
        if states.len() != world.num_local() {
            let message = format!("{} states for {} ranks; give one for each rank", states.len(), world.num_local());
            return Err(Error::Option { option: "RankThreads::start", message });
        }
        let mut states = states.into_iter();
        let first = states.next().ok_or_else(|| Error::other("a world has at least one rank"))?;
        let looks = looks(world.num_local());
        let mut ranks = Self { world: world.clone(), first, others: Vec::new(), looks };
        for (at, state) in states.enumerate() {
            ranks.others.push(RankThread::start(world.first_rank() + at + 1, state, looks)?);
        }
        Ok(ranks)
    }

    /// Runs `f` on every rank of this process at once, and returns what it returned, in the order of the ranks. A panic of `f` is an error,
    /// and ends the world.
    ///
    /// # Errors
    /// The error of the rank that failed by itself; [`Error::RankLost`] if there is none.
    pub fn run<R: Send + 'static>(
        &mut self,
        f: impl Fn(&mut S) -> Result<R> + Send + Sync + 'static,
    ) -> Result<Vec<R>> {
        if self.world.size() == 1 {
            return Ok(vec![catch_panic(|| f(&mut self.first))?]);
        }
        let f = Arc::new(f);
        let run = Arc::new(Run {
            results: (0..self.world.num_local()).map(|_| Mutex::default()).collect(),
            num_left: AtomicUsize::new(self.others.len()),
            caller: std::thread::current(),
        });
        for (at, other) in self.others.iter().enumerate() {
            let (f, run, world) = (Arc::clone(&f), Arc::clone(&run), self.world.clone());
            other.post(Box::new(move |state| {
                let result = run_rank(&world, at + 1, state, &*f);
                drop(f); // what it holds is the caller's again
                run.put(at + 1, result);
            }));
        }
        let own = run_rank(&self.world, 0, &mut self.first, &*f);
        let mut lost = self.wait_for_others(&run).err();
        let others = run.results[1..].iter().map(|place| {
            let result = place.lock().unwrap_or_else(PoisonError::into_inner).take();
            result.unwrap_or_else(|| Err(Error::other("a rank ended without a result")))
        });
        let (mut values, mut first) = (Vec::with_capacity(run.results.len()), None);
        for result in std::iter::once(own).chain(others) {
            match result {
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

    /// Waits until all other ranks have ended their part. One that takes longer than this one by the world's timeout is lost:
    /// the others then leave. It is waited for all the same, since nothing can make it come back.
    fn wait_for_others<R>(&self, run: &Run<R>) -> Result<()> {
        let is_done = || run.num_left.load(Ordering::Acquire) == 0;
        let (timeout, begun) = (self.world.timeout(), Instant::now());
        wait(self.looks, || is_done() || begun.elapsed() > timeout, Some(timeout));
        if is_done() {
            return Ok(());
        }
        let is_missing =
            |place: &Mutex<Option<Result<R>>>| place.lock().unwrap_or_else(PoisonError::into_inner).is_none();
        let slow = run.results[1..].iter().position(is_missing).map_or(1, |at| at + 1);
        let first = self.world.first_rank();
        let cause = format!("it did not end its part of a step within {timeout:?} after rank {first}");
        let lost = self.world.lose(first + slow, &Error::other(cause));
        wait(0, is_done, None);
        Err(lost)
    }

    /// Returns the state of this process's first rank, between runs.
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

/// Waits until something is done, whose doer then unparks this thread; with a time, it also looks when that is over.
fn wait(looks: u32, is_done: impl Fn() -> bool, at_most: Option<Duration>) {
    for _ in 0..looks {
        if is_done() {
            return;
        }
        std::hint::spin_loop();
    }
    while !is_done() {
        match at_most {
            Some(time) => std::thread::park_timeout(time),
            None => std::thread::park(),
        }
    }
}

fn run_rank<S, R>(
    world: &World,
    local: usize,
    state: &mut S,
    f: &(impl Fn(&mut S) -> Result<R> + ?Sized),
) -> Result<R> {
    let result = catch_panic(|| f(state));
    if let Err(error @ Error::Panic { .. }) = &result {
        world.lose(world.first_rank() + local, error);
    }
    result
}

impl<R> Run<R> {
    fn put(&self, rank: usize, result: Result<R>) {
        *self.results[rank].lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        if self.num_left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.caller.unpark();
        }
    }
}

impl<S: Send + 'static> RankThread<S> {
    fn start(rank: usize, mut state: S, looks: u32) -> Result<Self> {
        let board =
            Arc::new(Board { job: Mutex::default(), num_posted: AtomicU64::new(0), is_over: AtomicBool::new(false) });
        let own = Arc::clone(&board);
        let run = move || {
            for num_done in 0.. {
                let is_over = || own.is_over.load(Ordering::Acquire);
                wait(looks, || own.num_posted.load(Ordering::Acquire) > num_done || is_over(), None);
                let job = own.job.lock().unwrap_or_else(PoisonError::into_inner).take();
                match job {
                    Some(job) => job(&mut state),
                    None => return,
                }
            }
        };
        let thread = std::thread::Builder::new().name(format!("rank {rank}")).spawn(run).map_err(Error::other)?;
        Ok(Self { board, thread: Some(thread) })
    }
}

impl<S> RankThread<S> {
    /// Gives the thread its next job; it has none now.
    fn post(&self, job: Job<S>) {
        *self.board.job.lock().unwrap_or_else(PoisonError::into_inner) = Some(job);
        self.board.num_posted.fetch_add(1, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}

impl<S> Drop for RankThread<S> {
    fn drop(&mut self) {
        self.board.is_over.store(true, Ordering::Release);
        self.wake();
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
