//! The ops that models are made of: the CUDA source, the shape checks, the launch geometry and the host reference of each.
//!
//! One folder per op, in a folder of its group: `mod.rs` has the checks, the geometry and the launch, `host.rs` the host
//! reference, each `.cu` file a source. An op takes the stream first, checks its tensors, takes its output from the arena and
//! enqueues one kernel; it works the same eagerly, under capture and inside breaks. The runtime compiles a source when a
//! kernel of it is first used.
//!
//! - A host reference rounds exactly where the CUDA kernel does, and sums in f32.
//! - A row of an output depends on the same row of the inputs only, never on how many rows there are; in attention,
//!   convolution and scan, also on the rows of its sequence before it. So padding changes no valid row, and NaN in padded
//!   rows stays there. Exceptions, on CUDA: [`attention_decode()`] and [`mla_decode()`] cut a row's sum where the lengths of
//!   other sequences have it, but not padded ones; above 16 rows [`linear()`] takes another algorithm for another number of
//!   rows, and [`grouped_linear()`] another one than up to 16. [`moe_route()`] orders valid rows among each other, and
//!   places no padded one.
//! - No op reads anything back, synchronises or looks at a live value.
//! - A kernel takes one `#[repr(C)]` struct by value. Addresses are computed in 64 bits, sums in f32 and in one fixed order,
//!   so that a result depends on nothing but the inputs.
//! - The sources need no CUDA header, only NVRTC.
//!
//! A new op is a folder, and a line in the `mod.rs` of its group.
//!
//! Shape letters: T tokens, B sequences, C hidden, I intermediate, Hq/Hkv query/key-value heads, D head dim, V
//! vocabulary, P pages, S page size, E experts, K chosen experts; in state-space layers H heads, P channels of a head, N
//! state size, G groups of heads, K kernel of the convolution; in latent attention H heads, L latent, R rotated part, Dn
//! the other part of queries and keys, Dv values.

#[macro_use]
mod sources;

mod arch;
mod check;
#[cfg(test)]
mod cubin;
mod float;
mod random;
mod softmax;

mod activation;
mod attention;
mod choose;
mod collective;
mod latent;
mod linear;
mod moe;
mod norm;
mod rows;
mod ssm;

pub use activation::*;
pub use attention::*;
pub use choose::*;
pub use collective::*;
pub use latent::*;
pub use linear::*;
pub use moe::*;
pub use norm::*;
pub use rows::*;
pub use sources::sources;
pub use ssm::*;
