//! Where the collectives of several host devices meet.

use std::sync::Arc;
use std::time::Duration;

use super::HostBackend;
use crate::DevicePtr;
use crate::Result;
use crate::device::ranks::Lost;
use crate::device::traits::{GraphHandle, NodeHandle, Part, RankBackend};
use crate::launch::PlaneId;

/// The meeting place of one communicator: what each rank gave to each collective that is not done on all ranks.
#[derive(Debug)]
pub(crate) struct Collectives {
    num_ranks: usize,
    timeout: Duration,
    lost: Arc<Lost>,
}

impl Collectives {
    pub(crate) fn new(num_ranks: usize, timeout: Duration, lost: &Arc<Lost>) -> Self {
        Self { num_ranks, timeout, lost: Arc::clone(lost) }
    }

    /// Wakes all who wait, after the world was lost.
    pub(crate) fn wake(&self) {}
}

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

    fn join(&self, _collectives: &Arc<Collectives>, _rank: usize) -> PlaneId {
        PlaneId(0)
    }
}
