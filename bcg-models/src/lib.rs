//! Language models on breakable CUDA graphs.

#![deny(unsafe_code)]

pub mod chat;
pub mod config;
mod error;
pub mod ops;
pub mod sampling;
#[cfg(test)]
mod testing;
pub mod tokenizer;
pub mod weights;

pub use error::{Error, Result};
pub use sampling::SamplingParams;
