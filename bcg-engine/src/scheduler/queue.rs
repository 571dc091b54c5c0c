//! The waiting sequences, and whose turn is next.
//!
//! Each client has a queue of its own: greater priorities first, equal ones in order of arrival. Next comes the client that
//! runs the fewest sequences, and among equal ones the one that was served least recently. A probe comes before all.
//!
//! A client is known while it waits or runs, so there are never more than sequences.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};

use super::super::ClientId;
use super::super::sequence::{Lane, Sequence, SequenceId};

/// A client's place in the list of clients; the same one as long as the client waits or runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ClientIdx(usize);

/// The order within a client's queue.
type Turn = (Reverse<i32>, SequenceId);

#[derive(Debug, Default)]
struct Client {
    /// `None` in a place that nobody has.
    id: Option<ClientId>,
    waiting: BTreeMap<Turn, Sequence>,
    num_running: usize,
    /// When one of its sequences began to run last.
    served: u64,
    /// Tokens of prompts that it could run in the step that is planned.
    demand: usize,
    /// How many of them it may run.
    share: usize,
}

/// The queues of all clients, and how many sequences each of them runs.
#[derive(Debug, Default)]
pub(super) struct FairQueue {
    clients: Vec<Client>,
    by_id: HashMap<ClientId, ClientIdx>,
    /// Places of clients that are gone.
    vacant: Vec<ClientIdx>,
    turns: HashMap<SequenceId, (ClientIdx, Turn)>,
    clock: u64,
    /// Places of clients with a demand, in ascending order of it.
    by_demand: Vec<(usize, ClientIdx)>,
    /// Whether long prompts waited for short ones in the step before.
    has_waited: bool,
}

impl FairQueue {
    pub(super) fn len(&self) -> usize {
        self.turns.len()
    }

    /// All waiting sequences, client by client.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Sequence> {
        self.clients.iter().flat_map(|client| client.waiting.values())
    }

    pub(super) fn get_mut(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        let (idx, turn) = self.turns.get(&id)?;
        self.clients[idx.0].waiting.get_mut(turn)
    }

    /// Queues a sequence in its client's order.
    pub(super) fn push(&mut self, mut sequence: Sequence) {
        let idx = self.client(&sequence.client);
        sequence.client_idx = idx;
        let turn = (Reverse(sequence.priority), sequence.id);
        self.turns.insert(sequence.id, (idx, turn));
        self.clients[idx.0].waiting.insert(turn, sequence);
    }

    /// Takes a sequence out that will not run.
    pub(super) fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let (idx, turn) = self.turns.remove(&id)?;
        let sequence = self.clients[idx.0].waiting.remove(&turn);
        self.forget_if_gone(idx);
        sequence
    }

    /// The sequence whose turn is next, of a client whose share of `budget` tokens is larger than what it asks for so far.
    /// One that is held, or in another lane, lets those behind it pass; one that is in a step under way does not.
    pub(super) fn next(&self, lane: Lane, budget: usize) -> Option<(ClientIdx, SequenceId)> {
        let asking = self.clients.iter().map(|client| client.demand).filter(|demand| *demand > 0);
        let (sum, clients) = asking.fold((0_usize, 0), |(sum, count), demand| (sum.saturating_add(demand), count + 1));
        // Tokens are left, or it asks for less than its part.
        let has_share = |demand: usize| {
            let part = budget.div_ceil(clients.max(1) + usize::from(demand == 0 && clients > 0));
            budget > 0 && (sum < budget || demand < part)
        };
        let waiting = self.clients.iter().enumerate().filter(|(_, client)| !client.waiting.is_empty());
        let next = waiting.filter(|(_, client)| has_share(client.demand)).filter_map(|(idx, client)| {
            let first = client.waiting.values().find(|sequence| !sequence.is_held && sequence.lane == lane)?;
            let order = (!first.is_probe, client.num_running, client.served);
            (first.under_way == 0).then_some((order, ClientIdx(idx), first.id))
        });
        next.min_by_key(|(order, ..)| *order).map(|(_, idx, id)| (idx, id))
    }

    /// Takes a sequence out that runs from now on.
    pub(super) fn begin(&mut self, id: SequenceId) -> Option<Sequence> {
        let (idx, turn) = self.turns.remove(&id)?;
        self.clock += 1;
        let client = &mut self.clients[idx.0];
        client.num_running += 1;
        client.served = self.clock;
        client.waiting.remove(&turn)
    }

    /// Notes that a running sequence of this client ended, or will wait: then it is pushed first.
    pub(super) fn end(&mut self, idx: ClientIdx) {
        self.clients[idx.0].num_running -= 1;
        self.forget_if_gone(idx);
    }

    /// How many sequences a client runs.
    pub(super) fn num_running(&self, idx: ClientIdx) -> usize {
        self.clients[idx.0].num_running
    }

    /// The most sequences that one client runs.
    pub(super) fn most_running(&self) -> usize {
        self.clients.iter().map(|client| client.num_running).max().unwrap_or(0)
    }

    /// Begins to count the tokens of prompts that clients could run in a step.
    pub(super) fn clear_demands(&mut self) {
        self.clients.iter_mut().for_each(|client| client.demand = 0);
    }

    pub(super) fn add_demand(&mut self, idx: ClientIdx, tokens: usize) {
        self.clients[idx.0].demand += tokens;
    }

    pub(super) fn take_demand(&mut self, idx: ClientIdx, tokens: usize) {
        self.clients[idx.0].demand -= tokens;
    }

    /// Shares `budget` tokens out: each client gets what it asks for, or else as much as any other that gets less than it
    /// asks for. Where some get all, the others wait for one step, so that short prompts run in a short step, but never
    /// for two in a row.
    pub(super) fn share(&mut self, mut budget: usize) {
        self.by_demand.clear();
        let asking = self.clients.iter().enumerate().filter(|(_, client)| client.demand > 0);
        self.by_demand.extend(asking.map(|(idx, client)| (client.demand, ClientIdx(idx))));
        self.by_demand.sort_unstable_by_key(|(demand, idx)| (*demand, idx.0));
        for (at, (demand, idx)) in self.by_demand.iter().enumerate() {
            // Rounded up, so that the small ones, which come first, get the tokens that cannot be divided.
            let share = (*demand).min(budget.div_ceil(self.by_demand.len() - at));
            self.clients[idx.0].share = share;
            budget -= share;
        }
        let is_short = |(demand, idx): &(usize, ClientIdx)| self.clients[idx.0].share == *demand;
        let num_short = self.by_demand.iter().filter(|asked| is_short(asked)).count();
        self.has_waited = !self.has_waited && (1..self.by_demand.len()).contains(&num_short);
        if self.has_waited {
            // In ascending order of demand, the short ones come first.
            for (_, idx) in &self.by_demand[num_short..] {
                self.clients[idx.0].share = 0;
            }
        }
    }

    /// Takes up to `tokens` tokens of a client's share.
    pub(super) fn take_share(&mut self, idx: ClientIdx, tokens: usize) -> usize {
        let share = &mut self.clients[idx.0].share;
        let taken = tokens.min(*share);
        *share -= taken;
        taken
    }

    fn client(&mut self, id: &ClientId) -> ClientIdx {
        if let Some(&idx) = self.by_id.get(id) {
            return idx;
        }
        let idx = self.vacant.pop().unwrap_or_else(|| {
            self.clients.push(Client::default());
            ClientIdx(self.clients.len() - 1)
        });
        self.clients[idx.0] = Client { id: Some(id.clone()), ..Client::default() };
        self.by_id.insert(id.clone(), idx);
        idx
    }

    fn forget_if_gone(&mut self, idx: ClientIdx) {
        let client = &mut self.clients[idx.0];
        if client.num_running == 0 && client.waiting.is_empty() {
            if let Some(id) = client.id.take() {
                self.by_id.remove(&id);
            }
            client.demand = 0;
            self.vacant.push(idx);
        }
    }

    /// Checks that clients, queues and the running sequences agree.
    ///
    /// # Panics
    /// Says what does not.
    pub(super) fn check(&self, running: &[Sequence]) {
        for (idx, client) in self.clients.iter().enumerate() {
            let idx = ClientIdx(idx);
            let runs = running.iter().filter(|sequence| sequence.client_idx == idx).count();
            assert_eq!(client.num_running, runs, "client {:?} counts what it runs", client.id);
            let is_known = client.id.as_ref().is_some_and(|id| self.by_id.get(id) == Some(&idx));
            assert_eq!(is_known, runs + client.waiting.len() > 0, "client {:?} is known as long as it asks", client.id);
            assert_eq!(is_known, !self.vacant.contains(&idx), "a place is a client's or vacant");
            for (turn, sequence) in &client.waiting {
                assert_eq!(*turn, (Reverse(sequence.priority), sequence.id), "a queue is in order");
                assert_eq!(self.turns.get(&sequence.id), Some(&(idx, *turn)), "sequence {} is found", sequence.id);
            }
        }
        assert_eq!(self.turns.len(), self.iter().count(), "only waiting sequences have a turn");
        assert_eq!(self.by_id.len() + self.vacant.len(), self.clients.len(), "every place is accounted for");
    }
}
