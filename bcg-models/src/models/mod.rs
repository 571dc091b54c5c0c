//! The models: one file of wiring each, over the shared layers.

mod qwen3;

pub use qwen3::Qwen3;
