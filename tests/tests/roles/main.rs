//! Prefill on one host device and decode on another one: models, and the engine that serves with both.

mod models;
mod serving;
