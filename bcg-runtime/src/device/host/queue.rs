//! The work of one host device that has not run yet: a graph of operations, run late and in a random allowed order.
//!
//! Invariants: an operation runs once, after all that it depends on; one at a time, by whoever holds the device's lock;
//! only when somebody waits for it or when more than `max_pending` are queued. An operation that depends on a failed
//! one is skipped. Each failure is returned once, by the first synchronisation that waits for the failed operation or
//! for one skipped because of it; one of another stream that waits for skipped work says so later. A stream whose
//! synchronisation returned an error is usable again.
//!
//! A collective has two turns: in the first it gives what this rank sends, then it is parked, and in the second, once all
//! ranks gave, it takes. Parked work is neither ready nor done; only what depends on it waits for it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Weak};

use super::collectives::Collectives;
use super::fault::Flips;
use super::graph::GraphNodes;
use super::regions::Memory;
use super::work::{self, Work};
use crate::launch::{Launch, PlaneId};
use crate::{Error, Result};

/// How many different failures are kept apart; more count as the last.
pub(super) const FAILURES_MAX: usize = 64;
/// How many failed and skipped operations are remembered before those of reported failures are forgotten.
const FAILED_MAX: usize = 1 << 16;

/// An operation that was queued, or none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct OpRef {
    slot: u32,
    /// Never used twice; 0 stands for no operation.
    seq: u64,
}

#[derive(Debug)]
struct Slot {
    /// 0 while the slot is free.
    seq: u64,
    work: Work,
    lane: u32,
    num_waiting: u32,
    dependents: Vec<u32>,
    /// The failure because of which the operation is skipped.
    poison: Option<u64>,
    /// What all ranks gave to it, if it is a collective whose second turn has come.
    gave: Option<Vec<Arc<[u8]>>>,
}

/// A collective that has given and waits for other ranks.
#[derive(Clone, Debug)]
pub(super) struct Parked {
    pub(super) op: OpRef,
    pub(super) collectives: Arc<Collectives>,
    pub(super) round: u64,
    pub(super) rank: usize,
}

/// The place of a device in a communicator.
#[derive(Debug)]
struct Seat {
    /// The world owns it, and so does every runner that may enqueue a collective.
    collectives: Weak<Collectives>,
    rank: usize,
}

#[derive(Debug)]
struct Failure {
    /// `None` once it was returned.
    error: Option<Error>,
    text: String,
}

/// A small generator of random numbers (SplitMix64).
#[derive(Debug)]
struct Rng(u64);

impl Rng {
    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

#[derive(Debug)]
pub(super) struct Queue {
    slots: Vec<Slot>,
    free: Vec<u32>,
    ready: Vec<u32>,
    /// Ready, but on a delayed lane: run only when nothing else is ready.
    ready_late: Vec<u32>,
    delayed: HashSet<u32>,
    parked: Vec<Parked>,
    /// By the number of the communicator; those of worlds that are gone are used again.
    seats: Vec<Seat>,
    num_pending: usize,
    max_pending: usize,
    last_seq: u64,
    rng: Rng,
    /// The errors, by the `seq` of the operation that failed.
    failures: BTreeMap<u64, Failure>,
    /// Operations that failed or were skipped: `seq` → failure.
    failed: HashMap<u64, u64>,
    /// Slots of the nodes of the graph being launched.
    scratch: Vec<u32>,
    /// Bits of results that tests want flipped.
    pub(super) flips: Flips,
}

impl Queue {
    pub(super) fn new(seed: u64, max_pending: usize) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            ready: Vec::new(),
            ready_late: Vec::new(),
            delayed: HashSet::new(),
            parked: Vec::new(),
            seats: Vec::new(),
            num_pending: 0,
            max_pending,
            last_seq: 0,
            rng: Rng(seed),
            failures: BTreeMap::new(),
            failed: HashMap::new(),
            scratch: Vec::new(),
            flips: Flips::default(),
        }
    }

    pub(super) fn reseed(&mut self, seed: u64) {
        self.rng = Rng(seed);
    }

    #[cfg(test)]
    pub(super) fn num_failures(&self) -> usize {
        self.failures.len()
    }

    pub(super) fn num_pending(&self) -> usize {
        self.num_pending
    }

    /// Takes a place in a communicator and returns its number here.
    pub(super) fn join(&mut self, collectives: &Arc<Collectives>, rank: usize) -> PlaneId {
        let seat = Seat { collectives: Arc::downgrade(collectives), rank };
        let free = self.seats.iter().position(|seat| seat.collectives.strong_count() == 0);
        let at = free.unwrap_or(self.seats.len());
        match free {
            Some(at) => self.seats[at] = seat,
            None => self.seats.push(seat),
        }
        PlaneId(at as u32)
    }

    /// Returns the collectives that wait for other ranks.
    pub(super) fn parked(&self) -> &[Parked] {
        &self.parked
    }

    /// Returns a random number.
    pub(super) fn luck(&mut self) -> usize {
        self.rng.next() as usize
    }

    /// Returns the number of the operation that was queued last.
    pub(super) fn latest(&self) -> u64 {
        self.last_seq
    }

    /// Says whether the work of a lane runs only when no other work is ready.
    pub(super) fn set_delayed(&mut self, lane: u32, delayed: bool) {
        if delayed {
            self.delayed.insert(lane);
        } else {
            self.delayed.remove(&lane);
        }
        let ready: Vec<u32> = self.ready.drain(..).chain(self.ready_late.drain(..)).collect();
        for slot in ready {
            self.make_ready(slot);
        }
    }

    /// Queues `work` after `own`, the stream's latest operation, and after `other`.
    pub(super) fn push(&mut self, lane: u32, work: Work, own: OpRef, other: OpRef) -> OpRef {
        let slot = self.add(lane, work);
        self.depend(slot, own, other);
        let op = self.settle(slot);
        self.tell();
        op
    }

    /// Queues the nodes of a graph after `own` and `other`; what is returned is done when all nodes are.
    pub(super) fn push_graph(&mut self, lane: u32, graph: &Arc<GraphNodes>, own: OpRef, other: OpRef) -> OpRef {
        let mut slots = std::mem::take(&mut self.scratch);
        slots.clear();
        for (idx, node) in graph.nodes.iter().enumerate() {
            let slot = self.add(node.lane, Work::Node(Arc::clone(graph), idx as u32));
            slots.push(slot);
            for dep in &node.deps {
                self.depend_on_slot(slot, slots[*dep as usize]);
            }
            if node.deps.is_empty() {
                self.depend(slot, own, other);
            }
            self.settle(slot);
        }
        let last = match *graph.leaves {
            [] => self.push(lane, Work::Nothing, own, other),
            [leaf] => self.op_ref(slots[leaf as usize]),
            ref leaves => {
                let join = self.add(lane, Work::Nothing);
                leaves.iter().for_each(|leaf| self.depend_on_slot(join, slots[*leaf as usize]));
                self.settle(join)
            }
        };
        self.scratch = slots;
        self.tell();
        last
    }

    /// Tells the ranks of all worlds of this device that it has work which they may run.
    fn tell(&self) {
        if !(self.ready.is_empty() && self.ready_late.is_empty()) {
            self.seats.iter().filter_map(|seat| seat.collectives.upgrade()).for_each(|collectives| collectives.tell());
        }
    }

    pub(super) fn is_pending(&self, op: OpRef) -> bool {
        op.seq != 0 && self.slots[op.slot as usize].seq == op.seq
    }

    /// Runs operations until `op` is done; others may run too. Returns `false` if other ranks must come first.
    pub(super) fn run_until(&mut self, op: OpRef, memory: &Memory) -> bool {
        while self.is_pending(op) && self.run_one(memory) {}
        !self.is_pending(op)
    }

    /// Runs all that can run. Returns `false` if other ranks must come before all operations up to number `latest` are
    /// done.
    pub(super) fn run_all(&mut self, latest: u64, memory: &Memory) -> bool {
        while self.run_one(memory) {}
        self.num_pending == 0 || !self.slots.iter().any(|slot| (1..=latest).contains(&slot.seq))
    }

    /// Keeps the queue within its bound: beyond it, runs a random number of operations. What waits for other ranks stays:
    /// enqueuing waits for nobody.
    pub(super) fn trim(&mut self, memory: &Memory) {
        if self.num_pending > self.max_pending {
            for _ in 0..=self.rng.below(self.num_pending) {
                if !self.run_one(memory) {
                    break;
                }
            }
        }
    }

    /// Tells whether `op`, which is done, failed or was skipped.
    pub(super) fn has_failed(&self, op: OpRef) -> bool {
        self.failed.contains_key(&op.seq)
    }

    /// Returns the failure that kept `op`, which is done, from doing its work.
    pub(super) fn outcome(&mut self, op: OpRef) -> Result<()> {
        if self.failed.is_empty() {
            return Ok(());
        }
        let Some(id) = self.failed.remove(&op.seq) else { return Ok(()) };
        let failure = self.failures.get_mut(&id);
        let text = failure.as_ref().map_or("a failure", |failure| &failure.text);
        let skipped = Error::other(format!("work was skipped after: {text}"));
        Err(failure.and_then(|failure| failure.error.take()).unwrap_or(skipped))
    }

    /// Returns the first failure that was not returned yet and forgets all; nothing is pending.
    pub(super) fn outcome_of_all(&mut self) -> Result<()> {
        self.failed.clear();
        let failures = std::mem::take(&mut self.failures);
        failures.into_values().find_map(|failure| failure.error).map_or(Ok(()), Err)
    }

    fn add(&mut self, lane: u32, work: Work) -> u32 {
        self.last_seq += 1;
        self.num_pending += 1;
        let seq = self.last_seq;
        if let Some(idx) = self.free.pop() {
            let slot = &mut self.slots[idx as usize];
            (slot.seq, slot.work, slot.lane) = (seq, work, lane);
            return idx;
        }
        self.slots.push(Slot { seq, work, lane, num_waiting: 0, dependents: Vec::new(), poison: None, gave: None });
        self.slots.len() as u32 - 1
    }

    /// Orders a slot after `own`, whose failure it always shares, and after `other`, whose failure it shares until that
    /// was returned: else one event or graph would keep failing long after.
    fn depend(&mut self, slot: u32, own: OpRef, other: OpRef) {
        for dep in [own, other] {
            if self.is_pending(dep) {
                self.depend_on_slot(slot, dep.slot);
            } else if let Some(id) = self.failed.get(&dep.seq)
                && (dep == own || self.failures.get(id).is_some_and(|failure| failure.error.is_some()))
            {
                self.slots[slot as usize].poison.get_or_insert(*id);
            }
        }
    }

    fn depend_on_slot(&mut self, slot: u32, dep: u32) {
        self.slots[dep as usize].dependents.push(slot);
        self.slots[slot as usize].num_waiting += 1;
    }

    /// Ends the adding of an operation, of which all dependencies are known now.
    fn settle(&mut self, slot: u32) -> OpRef {
        if self.slots[slot as usize].num_waiting == 0 {
            self.make_ready(slot);
        }
        self.op_ref(slot)
    }

    fn op_ref(&self, slot: u32) -> OpRef {
        OpRef { slot, seq: self.slots[slot as usize].seq }
    }

    fn make_ready(&mut self, slot: u32) {
        if self.delayed.contains(&self.slots[slot as usize].lane) {
            self.ready_late.push(slot);
        } else {
            self.ready.push(slot);
        }
    }

    /// Runs one operation, or one turn of it. Returns `false` if none can run.
    pub(super) fn run_one(&mut self, memory: &Memory) -> bool {
        self.unpark();
        let ready = if self.ready.is_empty() { &mut self.ready_late } else { &mut self.ready };
        let choice = match ready.len() {
            0 => return false,
            1 => 0,
            num_ready => self.rng.below(num_ready),
        };
        let idx = ready.swap_remove(choice);
        let slot = &mut self.slots[idx as usize];
        let work = std::mem::replace(&mut slot.work, Work::Nothing);
        let (mut poison, gave) = (slot.poison.take(), slot.gave.take());
        let op = self.op_ref(idx);
        let outcome = match (work.collective(), &gave) {
            (Some((launch, plane)), None) => match self.give(op, launch, plane, poison, memory) {
                Ok(()) => {
                    self.slots[idx as usize].work = work;
                    return true;
                }
                Err(error) => Err(error),
            },
            _ if poison.is_some() => Ok(()),
            _ => self.run(&work, gave.as_deref().unwrap_or_default(), memory),
        };
        if let Err(error) = outcome
            && poison.is_none()
        {
            poison = Some(self.keep(op.seq, error));
        }
        self.finish(op, poison);
        true
    }

    /// The first turn of a collective: gives what this rank sends, and parks it. If there is nothing to give, because work
    /// before it failed, the other ranks wait in vain, so the world is lost.
    fn give(&mut self, op: OpRef, launch: &Launch, plane: PlaneId, poison: Option<u64>, memory: &Memory) -> Result<()> {
        let Seat { collectives, rank } = &self.seats[plane.0 as usize];
        let (rank, gone) = (*rank, || Error::other(format!("the world of `{}` is gone", launch.name())));
        let collectives = collectives.upgrade().ok_or_else(gone)?;
        if let Some(id) = poison {
            let text = self.failures.get(&id).map_or("a failure", |failure| &failure.text);
            return Err(collectives.fail(rank, launch, format!("its work was skipped after: {text}")));
        }
        let gave = {
            let _turn = memory.turn();
            work::give(launch, memory)
        };
        let gave = gave.inspect_err(|error| {
            collectives.fail(rank, launch, error.to_string());
        })?;
        let round = collectives.give(rank, launch, gave)?;
        self.parked.push(Parked { op, collectives, round, rank });
        Ok(())
    }

    /// Makes parked collectives ready for which all ranks have come, and ends those of a lost world.
    fn unpark(&mut self) {
        for at in (0..self.parked.len()).rev() {
            let Parked { op, collectives, round, rank } = &self.parked[at];
            let (op, taken) = (*op, collectives.take(*rank, *round));
            if let Ok(None) = taken {
                continue;
            }
            self.parked.swap_remove(at);
            match taken {
                Ok(gave) => {
                    self.slots[op.slot as usize].gave = gave;
                    self.make_ready(op.slot);
                }
                Err(error) => {
                    let failure = self.keep(op.seq, error);
                    self.finish(op, Some(failure));
                }
            }
        }
    }

    /// Runs work, and spoils what it wrote if a test wants that.
    fn run(&mut self, work: &Work, gave: &[Arc<[u8]>], memory: &Memory) -> Result<()> {
        let _turn = memory.turn();
        work.run(gave, memory)?;
        if self.flips.is_empty() { Ok(()) } else { self.flips.ran(work.name(), work.output(), memory) }
    }

    /// Ends an operation, which failed or was skipped if there is a `poison`.
    fn finish(&mut self, op: OpRef, poison: Option<u64>) {
        let slot = &mut self.slots[op.slot as usize];
        (slot.seq, slot.work) = (0, Work::Nothing);
        let mut dependents = std::mem::take(&mut slot.dependents);
        for dependent in dependents.drain(..) {
            let slot = &mut self.slots[dependent as usize];
            slot.num_waiting -= 1;
            slot.poison = slot.poison.or(poison);
            if slot.num_waiting == 0 {
                self.make_ready(dependent);
            }
        }
        self.slots[op.slot as usize].dependents = dependents;
        self.free.push(op.slot);
        self.num_pending -= 1;
        if let Some(failure) = poison {
            self.mark_failed(op.seq, failure);
        }
    }

    /// Keeps the failure of operation `seq`; returns its id.
    fn keep(&mut self, seq: u64, error: Error) -> u64 {
        if self.failures.len() >= FAILURES_MAX {
            self.failures.retain(|_, failure| failure.error.is_some());
        }
        if self.failures.len() >= FAILURES_MAX {
            return self.failures.last_key_value().map_or(seq, |(id, _)| *id);
        }
        let text = error.to_string();
        self.failures.insert(seq, Failure { error: Some(error), text });
        seq
    }

    fn mark_failed(&mut self, seq: u64, failure: u64) {
        if self.failed.len() >= FAILED_MAX {
            let failures = &self.failures;
            self.failed.retain(|_, id| failures.get(id).is_some_and(|failure| failure.error.is_some()));
        }
        self.failed.insert(seq, failure);
    }
}
