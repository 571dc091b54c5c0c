//! Shapes, inline, so that making a tensor needs no allocation.
//!
//! Invariant: the product of all dimensions, those of size 0 left out, is at most [`ELEMENTS_MAX`]. So no number of
//! elements, bytes or strides that is reckoned from a shape or from part of one can overflow, and nobody else checks.

use std::fmt;

use crate::{Error, Result};

/// The largest rank of a tensor.
pub(crate) const RANK_MAX: usize = 4;

/// The most elements that a shape may stand for: as many as have addresses, whatever their dtype.
pub(crate) const ELEMENTS_MAX: usize = isize::MAX as usize / 8;

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
        let elements =
            dims.iter().filter(|size| **size > 0).try_fold(1, |product: usize, size| product.checked_mul(*size));
        if elements.is_none_or(|elements| elements > ELEMENTS_MAX) {
            let expected = format!("dimensions whose product is at most {ELEMENTS_MAX}, those of size 0 left out");
            return Err(Error::shape(op, expected, format!("{dims:?}")));
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

    /// Returns the shape with a dimension made smaller.
    pub(crate) fn with_dim(mut self, dim: usize, size: usize) -> Self {
        assert!(size <= self.dims[dim], "a view has no more than what it is a view of");
        self.dims[dim] = size;
        self
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.dims())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_whose_sizes_would_overflow_is_refused_by_name() {
        let wraps = (1 << 61) + 1;
        for dims in [&[wraps, 8][..], &[usize::MAX], &[1 << 32, 1 << 32], &[0, usize::MAX], &[1 << 20; 4], &[1 << 61]] {
            let refused = Shape::new("Device::empty", dims).unwrap_err().to_string();
            let expected = "Device::empty: expected dimensions whose product is at most 1152921504606846975, those of size \
                            0 left out, got ";
            assert_eq!(refused, format!("{expected}{dims:?}"));
        }
        for dims in [&[ELEMENTS_MAX][..], &[0, ELEMENTS_MAX], &[1 << 20, 0, 1 << 39], &[1 << 15; 4][..3]] {
            let shape = Shape::new("test", dims).unwrap();
            assert!(shape.num_elements() * 8 <= isize::MAX as usize && shape.row_elements() * 8 <= isize::MAX as usize);
        }
    }
}
