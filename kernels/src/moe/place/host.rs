//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::PlaceArgs;
use crate::float::{Float, row};

pub(super) fn host<T: Float>(a: &PlaceArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let (tokens, columns) = (a.tokens as usize, a.columns as usize);
    let of = |matrix, index| row::<T>(memory, matrix, i64::from(a.columns), index, columns);
    for t in 0..a.num_ranks as usize * tokens {
        let mut sums = vec![-0.0f32; columns];
        if t / tokens == a.rank as usize {
            for rank in 0..a.num_ranks as usize {
                let part = of(a.parts, rank * tokens + t % tokens)?;
                sums.iter_mut().zip(part).for_each(|(sum, value)| *sum += value.get().to_f32());
            }
        }
        of(a.out, t)?.iter().zip(sums).for_each(|(out, sum)| out.set(T::from_f32(sum)));
    }
    Ok(())
}
