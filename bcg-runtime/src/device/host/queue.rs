//! The work of one host device that has not run yet: a graph of operations, run late and in a random allowed order.
//!
//! Invariants: an operation runs once, after all that it depends on; one at a time, by whoever holds the device's lock;
//! only when somebody waits for it or when more than `max_pending` are queued. An operation that depends on a failed
//! one is skipped. Each failure is returned once, by the first synchronisation that waits for the failed operation or
//! for one skipped because of it; one of another stream that waits for skipped work says so later. A stream whose
//! synchronisation returned an error is usable again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use super::fault::Flips;
use super::graph::GraphNodes;
use super::regions::Memory;
use super::work::Work;
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
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % bound as u64) as usize
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
        self.settle(slot)
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
        last
    }

    pub(super) fn is_pending(&self, op: OpRef) -> bool {
        op.seq != 0 && self.slots[op.slot as usize].seq == op.seq
    }

    /// Runs operations until `op` is done; others may run too.
    pub(super) fn run_until(&mut self, op: OpRef, memory: &Memory) {
        while self.is_pending(op) {
            self.run_one(memory);
        }
    }

    pub(super) fn run_all(&mut self, memory: &Memory) {
        while self.num_pending > 0 {
            self.run_one(memory);
        }
    }

    /// Keeps the queue within its bound: beyond it, runs a random number of operations.
    pub(super) fn trim(&mut self, memory: &Memory) {
        if self.num_pending > self.max_pending {
            for _ in 0..=self.rng.below(self.num_pending) {
                self.run_one(memory);
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
        self.slots.push(Slot { seq, work, lane, num_waiting: 0, dependents: Vec::new(), poison: None });
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

    fn run_one(&mut self, memory: &Memory) {
        let ready = if self.ready.is_empty() { &mut self.ready_late } else { &mut self.ready };
        let choice = if ready.len() == 1 { 0 } else { self.rng.below(ready.len()) };
        let idx = ready.swap_remove(choice);
        let slot = &mut self.slots[idx as usize];
        let seq = slot.seq;
        let work = std::mem::replace(&mut slot.work, Work::Nothing);
        let mut poison = slot.poison.take();
        if poison.is_none()
            && let Err(error) = self.run(&work, memory)
        {
            poison = Some(self.keep(seq, error));
        }
        self.finish(idx, poison);
        if let Some(failure) = poison {
            self.mark_failed(seq, failure);
        }
    }

    /// Runs work, and spoils what it wrote if a test wants that.
    fn run(&mut self, work: &Work, memory: &Memory) -> Result<()> {
        work.run(memory)?;
        if self.flips.is_empty() { Ok(()) } else { self.flips.ran(work.name(), work.output(), memory) }
    }

    fn finish(&mut self, idx: u32, poison: Option<u64>) {
        let slot = &mut self.slots[idx as usize];
        slot.seq = 0;
        let mut dependents = std::mem::take(&mut slot.dependents);
        for dependent in dependents.drain(..) {
            let slot = &mut self.slots[dependent as usize];
            slot.num_waiting -= 1;
            slot.poison = slot.poison.or(poison);
            if slot.num_waiting == 0 {
                self.make_ready(dependent);
            }
        }
        self.slots[idx as usize].dependents = dependents;
        self.free.push(idx);
        self.num_pending -= 1;
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
