//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::HeadLinearArgs;
use crate::float::{Float, dot, extend_f32, row};

pub(super) fn host<T: Float>(a: &HeadLinearArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let (tokens, heads) = (a.tokens as usize, a.heads as usize);
    let (outputs, depth) = (a.outputs as usize, a.depth as usize);
    let (mut stored, mut weight, mut x) = (vec![], vec![], vec![]);
    for h in 0..heads {
        stored.clear();
        extend_f32(&mut stored, row::<T>(memory, a.weight, a.weight_stride, h, outputs * depth)?);
        let (next, step) = if a.is_transposed != 0 { (outputs, 1) } else { (1, depth) };
        weight.clear();
        weight.extend((0..outputs).flat_map(|n| (0..depth).map(move |k| n * step + k * next)).map(|i| stored[i]));
        for t in 0..tokens {
            x.clear();
            extend_f32(&mut x, row::<T>(memory, a.x, a.x_stride, t * heads + h, depth)?);
            let out = row::<T>(memory, a.out, outputs as i64, t * heads + h, outputs)?;
            for (out, weight) in out.iter().zip(weight.chunks(depth)) {
                out.set(T::from_f32(dot(&x, weight)));
            }
        }
    }
    Ok(())
}
