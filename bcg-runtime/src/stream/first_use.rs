//! What must not be loaded while another rank's collective waits on the same GPU.
//!
//! The first launch of a kernel loads it, and a driver may wait for the GPU to be idle then. If two ranks share the GPU, a
//! collective of the one may be running, which waits for the other one: the rank that loads. So such ranks meet before a first
//! use, when neither has enqueued what the other has not, and again when both have loaded. Ranks with a GPU each need not:
//! of them, the one that is behind has nothing running that waits for others.

use std::collections::HashSet;

use crate::device::traits::MatmulShape;
use crate::world::Ranks;
use crate::{AnyKernel, OpStream, Result};

/// What has a first use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Loaded {
    /// A kernel, by its index.
    Kernel(usize),
    /// A product, whose kernels a library loads.
    Product(MatmulShape),
}

/// What ranks that share a GPU have loaded: kernels and shapes of products, as many as a process has.
#[derive(Debug)]
pub(super) struct FirstUses {
    ranks: Ranks,
    known: HashSet<Loaded>,
}

impl FirstUses {
    pub(super) fn new(ranks: &Ranks) -> Self {
        Self { ranks: ranks.clone(), known: HashSet::new() }
    }

    /// Calls `load` with all ranks, if this is not known to be loaded.
    fn meet<R>(&mut self, what: Loaded, load: impl FnOnce() -> Result<R>) -> Result<Option<R>> {
        const WHAT: &str = "the loading of a kernel";
        if self.known.contains(&what) {
            return Ok(None);
        }
        self.ranks.come(WHAT)?;
        let loaded = self.ranks.agree_here(WHAT, load())?;
        self.known.insert(what);
        Ok(Some(loaded))
    }
}

impl OpStream {
    /// Loads a kernel that is about to be enqueued, if other ranks share the GPU.
    pub(super) fn load_with_others(&mut self, kernel: &'static dyn AnyKernel) -> Result<()> {
        let Some(first_uses) = &mut self.first_uses else { return Ok(()) };
        let (index, device) = (kernel.index()?, &self.device);
        first_uses.meet(Loaded::Kernel(index), || device.prepare(&[kernel])).map(|_| ())
    }

    /// Calls `enqueue`, which enqueues a product; the first time together with other ranks that share the GPU.
    pub(crate) fn multiply_with_others(
        &mut self,
        shape: &MatmulShape,
        enqueue: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let Some(mut first_uses) = self.first_uses.take() else { return enqueue(self) };
        let (mut enqueue, shape) = (Some(enqueue), Loaded::Product(*shape));
        let first = first_uses.meet(shape, || enqueue.take().map_or(Ok(()), |enqueue| enqueue(self)));
        self.first_uses = Some(first_uses);
        match (first?, enqueue) {
            (None, Some(enqueue)) => enqueue(self),
            _ => Ok(()),
        }
    }
}
