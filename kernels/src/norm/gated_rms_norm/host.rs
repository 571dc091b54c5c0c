//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::GatedRmsNormArgs;
use crate::float::{Float, dot, row};

pub(super) fn host<T: Float>(a: &GatedRmsNormArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let (columns, group) = (a.columns as usize, a.group as usize);
    let weight = memory.view::<T>(a.weight, columns)?;
    for t in 0..dims.grid[0] as usize {
        let y = row::<T>(memory, a.y, a.y_stride, t, columns)?;
        let gate = row::<T>(memory, a.gate, a.gate_stride, t, columns)?;
        let out = row::<T>(memory, a.out, i64::from(a.columns), t, columns)?;
        let gated: Vec<f32> = y
            .iter()
            .zip(gate)
            .map(|(y, gate)| {
                let g = gate.get().to_f32();
                y.get().to_f32() * (g / (1.0 + (-g).exp()))
            })
            .collect();
        for ((out, gated), weight) in out.chunks(group).zip(gated.chunks(group)).zip(weight.chunks(group)) {
            let scale = 1.0 / (dot(gated, gated) / group as f32 + a.eps).sqrt();
            for ((out, value), weight) in out.iter().zip(gated).zip(weight) {
                out.set(T::from_f32(T::round(value * scale) * weight.get().to_f32()));
            }
        }
    }
    Ok(())
}
