//! OpenAI-compatible server and command line on breakable CUDA graphs.
//!
//! In the order of a request: [`args`] (flags) → [`api`] (HTTP) → [`engine`] (queue, batch, worker) → `bcg_models`.
//! Beside it: [`error`] (refusals in OpenAI's shape), [`metrics`], [`shutdown`], [`progress`], and [`cli`] (the `bcg`
//! binary's commands).

#![forbid(unsafe_code)]

pub mod api;
pub mod args;
pub mod cli;
pub mod engine;
pub mod error;
mod http_client;
pub mod logging;
pub mod metrics;
pub mod progress;
pub mod shutdown;
