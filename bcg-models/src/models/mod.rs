//! The models: one file of wiring each, over the shared layers.

mod nemotron_h;
mod qwen3;

pub use nemotron_h::NemotronH;
pub use qwen3::Qwen3;
