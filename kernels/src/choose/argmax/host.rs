//! The host reference, which says what the kernel computes.

use std::cell::Cell;

use bcg_runtime::{Dims, HostMemory, Result};

use super::ArgmaxArgs;
use crate::choose::logits;
use crate::float::row;

pub(super) fn host(a: &ArgmaxArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    for b in 0..logits::rows(dims) {
        let logits = row::<f32>(memory, a.logits, a.stride, b, a.columns as usize)?;
        let best = largest(logits.iter().map(Cell::get).enumerate());
        row::<i32>(memory, a.out, 1, b, 1)?[0].set(best);
    }
    Ok(())
}

/// The index of the largest value; the first of equal ones, 0 if there is none but NaN.
pub(in crate::choose) fn largest(values: impl Iterator<Item = (usize, f32)>) -> i32 {
    let mut best = None;
    for (index, value) in values {
        if !value.is_nan() && best.is_none_or(|(_, most)| value > most) {
            best = Some((index, value));
        }
    }
    best.map_or(0, |(index, _)| index as i32)
}
