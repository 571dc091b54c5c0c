//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::SiluMulArgs;
use crate::float::{Float, row};

pub(super) fn host<T: Float>(a: &SiluMulArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let columns = a.columns as usize;
    for t in 0..dims.grid[0] as usize {
        let (gate, up) = row::<T>(memory, a.gate_up, a.stride, t, 2 * columns)?.split_at(columns);
        let out = row::<T>(memory, a.out, i64::from(a.columns), t, columns)?;
        for ((out, gate), up) in out.iter().zip(gate).zip(up) {
            out.set(gated(gate.get().to_f32(), up.get().to_f32()));
        }
    }
    Ok(())
}

/// SiLU of `gate`, rounded, times `up`.
pub(crate) fn gated<T: Float>(gate: f32, up: f32) -> T {
    T::from_f32(T::round(gate / (1.0 + (-gate).exp())) * up)
}
