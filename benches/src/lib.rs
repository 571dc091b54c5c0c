//! Benchmarks: what is timed, how it is timed, and how it is reported.
//!
//! The executables in `bin/` build without CUDA and run on the host device too, where a figure says something about the
//! runtime's own bookkeeping and nothing about a GPU.

pub mod program;
pub mod raw;
pub mod report;
pub mod timing;
