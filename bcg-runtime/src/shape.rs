//! Shapes, inline, so that making a tensor needs no allocation.

use std::fmt;

use crate::{Error, Result};

/// The largest rank of a tensor.
pub(crate) const RANK_MAX: usize = 4;

/// Up to four dimensions.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    dims: [usize; RANK_MAX],
    rank: u8,
}

impl Shape {
    pub(crate) fn new(op: &'static str, dims: &[usize]) -> Result<Self> {
        if dims.is_empty() || dims.len() > RANK_MAX {
            return Err(Error::shape(op, format!("1 to {RANK_MAX} dimensions"), format!("{dims:?}")));
        }
        let mut own = [1; RANK_MAX];
        own[..dims.len()].copy_from_slice(dims);
        Ok(Self { dims: own, rank: dims.len() as u8 })
    }

    pub(crate) fn dims(&self) -> &[usize] {
        &self.dims[..usize::from(self.rank)]
    }

    pub(crate) fn num_elements(&self) -> usize {
        self.dims.iter().product()
    }

    /// Returns the elements of one row: one index of dimension 0.
    pub(crate) fn row_elements(&self) -> usize {
        self.dims[1..].iter().product()
    }

    pub(crate) fn with_dim(mut self, dim: usize, size: usize) -> Self {
        self.dims[dim] = size;
        self
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.dims())
    }
}
