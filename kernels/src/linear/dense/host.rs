//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};
use half::bf16;

use super::few_rows::LinearFewRowsArgs;
use crate::float::{Float, dot, extend_f32, row};

pub(super) fn host(a: &LinearFewRowsArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let (rows, outputs, depth) = (a.rows as usize, a.outputs as usize, a.depth as usize);
    let (mut x, mut weight) = (Vec::with_capacity(depth), Vec::with_capacity(depth));
    for t in 0..rows {
        x.clear();
        extend_f32(&mut x, row::<bf16>(memory, a.x, a.x_stride, t, depth)?);
        for n in 0..outputs {
            weight.clear();
            extend_f32(&mut weight, row::<bf16>(memory, a.weight, a.weight_stride, n, depth)?);
            let sum = dot(&x, &weight);
            if a.out_is_f32 == 0 {
                row::<bf16>(memory, a.out, a.outputs.into(), t, outputs)?[n].set(Float::from_f32(sum));
            } else {
                row::<f32>(memory, a.out, a.outputs.into(), t, outputs)?[n].set(sum);
            }
        }
    }
    Ok(())
}
