//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::Relu2Args;
use crate::float::{Float, row};

pub(super) fn host<T: Float>(a: &Relu2Args, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let columns = a.columns as usize;
    for t in 0..dims.grid[0] as usize {
        let x = row::<T>(memory, a.x, a.x_stride, t, columns)?;
        let out = row::<T>(memory, a.out, i64::from(a.columns), t, columns)?;
        for (out, x) in out.iter().zip(x) {
            let value = x.get().to_f32();
            let value = if value < 0.0 { 0.0 } else { value }; // keeps NaN
            out.set(T::from_f32(value * value));
        }
    }
    Ok(())
}
