//! What a library carries between ranks that kernels cannot reach: GPUs of several processes.

use std::sync::Arc;

use crate::device::traits::Transport;
use crate::{Communicator, Error, OpStream, Result, Tensor};

const OP: &str = "OpStream::gather_from_all";

impl OpStream {
    /// Tells whether a library carries what this rank and the others send each other, because a kernel cannot:
    /// [`OpStream::gather_from_all`] takes the place of [`OpStream::launch_collective`].
    pub fn has_transport(&self) -> bool {
        self.transport().is_some()
    }

    /// Tells whether sums over the ranks are to be made of what was gathered: with a transport, or because
    /// [`CommunicatorOptions::sums_gathered`](crate::CommunicatorOptions::sums_gathered) asks for it.
    pub fn sums_gathered(&self) -> bool {
        self.communicator.as_ref().is_some_and(Communicator::sums_gathered)
    }

    pub(crate) fn transport(&self) -> Option<&Arc<dyn Transport>> {
        self.communicator.as_ref().and_then(|communicator| communicator.transport())
    }

    /// Enqueues the gathering of what every rank has, in the order of the ranks.
    ///
    /// All ranks enqueue the same, in the same order, on their main streams (law L16).
    ///
    /// # Shapes
    /// - `x`: any shape, without gaps.   - `out`: the same dtype and as many elements for each rank, without gaps.
    ///
    /// # Capture
    /// Enqueues what the library makes of it. Frozen: shapes and addresses. Read again at each replay: `x`. A break with it is
    /// not healed.
    ///
    /// # Errors
    /// [`Error::Shape`]; [`Error::Option`] without a transport or on a side stream; those of [`OpStream::addr`]; the library's.
    pub fn gather_from_all(&mut self, out: &Tensor, x: &Tensor) -> Result<()> {
        let fits = out.dtype() == x.dtype() && out.num_elements() == x.num_elements() * self.world_size();
        if !fits || !out.is_contiguous() || !x.is_contiguous() {
            let expected = format!(
                "`out` of {} times what {:?} {} has, both without gaps",
                self.world_size(),
                x.shape(),
                x.dtype()
            );
            return Err(Error::shape(OP, expected, format!("{:?} {}", out.shape(), out.dtype())));
        }
        let refuse = |message: &str| Err(Error::Option { option: OP, message: message.to_owned() });
        let Some(transport) = self.transport().cloned() else {
            return refuse("kernels reach all ranks of this world: use OpStream::launch_collective");
        };
        if !Arc::ptr_eq(&self.current, &self.main) {
            return refuse("a communicator has one order: enqueue on the main stream");
        }
        let (src, dst, bytes) = (self.addr(x)?, self.addr(out)?, x.size_bytes());
        if bytes == 0 {
            return Ok(());
        }
        self.count_launch("gather_from_all");
        self.enqueue("a gathering from other nodes", |_, stream| transport.gather(stream, src, dst, bytes))
    }
}
