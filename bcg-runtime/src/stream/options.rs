//! How a runner is set up: what its stream, its arena and its replays need to know.

/// How a runner is set up.
///
/// # Example
/// ```
/// use bcg_runtime::{Device, Runner, RunnerOptions};
/// let mut options = RunnerOptions::default();
/// options.arena_bytes = 1 << 20;
/// options.poison = true;
/// let runner = Runner::new(&Device::host(), options)?;
/// assert_eq!(runner.arena_stats().mapped_bytes, 1 << 20);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RunnerOptions {
    /// The name of its stream, for messages.
    pub name: String,
    /// Arena memory mapped from the start, in bytes.
    pub arena_bytes: usize,
    /// The most memory that the arena may map, in bytes; the device's memory if `None`.
    pub arena_bytes_max: Option<usize>,
    /// Whether to fill dead arena memory with NaN before each replay, and fresh blocks when they are taken.
    pub poison: bool,
    /// How the runner replays graphs.
    pub replay: ReplayMode,
}

impl Default for RunnerOptions {
    fn default() -> Self {
        Self {
            name: "runner".to_owned(),
            arena_bytes: 32 << 20,
            arena_bytes_max: None,
            poison: false,
            replay: ReplayMode::Healed,
        }
    }
}

/// How a runner replays.
///
/// # Example
/// ```
/// use bcg_runtime::{Device, ReplayMode, Runner, RunnerOptions};
/// let mut options = RunnerOptions::default();
/// options.replay = ReplayMode::Chain;
/// let runner = Runner::new(&Device::host(), options)?; // launches segment by segment, break by break
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReplayMode {
    /// What breaks enqueue is patched into executables that do the work of several segments in one launch, wherever
    /// that is possible.
    #[default]
    Healed,
    /// Each segment is launched, and each break run, in order.
    Chain,
}
