//! Language models on breakable CUDA graphs.
//!
//! In the order in which a checkpoint becomes tokens:
//! 1. [`config`], [`weights`], [`tokenizer`], [`chat`]: what a checkpoint folder holds.
//! 2. [`layers`], [`models`], [`registry`]: what models are wired from, the models, and their names.
//! 3. [`state`], [`batch`]: the KV cache and its pages; the batch of one step.
//! 4. [`runner`]: a model on a device, one step of a batch through it, with or without graphs.
//!
//! # Shape letters
//! T tokens (rows), B sequences, C hidden, I MLP width, Hq/Hkv query and key-value heads, D head dim, V vocabulary,
//! P pages, S tokens of a page.

#![deny(unsafe_code)]

pub mod batch;
pub mod chat;
pub mod checkpoint;
pub mod config;
mod error;
pub mod layers;
pub mod models;
pub mod registry;
pub mod runner;
pub mod sampling;
pub mod state;
#[cfg(test)]
mod testing;
pub mod tokenizer;
pub mod weights;

pub use batch::{ChosenToken, ForwardBatch, Phase, SequenceInput};
pub use chat::{ChatMessage, ChatTemplate, RenderedChat};
pub use config::ModelConfig;
pub use error::{Error, Result};
pub use runner::{
    CaptureSummary, FinishReason, ForwardPath, GenerateOptions, Generated, GraphMode, GraphStats, LoadFormat,
    ModelRunner, ModelRunnerOptions, OptionError, PendingStep, Progress, RankMemory, Role, SampledToken, Stage,
    StepOutput, TOP_LOGPROBS_MAX,
};
pub use sampling::SamplingParams;
pub use tokenizer::{TokenStream, Tokenizer};
