//! The models: one file of wiring each, over the shared layers.
//!
//! Each has a `cache_layout`, which refuses by name what the layers cannot honour, and a `load`, which takes the
//! weights. The [registry](crate::registry) has one line for each.

pub mod deepseek;
pub mod nemotron_h;
pub mod qwen3;
pub mod qwen3_moe;

#[cfg(test)]
mod tests;
