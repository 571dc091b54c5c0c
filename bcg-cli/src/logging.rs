//! Log lines on standard error, as text or JSON.
//!
//! `RUST_LOG` chooses what is logged. Without it: `info`, but of the runtime only warnings, because a line for each captured
//! size would tear the progress bar.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::args::LogFormat;

/// Starts logging for the process; a second call does nothing.
pub fn init(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| {
        EnvFilter::new("info,bcg_runtime=warn,bcg_runtime::world=info,bcg_runtime::device::cuda::nccl=info")
    });
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let started = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    // Only a test that starts logging twice gets here with an error.
    drop(started);
}
