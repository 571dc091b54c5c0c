//! A GPU as a rank of a world: its number, and who may touch its memory.

use std::sync::Arc;

use super::CudaBackend;
use super::merge::Merge;
use crate::device::host::collectives::Collectives;
use crate::device::traits::{GraphHandle, NodeHandle, Part, RankBackend, Transport};
use crate::launch::PlaneId;
use crate::{DevicePtr, Result};

impl RankBackend for CudaBackend {
    fn ordinal(&self) -> Option<i32> {
        Some(self.device)
    }

    fn share(&self, base: DevicePtr, bytes: usize, with: &[i32]) -> Result<()> {
        let _relaxed = self.enter()?;
        with.iter().try_for_each(|device| self.driver.set_access(base.0, bytes, *device))
    }

    fn transport_id(&self) -> Result<Option<Vec<u8>>> {
        self.nccl_id().map(Some)
    }

    fn join_transport(&self, id: &[u8], rank: usize, num_ranks: usize) -> Result<Box<dyn Transport>> {
        self.join_nccl(id, rank, num_ranks)
    }

    fn add_chain(&self, graph: GraphHandle, parts: &[Part<'_>]) -> Result<Option<Vec<NodeHandle>>> {
        let _relaxed = self.enter()?;
        Merge::new(self, graph.0).add_all(parts)
    }

    /// GPUs meet in each other's memory, at addresses that a collective has among its arguments.
    fn join(&self, _collectives: &Arc<Collectives>, _rank: usize) -> PlaneId {
        PlaneId(0)
    }
}
