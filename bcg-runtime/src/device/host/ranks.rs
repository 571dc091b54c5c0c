//! A host device as a rank of a world: how its calls wait for collectives.
//!
//! A call that waits for work runs it under the device's lock. If nothing is left to run but collectives for which other
//! ranks did not come yet, it lets go of the lock, runs work that is queued on the devices of those ranks, and sleeps when
//! there is none, until something happens in the world or the time is over. So one thread may drive all ranks in turn, and
//! so may a thread for each.
//!
//! Invariant: no call holds the locks of two devices.

use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use super::collectives::{Collectives, Peer};
use super::queue::{OpRef, Parked};
use super::{HostBackend, Shared, State};
use crate::device::traits::{GraphHandle, NodeHandle, Part, RankBackend, Transport};
use crate::launch::PlaneId;
use crate::{DevicePtr, Error, Result};

/// How many operations of another rank's device are run before it is asked again whether that helped.
const HELP_MAX: usize = 16;

impl RankBackend for HostBackend {
    fn ordinal(&self) -> Option<i32> {
        None
    }

    fn share(&self, _base: DevicePtr, _bytes: usize, _with: &[i32]) -> Result<()> {
        Ok(())
    }

    /// Host devices have a queue each, and a graph is launched on one of them.
    fn add_chain(&self, _graph: GraphHandle, _parts: &[Part<'_>]) -> Result<Option<Vec<NodeHandle>>> {
        Ok(None)
    }

    fn transport_id(&self) -> Result<Option<Vec<u8>>> {
        Ok(None)
    }

    fn join_transport(&self, _id: &[u8], _rank: usize, _num_ranks: usize) -> Result<Box<dyn Transport>> {
        Err(Error::other("host devices of several processes need no library"))
    }

    fn join(&self, collectives: &Arc<Collectives>, rank: usize) -> PlaneId {
        collectives.join(rank, Arc::<Shared>::downgrade(&self.shared), Arc::clone(&self.shared.bell));
        self.lock().queue.join(collectives, rank)
    }
}

impl Peer for Shared {
    fn help(&self) -> bool {
        let state = &mut *self.lock();
        let most = 1 + state.queue.luck() % HELP_MAX;
        (0..most).take_while(|_| state.queue.run_one(&state.memory)).count() > 0
    }
}

/// Runs work of a rank for which these collectives may wait; `false` if none has any that can run.
fn help_peers(parked: &[Parked], luck: usize) -> bool {
    let mut peers: Vec<_> = parked.iter().flat_map(|parked| parked.collectives.peers_of(parked.rank)).collect();
    let first = luck % peers.len().max(1);
    peers.rotate_left(first);
    peers.iter().any(|peer| peer.help())
}

impl HostBackend {
    /// Runs work until `op` is done. Others may use the device meanwhile if a collective waits for other ranks.
    pub(super) fn run_until<'a>(&'a self, state: MutexGuard<'a, State>, op: OpRef) -> MutexGuard<'a, State> {
        self.run(state, |state| state.queue.run_until(op, &state.memory))
    }

    /// Runs all work that is queued now. Others may use the device meanwhile if a collective waits for other ranks.
    pub(super) fn run_all<'a>(&'a self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let latest = state.queue.latest();
        self.run(state, |state| state.queue.run_all(latest, &state.memory))
    }

    /// Calls `run`, which returns `false` where collectives hold it up, until it returns `true`.
    fn run<'a>(&'a self, mut state: MutexGuard<'a, State>, run: impl Fn(&mut State) -> bool) -> MutexGuard<'a, State> {
        let mut idle = Vec::new();
        loop {
            let heard = self.shared.bell.num_rings();
            if run(&mut state) {
                return state;
            }
            let (parked, luck) = (state.queue.parked().to_vec(), state.queue.luck());
            drop(state);
            if !help_peers(&parked, luck) {
                self.sleep(&parked, heard, &mut idle);
            }
            state = self.lock();
        }
    }

    /// Sleeps until something happened since `heard` or the time for a collective is over, and ends its world then. `idle`
    /// is how long this call has slept for each: time in which other ranks' work ran does not count against them.
    fn sleep(&self, parked: &[Parked], heard: u64, idle: &mut Vec<(OpRef, Duration)>) {
        let slept = |idle: &[(OpRef, Duration)], op| {
            idle.iter().find(|known| known.0 == op).map_or(Duration::ZERO, |known| known.1)
        };
        let left = |parked: &Parked| parked.collectives.timeout().saturating_sub(slept(idle, parked.op));
        if let Some(late) = parked.iter().find(|parked| left(parked).is_zero()) {
            return late.collectives.miss(late.round);
        }
        let at_most = parked.iter().map(left).min().unwrap_or_default();
        let begun = Instant::now();
        self.shared.bell.wait(heard, at_most);
        let now = begun.elapsed();
        *idle = parked.iter().map(|parked| (parked.op, slept(idle, parked.op) + now)).collect();
    }
}

#[cfg(test)]
mod tests;
