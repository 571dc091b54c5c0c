//! The host reference, which says what the kernel computes.

use std::cell::Cell;

use bcg_runtime::{DevicePtr, Dims, HostMemory, Result};

use super::MoeCombineArgs;
use crate::float::{Float, extend_f32, row};

pub(super) fn host<T: Float>(a: &MoeCombineArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let (columns, chosen) = (a.columns as usize, a.chosen as usize);
    let num_valid = memory.load::<i32>(a.num_valid, 1)?[0];
    for t in 0..dims.grid[0] as usize {
        let places = row::<i32>(memory, a.places, i64::from(a.chosen), t, chosen)?;
        let weights = row::<f32>(memory, a.weights, i64::from(a.chosen), t, chosen)?;
        let has_shared = !a.shared.is_null() && (t as i32) < num_valid;
        let shared = has_shared.then_some((a.shared, a.shared_stride));
        let sums = combined::<T>(memory, a.y, (places, weights), shared, (t, columns))?;
        let out = row::<T>(memory, a.out, i64::from(a.columns), t, columns)?;
        out.iter().zip(sums).for_each(|(out, sum)| out.set(T::from_f32(sum)));
    }
    Ok(())
}

/// The sum of row `t`, not yet rounded: the rows of `y` at its places, by weight, and its row of `shared`, a matrix and the
/// distance of its rows.
pub(crate) fn combined<T: Float>(
    memory: &HostMemory<'_>,
    y: DevicePtr,
    (places, weights): (&[Cell<i32>], &[Cell<f32>]),
    shared: Option<(DevicePtr, i64)>,
    (t, columns): (usize, usize),
) -> Result<Vec<f32>> {
    let mut sums = vec![0.0f32; columns];
    let mut add = |matrix, stride, index, weight: f32| -> Result<()> {
        let mut values = Vec::with_capacity(columns);
        extend_f32(&mut values, row::<T>(memory, matrix, stride, index, columns)?);
        sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += weight * value);
        Ok(())
    };
    for (place, weight) in places.iter().zip(weights) {
        if let Ok(place) = usize::try_from(place.get()) {
            add(y, columns as i64, place, weight.get())?;
        }
    }
    if let Some((shared, stride)) = shared {
        add(shared, stride, t, 1.0)?;
    }
    Ok(sums)
}
