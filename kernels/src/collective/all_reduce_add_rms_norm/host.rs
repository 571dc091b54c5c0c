//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, Given, HostMemory, Result};

use super::NormArgs;
use crate::collective::message::give_row;
use crate::collective::reduce::sum;
use crate::float::{Float, row};
use crate::norm::rms::rms_scale;

pub(super) fn give<T: Float>(a: &NormArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for t in 0..a.rows as usize {
        give_row(&mut bytes, row::<T>(memory, a.x, a.x_stride, t, a.columns as usize)?);
    }
    Ok(bytes)
}

pub(super) fn take<T: Float>(a: &NormArgs, _: &Dims, gave: &Given, memory: &HostMemory<'_>) -> Result<()> {
    let columns = a.columns as usize;
    let weight = memory.view::<T>(a.weight, columns)?;
    for t in 0..a.rows as usize {
        let residual = row::<T>(memory, a.residual, a.residual_stride, t, columns)?;
        let normed = row::<T>(memory, a.normed, i64::from(a.columns), t, columns)?;
        let added = row::<T>(memory, a.sum, i64::from(a.columns), t, columns)?;
        for (c, (added, residual)) in added.iter().zip(residual).enumerate() {
            let reduced = T::round(sum::<T>(gave, t * columns + c));
            added.set(T::from_f32(reduced + residual.get().to_f32()));
        }
        let scale = rms_scale(added, a.eps);
        for ((normed, added), weight) in normed.iter().zip(added).zip(weight) {
            normed.set(T::from_f32(T::round(added.get().to_f32() * scale) * weight.get().to_f32()));
        }
    }
    Ok(())
}
