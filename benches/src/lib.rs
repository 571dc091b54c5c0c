//! The replay bench, which compares the runtime with bare driver calls: what is timed, and how contestants take turns.
//!
//! Times are summed up and reported as `bcg bench` does it, by [`bcg_server::cli::bench`]. The executables in `bin/` build
//! without CUDA and run on the host device too, where a figure says something about the runtime's own bookkeeping and
//! nothing about a GPU.

pub mod program;
pub mod raw;
pub mod turns;
