//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};

use super::MoePermuteArgs;

pub(super) fn host(a: &MoePermuteArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let experts = memory.load::<i32>(a.experts, a.pairs as usize)?;
    a.plan.write(memory, &experts)
}
