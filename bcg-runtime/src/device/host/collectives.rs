//! Where the collectives of several host devices meet.
//!
//! Each rank's device keeps its own lock and queue. What they share is a [`Collectives`] for each communicator: what every
//! rank gave to the collectives that are not done everywhere. Invariants:
//! - a rank gives to one collective at a time, in its stream's order, so no rank is more than one ahead of another and at
//!   most two rounds are open;
//! - the lock of a `Collectives` is taken under that of one device or of none, and no device is locked under it.
//!
//! `queue.rs` gives and takes; `ranks.rs` waits, helps the devices of other ranks and ends the world of one that is late.
//! Where a world spans nodes, what a rank gives is sent to the others, and the thread that reads from a node gives for its
//! ranks.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crate::device::ranks::{Lost, LostRank};
use crate::launch::Launch;
use crate::{Dims, Error, Result};

/// The meeting place of one communicator: what each rank gave to each collective that is not done on all ranks.
pub(crate) struct Collectives {
    timeout: Duration,
    lost: Arc<Lost>,
    /// The ranks of this process.
    local: Range<usize>,
    /// The other nodes, and the number of the communicator there.
    elsewhere: Option<(Arc<dyn Elsewhere>, usize)>,
    rounds: Mutex<Rounds>,
}

/// The collective that a rank came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Called {
    pub(crate) kernel: Cow<'static, str>,
    pub(crate) dims: Dims,
    /// The segment that it is captured in.
    pub(crate) segment: Option<usize>,
}

/// The device of another rank, as one that waits for it sees it.
pub(super) trait Peer: Send + Sync {
    /// Runs some of the work that is queued there; `false` if none can run. The caller holds the lock of no device.
    fn help(&self) -> bool;
}

/// The nodes of a world that are other processes.
pub(crate) trait Elsewhere: Send + Sync {
    /// Sends them what a rank of this process gives to a collective of a communicator. If that fails, the world is lost.
    fn give(&self, communicator: usize, rank: usize, called: &Called, gave: &[u8]);
}

/// The open rounds; one round is one collective of all ranks.
struct Rounds {
    ranks: Vec<Rank>,
    open: VecDeque<Round>,
    /// The number of the first open round.
    first: u64,
}

/// A rank, and how far it has come.
#[derive(Clone, Default)]
struct Rank {
    /// Its device, once it has joined.
    device: Option<(Weak<dyn Peer>, Arc<Bell>)>,
    num_given: u64,
    num_taken: u64,
}

struct Round {
    called: Called,
    /// The rank that came first.
    first: usize,
    gave: Vec<Option<Arc<[u8]>>>,
    num_taken: usize,
}

impl Collectives {
    pub(crate) fn new(num_ranks: usize, timeout: Duration, lost: &Arc<Lost>) -> Self {
        let rounds = Rounds { ranks: vec![Rank::default(); num_ranks], open: VecDeque::new(), first: 0 };
        Self { timeout, lost: Arc::clone(lost), local: 0..num_ranks, elsewhere: None, rounds: Mutex::new(rounds) }
    }

    /// As [`Collectives::new`], with ranks on other nodes beside these: communicator `number` of all nodes.
    pub(crate) fn spanning(self, local: Range<usize>, elsewhere: Arc<dyn Elsewhere>, number: usize) -> Self {
        Self { local, elsewhere: Some((elsewhere, number)), ..self }
    }

    /// Wakes all who wait, after the world was lost.
    pub(crate) fn wake(&self) {
        self.ring(&self.lock());
    }

    /// Returns how long a rank waits for another one.
    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Makes a device that of a rank.
    pub(super) fn join(&self, rank: usize, device: Weak<dyn Peer>, bell: Arc<Bell>) {
        self.lock().ranks[rank].device = Some((device, bell));
    }

    /// Returns the devices of all ranks but one that are still there.
    pub(super) fn peers_of(&self, rank: usize) -> Vec<Arc<dyn Peer>> {
        let rounds = self.lock();
        let others = rounds.ranks.iter().enumerate().filter(|(other, _)| *other != rank);
        others.filter_map(|(_, other)| other.device.as_ref()?.0.upgrade()).collect()
    }

    /// Gives what `rank`, one of this process, sends in its next collective, and returns the number of that round.
    ///
    /// # Errors
    /// [`Error::RankLost`] once the world is lost, and if the rank came to another collective than those before it, or came
    /// while it waits in one already.
    pub(super) fn give(&self, rank: usize, launch: &Launch, gave: Vec<u8>) -> Result<u64> {
        let (called, gave) = (Called::of(launch), Arc::from(gave));
        let number = self.put(&mut self.lock(), rank, &called, Arc::clone(&gave))?;
        if let Some((elsewhere, communicator)) = &self.elsewhere {
            // Not under the lock, since the other side may not take it before it has sent what it gives itself.
            elsewhere.give(*communicator, rank, &called, &gave);
        }
        Ok(number)
    }

    /// Gives what a rank of another node sent.
    ///
    /// # Errors
    /// As those of a rank of this process.
    pub(crate) fn give_from_afar(&self, rank: usize, called: &Called, gave: &[u8]) -> Result<()> {
        self.put(&mut self.lock(), rank, called, gave.into()).map(drop)
    }

    fn put(&self, rounds: &mut Rounds, rank: usize, called: &Called, gave: Arc<[u8]>) -> Result<u64> {
        self.lost.check()?;
        let number = rounds.ranks[rank].num_given;
        let at = (number - rounds.first) as usize;
        // A rank of another node gives only when it has taken, but is not seen to take.
        let waits = if self.local.contains(&rank) { number != rounds.ranks[rank].num_taken } else { at > 1 };
        if waits {
            let waits = rounds.open.get(at - 1).map_or("", |round| &*round.called.kernel);
            let cause =
                format!("it came to `{}` while it waits in `{waits}`: a communicator has one order", called.kernel);
            return Err(self.lose(rounds, rank, called, cause));
        }
        if at == rounds.open.len() {
            let gave = vec![None; rounds.ranks.len()];
            rounds.open.push_back(Round { called: called.clone(), first: rank, gave, num_taken: 0 });
        }
        let round = &mut rounds.open[at];
        if (&round.called.kernel, round.called.dims) != (&called.kernel, called.dims) {
            let cause = format!("it came to {called} while rank {} came to {}", round.first, round.called);
            return Err(self.lose(rounds, rank, called, cause));
        }
        round.gave[rank] = Some(gave);
        rounds.ranks[rank].num_given += 1;
        self.ring(rounds);
        Ok(number)
    }

    /// Returns what all ranks gave in a round that `rank` gave to, once all have.
    ///
    /// # Errors
    /// [`Error::RankLost`] if the world was lost before.
    pub(super) fn take(&self, rank: usize, number: u64) -> Result<Option<Vec<Arc<[u8]>>>> {
        let rounds = &mut *self.lock();
        let round = &mut rounds.open[(number - rounds.first) as usize];
        let Some(gave) = round.gave.iter().cloned().collect::<Option<Vec<_>>>() else {
            return self.lost.check().map(|()| None);
        };
        round.num_taken += 1;
        rounds.ranks[rank].num_taken += 1;
        while rounds.open.front().is_some_and(|round| round.num_taken == self.local.len()) {
            rounds.open.pop_front();
            rounds.first += 1;
        }
        Ok(Some(gave))
    }

    /// Ends the world because `rank` cannot give what it owes in a collective.
    pub(super) fn fail(&self, rank: usize, launch: &Launch, cause: String) -> Error {
        self.lose(&self.lock(), rank, &Called::of(launch), cause)
    }

    /// Ends the world because a rank did not come to a round in time, unless all have come meanwhile.
    pub(super) fn miss(&self, number: u64) {
        let rounds = self.lock();
        let at = number.checked_sub(rounds.first).map(|at| at as usize);
        let Some(round) = at.and_then(|at| rounds.open.get(at)) else { return };
        if let Some(missing) = round.gave.iter().position(Option::is_none) {
            let cause = format!("it did not come within {:?}", self.timeout);
            self.lose(&rounds, missing, &round.called, cause);
        }
    }

    /// Tells all who wait in this world that there may be something to do.
    pub(super) fn tell(&self) {
        self.ring(&self.lock());
    }

    fn lose(&self, rounds: &Rounds, rank: usize, called: &Called, cause: String) -> Error {
        let (collective, segment) = (called.kernel.clone().into_owned(), called.segment);
        let error = self.lost.set(LostRank { rank, collective, segment, cause });
        self.ring(rounds);
        error
    }

    fn ring(&self, rounds: &Rounds) {
        rounds.ranks.iter().filter_map(|rank| rank.device.as_ref()).for_each(|(_, bell)| bell.ring());
    }

    fn lock(&self) -> MutexGuard<'_, Rounds> {
        self.rounds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Called {
    fn of(launch: &Launch) -> Self {
        Self { kernel: Cow::Borrowed(launch.name()), dims: launch.dims, segment: launch.segment() }
    }
}

impl fmt::Display for Called {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Dims { grid, block, shared_bytes } = self.dims;
        write!(f, "`{}` (grid {grid:?}, block {block:?}, {shared_bytes} bytes of shared memory)", self.kernel)
    }
}

impl fmt::Debug for Collectives {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Collectives").field("timeout", &self.timeout).field("lost", &self.lost).finish_non_exhaustive()
    }
}

/// Wakes the threads that wait for other ranks on behalf of one device. No lock is taken while its own is held.
#[derive(Debug, Default)]
pub(super) struct Bell {
    num_rings: Mutex<u64>,
    rung: Condvar,
}

impl Bell {
    pub(super) fn num_rings(&self) -> u64 {
        *self.num_rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        *self.num_rings.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.rung.notify_all();
    }

    /// Waits until the bell has rung more often than `heard`, at most that long.
    pub(super) fn wait(&self, heard: u64, at_most: Duration) {
        let num_rings = self.num_rings.lock().unwrap_or_else(PoisonError::into_inner);
        let waits = |num_rings: &mut u64| *num_rings == heard;
        drop(self.rung.wait_timeout_while(num_rings, at_most, waits).unwrap_or_else(PoisonError::into_inner));
    }
}
