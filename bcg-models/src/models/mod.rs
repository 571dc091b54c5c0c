//! The models: one file of wiring each, over the shared layers.

mod deepseek;
mod nemotron_h;
mod qwen3;
mod qwen3_moe;

pub use deepseek::Deepseek;
pub use nemotron_h::NemotronH;
pub use qwen3::Qwen3;
pub use qwen3_moe::Qwen3Moe;
