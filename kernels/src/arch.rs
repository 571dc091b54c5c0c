//! What architectures of GPUs can, where the choice of a kernel depends on it.

use bcg_runtime::Arch;

/// Bytes of a tensor map, by which the copy engine finds the boxes of a tensor from compute capability 9.0 on.
pub(crate) const MAP_BYTES: usize = 128;

/// Tells whether a block can have as much shared memory as data-centre GPUs give.
pub(crate) fn is_large(arch: Arch) -> bool {
    matches!((arch.major, arch.minor), (8, 0) | (9 | 10, _))
}
