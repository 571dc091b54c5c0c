//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::MoeCombineArgs;
use crate::float::{Float, extend_f32, row};

pub(super) fn host<T: Float>(a: &MoeCombineArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let (columns, chosen) = (a.columns as usize, a.chosen as usize);
    for t in 0..dims.grid[0] as usize {
        let places = row::<i32>(memory, a.places, i64::from(a.chosen), t, chosen)?;
        let weights = row::<f32>(memory, a.weights, i64::from(a.chosen), t, chosen)?;
        let mut sums = vec![0.0f32; columns];
        let mut add = |values: Vec<f32>, weight: f32| {
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += weight * value);
        };
        let read = |matrix, stride, index| -> Result<Vec<f32>> {
            let mut values = Vec::with_capacity(columns);
            extend_f32(&mut values, row::<T>(memory, matrix, stride, index, columns)?);
            Ok(values)
        };
        let is_padded = row::<i32>(memory, a.experts, i64::from(a.chosen), t, chosen)?[0].get() < 0;
        for (place, weight) in places.iter().zip(weights) {
            if let Ok(place) = usize::try_from(place.get()) {
                add(read(a.y, i64::from(a.columns), place)?, weight.get());
            }
        }
        if !a.shared.is_null() && !is_padded {
            add(read(a.shared, a.shared_stride, t)?, 1.0);
        }
        let out = row::<T>(memory, a.out, i64::from(a.columns), t, columns)?;
        out.iter().zip(sums).for_each(|(out, sum)| out.set(T::from_f32(sum)));
    }
    Ok(())
}
