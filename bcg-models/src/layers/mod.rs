//! The layers that models are wired from. Fields bear the checkpoint's names.

mod attention;
mod linear;
mod mlp;
mod norm;

pub use attention::{Attention, Heads, Rotary, rope_theta};
pub use linear::Linear;
pub use mlp::Mlp;
pub use norm::RmsNorm;
