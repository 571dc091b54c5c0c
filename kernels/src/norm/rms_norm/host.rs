//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::RmsNormArgs;
use crate::float::{Float, row};
use crate::norm::rms::rms_scale;

pub(super) fn host<T: Float>(a: &RmsNormArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let columns = a.columns as usize;
    let weight = memory.view::<T>(a.weight, columns)?;
    for t in 0..dims.grid[0] as usize {
        let x = row::<T>(memory, a.x, a.x_stride, t, columns)?;
        let out = row::<T>(memory, a.out, i64::from(a.columns), t, columns)?;
        let scale = rms_scale(x, a.eps);
        for ((out, x), weight) in out.iter().zip(x).zip(weight) {
            out.set(T::from_f32(T::round(x.get().to_f32() * scale) * weight.get().to_f32()));
        }
    }
    Ok(())
}
