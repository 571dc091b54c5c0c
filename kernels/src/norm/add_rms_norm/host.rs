//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::AddRmsNormArgs;
use crate::float::{Float, row};
use crate::norm::rms::rms_scale;

pub(super) fn host<T: Float>(a: &AddRmsNormArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let columns = a.columns as usize;
    let weight = memory.view::<T>(a.weight, columns)?;
    for t in 0..dims.grid[0] as usize {
        let x = row::<T>(memory, a.x, a.x_stride, t, columns)?;
        let residual = row::<T>(memory, a.residual, a.residual_stride, t, columns)?;
        let normed = row::<T>(memory, a.normed, i64::from(a.columns), t, columns)?;
        let sum = row::<T>(memory, a.sum, i64::from(a.columns), t, columns)?;
        for ((sum, x), residual) in sum.iter().zip(x).zip(residual) {
            sum.set(T::from_f32(x.get().to_f32() + residual.get().to_f32()));
        }
        let scale = rms_scale(sum, a.eps);
        for ((normed, sum), weight) in normed.iter().zip(sum).zip(weight) {
            normed.set(T::from_f32(T::round(sum.get().to_f32() * scale) * weight.get().to_f32()));
        }
    }
    Ok(())
}
