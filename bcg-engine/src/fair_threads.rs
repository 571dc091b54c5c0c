//! A fixed number of threads that do the jobs of clients in turn.
//!
//! Invariants:
//! - The next job is one of the client with the fewest jobs under way, then of the one whose jobs took the least time. So a
//!   client with one job waits for about one job of each other client, however many those have.
//! - A job that panics ends alone; its thread goes on.
//! - A job that takes longer than the pool allows is lost: another thread takes the place of its own, which ends with it.
//!   There are never more than twice as many threads as the pool was made with.
//!
//! The pool does not bound what waits: its callers do, [`super::compilers`] by places, [`super::masks`] because a sequence
//! has one job at most.

use std::collections::{HashMap, VecDeque};
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::ClientId;

/// The most threads of one pool, however many cores there are.
const THREADS_MAX: usize = 8;

type Work = Box<dyn FnOnce() + Send>;

/// Returns how many threads a pool has: one for four cores, from 1 to 8.
pub(crate) fn num_threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    (cores / 4).clamp(1, THREADS_MAX)
}

/// Identity of a job in its pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct JobId(u64);

/// How a pool is made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PoolOptions {
    /// Name of its threads.
    pub(crate) name: &'static str,
    /// How many there are.
    pub(crate) num_threads: usize,
    /// After which time a job is lost.
    pub(crate) job_time_max: Duration,
    /// What its threads do first.
    pub(crate) begin: fn(),
}

/// The pool. Its threads end when it is dropped and their job is done; nobody waits for them.
#[derive(Debug)]
pub(crate) struct FairThreads {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    options: PoolOptions,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Clients with a job that waits or is under way.
    clients: HashMap<ClientId, Jobs>,
    /// When each job that is under way began; `None` once it is lost.
    running: HashMap<JobId, Option<Instant>>,
    next_id: u64,
    is_closed: bool,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("running", &self.running).finish_non_exhaustive()
    }
}

/// The jobs of one client.
#[derive(Default)]
struct Jobs {
    waiting: VecDeque<(JobId, Work)>,
    num_running: usize,
    used: Duration,
}

impl FairThreads {
    /// Starts the threads.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub(crate) fn start(options: PoolOptions) -> std::io::Result<Self> {
        let shared = Arc::new(Shared { options, state: Mutex::default(), changed: Condvar::new() });
        let pool = Self { shared };
        (0..options.num_threads).try_for_each(|_| spawn(&pool.shared))?;
        Ok(pool)
    }

    /// Puts a job behind the others of its client.
    pub(crate) fn submit(&self, client: &ClientId, work: impl FnOnce() + Send + 'static) -> JobId {
        let mut state = self.shared.lock();
        state.next_id += 1;
        let id = JobId(state.next_id);
        // Who comes anew begins level with who used least, with neither credit nor debt.
        let least = state.clients.values().map(|jobs| jobs.used).min().unwrap_or_default();
        let jobs = state.clients.entry(client.clone()).or_insert_with(|| Jobs { used: least, ..Jobs::default() });
        jobs.waiting.push_back((id, Box::new(work)));
        drop(state);
        self.shared.changed.notify_one();
        id
    }

    /// Drops a job that has not begun.
    pub(crate) fn forget(&self, client: &ClientId, id: JobId) {
        let mut state = self.shared.lock();
        let Some(jobs) = state.clients.get_mut(client) else { return };
        let at = jobs.waiting.iter().position(|(waiting, _)| *waiting == id);
        let job = at.and_then(|at| jobs.waiting.remove(at));
        state.remove_if_idle(client);
        drop(state);
        drop(job); // outside of the lock, as it may hold much
    }

    /// Puts threads in the places of those whose jobs took too long. Whoever waits for a job calls this now and then.
    pub(crate) fn replace_lost(&self) {
        let mut state = self.shared.lock();
        let options = &self.shared.options;
        let mut num_lost = state.running.values().filter(|began| began.is_none()).count();
        let overdue = |began: &Option<Instant>| began.is_some_and(|began| began.elapsed() > options.job_time_max);
        let late: Vec<JobId> = state.running.iter().filter(|(_, began)| overdue(began)).map(|(&id, _)| id).collect();
        for id in late {
            if num_lost == options.num_threads || spawn(&self.shared).is_err() {
                return;
            }
            num_lost += 1;
            state.running.insert(id, None);
            tracing::error!(pool = options.name, num_lost, "a job does not end; another thread takes its place");
        }
    }
}

impl Drop for FairThreads {
    fn drop(&mut self) {
        self.shared.lock().is_closed = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No job runs under the lock, and nothing else panics half way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next job; `None` at the end.
    fn next(&self) -> Option<(ClientId, JobId, Work)> {
        let mut state = self.lock();
        loop {
            if state.is_closed {
                return None;
            }
            if let Some(job) = state.take_next() {
                return Some(job);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Notes that a job ended; `false` if its thread was replaced meanwhile.
    fn done(&self, client: &ClientId, id: JobId, took: Duration) -> bool {
        let mut state = self.lock();
        if let Some(jobs) = state.clients.get_mut(client) {
            jobs.num_running -= 1;
            jobs.used += took;
        }
        state.remove_if_idle(client);
        state.running.remove(&id).flatten().is_some()
    }
}

impl State {
    fn take_next(&mut self) -> Option<(ClientId, JobId, Work)> {
        let waiting = self.clients.iter_mut().filter(|(_, jobs)| !jobs.waiting.is_empty());
        let (client, jobs) = waiting.min_by_key(|(_, jobs)| (jobs.num_running, jobs.used, jobs.waiting.len()))?;
        let (id, work) = jobs.waiting.pop_front()?;
        jobs.num_running += 1;
        self.running.insert(id, Some(Instant::now()));
        Some((client.clone(), id, work))
    }

    fn remove_if_idle(&mut self, client: &ClientId) {
        if self.clients.get(client).is_some_and(|jobs| jobs.num_running == 0 && jobs.waiting.is_empty()) {
            self.clients.remove(client);
        }
    }
}

fn spawn(shared: &Arc<Shared>) -> std::io::Result<()> {
    let shared = shared.clone();
    let thread = std::thread::Builder::new().name(shared.options.name.into());
    thread.spawn(move || {
        (shared.options.begin)();
        while let Some((client, id, work)) = shared.next() {
            let began = Instant::now();
            if catch_unwind(AssertUnwindSafe(work)).is_err() {
                tracing::error!(pool = shared.options.name, "a job panicked");
            }
            if !shared.done(&client, id, began.elapsed()) {
                return;
            }
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    fn pool(num_threads: usize, job_time_max: Duration) -> FairThreads {
        let options = PoolOptions { name: "bcg-test", num_threads, job_time_max, begin: || {} };
        FairThreads::start(options).expect("threads")
    }

    /// Occupies a thread until the sender is dropped; returns once it has begun.
    fn occupy(pool: &FairThreads, client: &ClientId) -> Sender<()> {
        let (release, released) = channel::<()>();
        let (begins, begun) = channel();
        pool.submit(client, move || {
            begins.send(()).expect("somebody waits");
            let _ = released.recv();
        });
        begun.recv().expect("it begins");
        release
    }

    /// Puts jobs into the pool that send their names.
    fn name(pool: &FairThreads, client: &ClientId, names: &[&'static str]) -> (Vec<JobId>, Receiver<&'static str>) {
        let (sender, receiver) = channel();
        let ids = names.iter().map(|&name| {
            let sender = sender.clone();
            pool.submit(client, move || {
                let _ = sender.send(name);
            })
        });
        (ids.collect(), receiver)
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_client_with_one_job_is_not_behind_all_jobs_of_another() {
        let pool = pool(1, LONG);
        let (greedy, modest) = (ClientId::new("greedy"), ClientId::new("modest"));
        let gate = occupy(&pool, &greedy);
        let order = Arc::new(Mutex::new(Vec::new()));
        let (done, finished) = channel();
        for (client, name) in (0..20).map(|_| (&greedy, "greedy")).chain([(&modest, "modest")]) {
            let (order, done) = (order.clone(), done.clone());
            pool.submit(client, move || {
                std::thread::sleep(Duration::from_millis(2));
                order.lock().expect("no panic").push(name);
                done.send(()).expect("somebody waits");
            });
        }
        drop(gate);
        (0..21).for_each(|_| finished.recv_timeout(LONG).expect("every job ends"));
        let place = order.lock().expect("no panic").iter().position(|&name| name == "modest");
        assert!(place.is_some_and(|place| place <= 1), "{place:?}");
    }

    #[test]
    fn a_panic_ends_one_job() {
        let pool = pool(1, LONG);
        let client = ClientId::default();
        pool.submit(&client, || panic!("on purpose"));
        let (_, names) = name(&pool, &client, &["next"]);
        assert_eq!(names.recv_timeout(LONG), Ok("next"));
    }

    #[test]
    fn a_job_that_is_forgotten_never_runs() {
        let pool = pool(1, LONG);
        let client = ClientId::default();
        let gate = occupy(&pool, &client);
        let (ids, names) = name(&pool, &client, &["a", "b", "c"]);
        pool.forget(&client, ids[1]);
        drop(gate);
        assert_eq!(names.iter().collect::<Vec<_>>(), ["a", "c"]);
    }

    #[test]
    fn a_job_that_does_not_end_costs_a_thread_and_no_more_than_that() {
        let pool = pool(1, Duration::ZERO);
        let client = ClientId::default();
        let first = occupy(&pool, &client);
        let (_, names) = name(&pool, &client, &["after the first"]);
        pool.replace_lost();
        assert_eq!(names.recv_timeout(LONG), Ok("after the first"));
        // As many threads again are lost at most.
        let second = occupy(&pool, &client);
        let (_, names) = name(&pool, &client, &["after the second"]);
        pool.replace_lost();
        names.recv_timeout(Duration::from_millis(50)).expect_err("no third thread");
        drop(first);
        drop(second);
        assert_eq!(names.recv_timeout(LONG), Ok("after the second"));
    }
}
