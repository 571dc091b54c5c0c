//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::SumPartsArgs;
use crate::float::{Float, row};

pub(super) fn host<T: Float>(a: &SumPartsArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let part = |part: usize| row::<T>(memory, a.parts, a.part_step, part, a.elements as usize);
    let parts = (0..a.num_parts as usize).map(part).collect::<Result<Vec<_>>>()?;
    let out = row::<T>(memory, a.out, 0, 0, a.elements as usize)?;
    for (i, out) in out.iter().enumerate() {
        let mut values = parts.iter().map(|part| part[i].get().to_f32());
        let first = values.next().unwrap_or_default();
        out.set(T::from_f32(values.fold(first, |sum, value| sum + value)));
    }
    Ok(())
}
