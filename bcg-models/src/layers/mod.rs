//! The layers that models are wired from. Fields bear the checkpoint's names.

mod attention;
mod decoder;
mod linear;
mod mamba2;
mod mla;
mod mlp;
mod moe;
mod norm;
mod yarn;

pub use attention::{Attention, Heads, Rotary, rope_theta};
pub use decoder::{Decoder, DecoderNames, Mixer, Sublayer};
pub use linear::Linear;
pub use mamba2::{Mamba2, Mamba2Config};
pub use mla::{Mla, MlaDims, MlaShared};
pub use mlp::{Mlp, Relu2Mlp};
pub use moe::{Moe, MoeConfig};
pub use norm::RmsNorm;
pub use yarn::RotaryScaling;
