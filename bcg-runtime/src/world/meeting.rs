//! Where the threads of all ranks wait for each other, with a bound.
//!
//! Invariant: a meeting ends for all ranks or for none; a rank that is in it leaves with its part of the result, or with the
//! error that all ranks of a lost world get.

use std::any::Any;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::device::ranks::Lost;
use crate::error::catch_panic;
use crate::{Error, Result};

/// How often a waiting thread looks before it sleeps, where there are cores enough: some 20 µs.
const LOOKS: u32 = 4000;

/// How many times the timeout a rank waits for the last one, where that one waits for other nodes itself.
const JOIN_TURNS: u32 = 3;

type Parcel = Box<dyn Any + Send>;

/// How often a thread of one of `size` ranks looks before it sleeps: not at all, if another one may need its core.
pub(super) fn looks(size: usize) -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if cores > size { LOOKS } else { 0 }
}

/// The place where the ranks of one world meet, one meeting after the other.
pub(crate) struct Meeting {
    timeout: Duration,
    /// What the last rank does for all may wait for other nodes, as long again.
    spans: bool,
    lost: Arc<Lost>,
    state: Mutex<State>,
    changed: Condvar,
    /// How many meetings have ended.
    num_ended: AtomicU64,
    looks: u32,
}

struct State {
    /// What the first to come came for.
    purpose: &'static str,
    /// What each rank that is there gave.
    given: Vec<Option<Parcel>>,
    /// What each rank gets of the meeting that ended last.
    results: Vec<Option<Parcel>>,
    /// The rank that came last and does now what all have come for.
    joiner: Option<usize>,
    /// A rank gave up because of this one: nobody meets here any more.
    late: Option<(usize, String)>,
    /// How many threads sleep: to wake one that does not costs a system call for nothing.
    num_asleep: usize,
}

/// Why a meeting failed.
pub(crate) enum Failed {
    /// The world was lost before, or meanwhile.
    Lost(Error),
    /// A rank did not come, or came for something else.
    Late { rank: usize, cause: String },
    /// What the last rank did failed.
    Join(Error),
}

impl Meeting {
    pub(crate) fn new(size: usize, timeout: Duration, lost: &Arc<Lost>, spans: bool) -> Self {
        let none = || (0..size).map(|_| None).collect();
        Self {
            timeout,
            spans,
            lost: Arc::clone(lost),
            state: Mutex::new(State {
                purpose: "",
                given: none(),
                results: none(),
                joiner: None,
                late: None,
                num_asleep: 0,
            }),
            changed: Condvar::new(),
            num_ended: AtomicU64::new(0),
            looks: looks(size),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes all who wait, after the world was lost.
    pub(crate) fn wake(&self) {
        drop(self.lock()); // whoever has just looked waits by now
        self.changed.notify_all();
    }

    /// See [`World::meet`](super::World::meet).
    pub(crate) fn meet<T: Send + 'static, R: Send + 'static>(
        &self,
        rank: usize,
        purpose: &'static str,
        value: T,
        join: impl FnOnce(Vec<T>) -> Result<Vec<R>>,
    ) -> Result<R, Failed> {
        let mut state = self.lock();
        if let Some(error) = self.lost.error() {
            return Err(Failed::Lost(error));
        }
        if let Some((rank, cause)) = state.late.clone() {
            return Err(Failed::Late { rank, cause });
        }
        let is_first = state.given.iter().all(Option::is_none);
        if is_first {
            state.purpose = purpose;
        } else if state.purpose != purpose || state.given[rank].is_some() {
            let cause = format!("it came for `{purpose}` while others wait at `{}`", state.purpose);
            return Err(Failed::Late { rank, cause });
        }
        state.given[rank] = Some(Box::new(value));
        let ended = self.num_ended.load(Ordering::Acquire);
        if state.given.iter().any(Option::is_none) {
            drop(state);
            return self.wait(rank, ended);
        }
        let given: Vec<Parcel> = state.given.iter_mut().filter_map(Option::take).collect();
        state.joiner = Some(rank);
        drop(state); // all others wait, so nobody begins another meeting
        let values = given.into_iter().filter_map(|parcel| parcel.downcast::<T>().ok()).map(|value| *value).collect();
        let results = catch_panic(|| join(values)).map_err(Failed::Join)?;
        let mut state = self.lock();
        let replace = |(place, result): (&mut Option<Parcel>, R)| place.replace(Box::new(result));
        let old: Vec<_> = state.results.iter_mut().zip(results).map(replace).collect();
        let own = Self::take_result(&mut state, rank);
        state.joiner = None;
        self.num_ended.store(ended + 1, Ordering::Release);
        let is_any_asleep = state.num_asleep > 0;
        drop(state);
        drop(old); // not under the lock: it may own what locks a device, under which `wake` may be called
        if is_any_asleep {
            self.changed.notify_all();
        }
        own
    }

    fn wait<R: Send + 'static>(&self, rank: usize, ended: u64) -> Result<R, Failed> {
        let has_ended = || self.num_ended.load(Ordering::Acquire) != ended;
        for _ in 0..self.looks {
            if has_ended() {
                return Self::take_result(&mut self.lock(), rank);
            }
            std::hint::spin_loop();
        }
        let begun = Instant::now();
        let mut state = self.lock();
        loop {
            if has_ended() {
                return Self::take_result(&mut state, rank);
            }
            if let Some(error) = self.lost.error() {
                return Err(Failed::Lost(error));
            }
            let turns = if self.spans && state.joiner.is_some() { JOIN_TURNS } else { 1 };
            let left = (self.timeout * turns).saturating_sub(begun.elapsed());
            if left.is_zero() {
                let (missing, did) = match state.joiner {
                    Some(joiner) => (joiner, "what it does for all ranks was not done"),
                    None => (state.given.iter().position(Option::is_none).unwrap_or(rank), "it did not come"),
                };
                let cause = format!("{did} within {:?}", self.timeout);
                state.late = Some((missing, cause.clone()));
                return Err(Failed::Late { rank: missing, cause });
            }
            state.num_asleep += 1;
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            state.num_asleep -= 1;
        }
    }

    fn take_result<R: 'static>(state: &mut State, rank: usize) -> Result<R, Failed> {
        let result = state.results[rank].take().and_then(|result| result.downcast::<R>().ok());
        let missing = || Failed::Join(Error::other("a meeting of the ranks has no result for each of them"));
        result.map(|result| *result).ok_or_else(missing)
    }
}
