//! A tensor's place: what a graph keeps of a tensor between two replays.

use std::fmt;
use std::sync::Arc;

use crate::arena::Arena;
use crate::shape::Shape;
use crate::tensor::{PersistentBuffer, Storage};
use crate::{DType, DevicePtr, Tensor};

/// A tensor's place, without a claim on its memory. Only a running replay turns it into a tensor again (law L10).
#[derive(Clone)]
pub(crate) struct FrozenTensor {
    pub(crate) ptr: DevicePtr,
    pub(crate) shape: Shape,
    pub(crate) row_stride: usize,
    pub(crate) dtype: DType,
    persistent: Option<Arc<PersistentBuffer>>,
}

impl FrozenTensor {
    pub(crate) fn new(tensor: &Tensor) -> Self {
        let persistent = match &tensor.storage {
            Storage::Persistent(buffer) => Some(Arc::clone(buffer)),
            Storage::Arena(_) => None,
        };
        let Tensor { ptr, shape, row_stride, dtype, .. } = *tensor;
        Self { ptr, shape, row_stride, dtype, persistent }
    }

    pub(crate) fn thaw(&self, arena: &Arena) -> Tensor {
        let storage = match &self.persistent {
            Some(buffer) => Storage::Persistent(Arc::clone(buffer)),
            None => Storage::Arena(arena.bridge(self.ptr, self.span_bytes())),
        };
        Tensor { ptr: self.ptr, shape: self.shape, row_stride: self.row_stride, dtype: self.dtype, storage }
    }

    pub(crate) fn is_in_arena(&self) -> bool {
        self.persistent.is_none()
    }

    pub(crate) fn size_bytes(&self) -> usize {
        self.shape.num_elements() * self.dtype.size_bytes()
    }

    /// Returns the bytes from the first to the last element, gaps between rows included.
    fn span_bytes(&self) -> usize {
        let rows = self.shape.dims()[0];
        (rows.saturating_sub(1) * self.row_stride + self.shape.row_elements()) * self.dtype.size_bytes()
    }
}

impl fmt::Debug for FrozenTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} at {:#x}", self.dtype, self.shape, self.ptr.as_u64())
    }
}
