//! Collectives: ops through which the ranks of a world meet.
//!
//! - Every rank calls the same ops with tensors of the same shapes, in the same order. Outside of a world there is one rank,
//!   and an op does what one rank is left with: nothing, or the plain op.
//! - Sums are in f32, in the order of the ranks, and rounded once: every rank gets the same bits, however the message is cut
//!   into parts and whoever adds it up.
//! - They are for floats only. On GPUs a 32-bit word of all ones stands for "not yet written", so a payload word of all ones,
//!   which is one NaN in f32 and two in bf16 and f16, is sent as the NaN just below it.
//!
//! Where a kernel cannot reach all ranks, [`far`] says what an op is made of instead.
//! [`message`] cuts a message into parts and chooses the grid; [`reduce`] and [`gather`] are what several ops share.

mod far;
mod gather;
mod message;
mod reduce;

/// Names the kernels `<name>_bf16`, `<name>_f16` and `<name>_f32` of a source through which ranks meet, with the two halves of
/// one generic host reference.
///
/// Each use is a promise about the source, as `Kernel::collective` is, and says what it rests on.
macro_rules! per_float_collective {
    ($name:literal, $source:expr, $give:ident, $take:ident) => {{
        use bcg_runtime::{Kernel, RanksFn};
        // SAFETY: the comment at the use of this macro names the checks.
        unsafe {
            $crate::float::PerFloat {
                bf16: Kernel::collective(
                    concat!($name, "_bf16"),
                    &$source,
                    RanksFn { give: $give::<half::bf16>, take: $take::<half::bf16> },
                ),
                f16: Kernel::collective(
                    concat!($name, "_f16"),
                    &$source,
                    RanksFn { give: $give::<half::f16>, take: $take::<half::f16> },
                ),
                f32: Kernel::collective(
                    concat!($name, "_f32"),
                    &$source,
                    RanksFn { give: $give::<f32>, take: $take::<f32> },
                ),
            }
        }
    }};
}

ops! {
    all_gather,
    all_reduce,
    all_reduce_add_rms_norm,
    all_to_all,
    broadcast,
    moe_dispatch,
    moe_return,
    reduce_scatter_rows,
    send_receive,
    sum_parts,
}
