//! One piece of device work: what a stream takes, a work list keeps, and a merged graph has as a node.

use crate::DevicePtr;
use crate::launch::Launch;

/// Work that can be enqueued now, or listed and enqueued later.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "nearly all work is launches, and a work list allocates nothing")]
pub(crate) enum Op {
    Launch(Launch),
    Fill {
        dst: DevicePtr,
        byte: u8,
        bytes: usize,
    },
    Copy(RowCopy),
    /// A copy from page-locked memory, read when the work runs.
    CopyFromPinned {
        dst: DevicePtr,
        src: DevicePtr,
        bytes: usize,
    },
}

impl Op {
    /// Tells whether the node of this work can be patched to do `other`: the same kernel with another geometry or other
    /// arguments, another fill, another copy of one row. The driver patches no copy of rows.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Launch(a), Self::Launch(b)) => std::ptr::addr_eq(a.kernel, b.kernel),
            (Self::Fill { .. }, Self::Fill { .. }) | (Self::CopyFromPinned { .. }, Self::CopyFromPinned { .. }) => true,
            (Self::Copy(a), Self::Copy(b)) => a == b || (a.is_one_piece() && b.is_one_piece()),
            _ => false,
        }
    }

    /// Tells whether two pieces of work that are alike are the same.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Launch(a), Self::Launch(b)) => a.dims == b.dims && a.args.as_slice() == b.args.as_slice(),
            (Self::Fill { dst, byte, bytes }, Self::Fill { dst: other_dst, byte: other_byte, bytes: other_bytes }) => {
                (dst, byte, bytes) == (other_dst, other_byte, other_bytes)
            }
            (Self::Copy(a), Self::Copy(b)) => a == b,
            (
                Self::CopyFromPinned { dst, src, bytes },
                Self::CopyFromPinned { dst: other_dst, src: other_src, bytes: other_bytes },
            ) => (dst, src, bytes) == (other_dst, other_src, other_bytes),
            _ => false,
        }
    }

    /// Tells whether this is a kernel that may start before the one ahead of it has ended.
    pub(crate) fn is_programmatic(&self) -> bool {
        matches!(self, Self::Launch(launch) if launch.kernel.is_programmatic())
    }
}

/// A copy of rows within a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RowCopy {
    pub(crate) dst: DevicePtr,
    pub(crate) dst_pitch: usize,
    pub(crate) src: DevicePtr,
    pub(crate) src_pitch: usize,
    pub(crate) row_bytes: usize,
    pub(crate) rows: usize,
}

impl RowCopy {
    /// Describes a copy of one piece.
    pub(crate) fn piece(dst: DevicePtr, src: DevicePtr, bytes: usize) -> Self {
        Self { dst, dst_pitch: bytes, src, src_pitch: bytes, row_bytes: bytes, rows: 1 }
    }

    /// Tells whether the rows lie one after the other without gaps, on both sides.
    pub(crate) fn is_one_piece(&self) -> bool {
        self.rows == 1 || (self.dst_pitch == self.row_bytes && self.src_pitch == self.row_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dims, Kernel, KernelArgs, Source};

    #[repr(C)]
    #[derive(Clone, Copy, KernelArgs)]
    struct OpArgs {
        value: u32,
    }

    static SOURCE: Source = Source::new("nop.cu", "").takes::<OpArgs>();
    // SAFETY: the source has no kernel, and the host reference does nothing.
    static A: Kernel<OpArgs> = unsafe { Kernel::new("a", &SOURCE, |_, _, _| Ok(())) };
    // SAFETY: as above.
    static B: Kernel<OpArgs> = unsafe { Kernel::new("b", &SOURCE, |_, _, _| Ok(())) };

    fn launch(kernel: &'static Kernel<OpArgs>, blocks: u32, value: u32) -> Op {
        Op::Launch(Launch::new(kernel, Dims::linear(blocks, 32), &OpArgs { value }))
    }

    fn copy(rows: usize, src: u64) -> Op {
        let (dst, src) = (DevicePtr(0), DevicePtr(src));
        Op::Copy(RowCopy { dst, dst_pitch: 16, src, src_pitch: 16, row_bytes: 8, rows })
    }

    #[test]
    fn work_of_one_kernel_is_alike_and_the_same_only_with_equal_geometry_and_arguments() {
        let one = launch(&A, 1, 7);
        assert!(one.is_like(&launch(&A, 2, 8)) && !one.is_like(&launch(&B, 1, 7)));
        assert!(one.is_same(&launch(&A, 1, 7)));
        assert!(!one.is_same(&launch(&A, 2, 7)) && !one.is_same(&launch(&A, 1, 8)));
    }

    #[test]
    fn fills_and_copies_are_told_apart() {
        let fill = |byte| Op::Fill { dst: DevicePtr(0), byte, bytes: 4 };
        assert!(fill(0).is_like(&fill(1)) && !fill(0).is_same(&fill(1)) && fill(1).is_same(&fill(1)));
        assert!(!fill(0).is_like(&copy(1, 64)) && !copy(1, 64).is_like(&launch(&A, 1, 1)));
        assert!(copy(1, 64).is_like(&copy(1, 128)) && !copy(1, 64).is_same(&copy(1, 128)));
        assert!(copy(3, 64).is_like(&copy(3, 64)) && !copy(3, 64).is_like(&copy(3, 128)), "rows cannot be patched");
    }
}
