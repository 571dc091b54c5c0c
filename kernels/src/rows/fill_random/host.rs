//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::{FillRandomArgs, MEAN_OF_SUM};
use crate::float::Float;
use crate::random::{GOLDEN, mix};

pub(super) fn host<T: Float>(a: &FillRandomArgs, _dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    for (i, x) in memory.view::<T>(a.x, a.elements as usize)?.iter().enumerate() {
        let bits = mix(a.key.wrapping_add((i as u64).wrapping_mul(GOLDEN)));
        let sum: i32 = [0, 16, 32, 48].iter().map(|shift| (bits >> shift & 0xffff) as i32).sum();
        x.set(T::from_f32(((sum - MEAN_OF_SUM) as f32).mul_add(a.scale, a.mean)));
    }
    Ok(())
}
