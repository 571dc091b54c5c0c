//! The arguments that all kernels of grouped products take.

use bcg_runtime::{DevicePtr, KernelArgs};

/// The arguments of every kernel of this product.
#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
pub(super) struct GroupedArgs {
    pub(super) x: DevicePtr,
    pub(super) weight: DevicePtr,
    pub(super) out: DevicePtr,
    /// `[experts + 1]`.
    #[points_to(const i32)]
    pub(super) offsets: DevicePtr,
    /// `[places]`.
    #[points_to(const i32)]
    pub(super) rows: DevicePtr,
    pub(super) x_stride: i64,
    pub(super) experts: u32,
    /// Columns of `out`; a gated product has twice as many rows in a matrix.
    pub(super) outputs: u32,
    pub(super) depth: u32,
    /// K: the row of `x` of a gated product is `rows[place] / chosen`.
    pub(super) chosen: u32,
    /// The length of `rows`, of which `offsets[experts]` are in use.
    pub(super) places: u32,
    /// Whether a kernel before may have written the weight; if not, it can be read ahead of `wait_for_inputs()`.
    pub(super) weight_is_input: u32,
}

impl GroupedArgs {
    /// Tells whether the kernels on tensor cores can address everything: in 16-byte words of bf16, of which they count up
    /// to 2³² in `x`.
    pub(super) fn is_in_words(&self) -> bool {
        let words = i64::from(self.places) * self.x_stride / 8;
        [self.x, self.weight, self.out].iter().all(|tensor| tensor.as_u64().is_multiple_of(16))
            && self.x_stride % 8 == 0
            && self.depth.is_multiple_of(8)
            && words < i64::from(u32::MAX)
    }
}
