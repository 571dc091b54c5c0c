//! A runner: one stream, one arena, one forward at a time.

use crate::arena::ArenaStats;
use crate::error::catch_panic;
use crate::tensor::{read_rows, write_rows};
use crate::{Context, Device, Eager, Element, Error, LiveBatch, OpStream, ReplayMode, Result, Rows, Tensor};

/// How a runner is set up.
///
/// # Example
/// ```
/// use bcg_runtime::{Device, Runner, RunnerOptions};
/// let options = RunnerOptions { arena_bytes: 1 << 20, poison: true, ..RunnerOptions::default() };
/// let runner = Runner::new(&Device::host(), options)?;
/// assert_eq!(runner.arena_stats().mapped_bytes, 1 << 20);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct RunnerOptions {
    /// The name of its stream, for messages.
    pub name: String,
    /// Arena memory mapped from the start, in bytes.
    pub arena_bytes: usize,
    /// The most memory that the arena may map, in bytes; the device's memory if `None`.
    pub arena_bytes_max: Option<usize>,
    /// Fill dead arena memory with NaN before each replay, and fresh blocks when they are taken.
    pub poison: bool,
    /// How graphs are replayed.
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

/// How much a runner did.
///
/// # Example
/// ```
/// use bcg_runtime::{DType, Device, Runner, RunnerOptions};
/// let device = Device::host();
/// let (a, b) = (device.zeros(&[2], DType::U8)?, device.zeros(&[2], DType::U8)?);
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// runner.eager(&(), |cx| cx.copy(&a, &b))?;
/// assert_eq!(runner.stats().num_copies, 1);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunnerStats {
    /// Kernels enqueued one by one, captured ones included.
    pub num_launches: usize,
    /// Copies enqueued one by one, captured ones included.
    pub num_copies: usize,
    /// Bytes that had to be copied into a bridge because a break returned other memory than at capture.
    pub bridge_copied_bytes: usize,
}

/// Runs the forwards of one model: owns the stream they are enqueued on and the arena they share.
///
/// # Example
/// ```
/// use bcg_runtime::{DType, Device, Error, Runner, RunnerOptions};
/// let mut runner = Runner::new(&Device::host(), RunnerOptions::default())?;
/// let zeros = runner.eager(&(), |cx| {
///     let zeros = cx.empty(&[3], DType::I32)?;
///     cx.fill_zero(&zeros)?;
///     Ok(zeros)
/// })?;
/// assert_eq!(runner.read::<i32>(&zeros)?, [0; 3]);
/// runner.eager(&(), |_| Ok(()))?; // the next forward: `zeros` is stale now
/// assert!(matches!(runner.read::<i32>(&zeros), Err(Error::Stale { .. })));
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Debug)]
pub struct Runner {
    stream: OpStream,
}

impl Runner {
    /// Makes a runner on a device.
    ///
    /// # Errors
    /// The driver's; [`Error::OutOfMemory`] if `arena_bytes` are not free.
    pub fn new(device: &Device, options: RunnerOptions) -> Result<Self> {
        Ok(Self { stream: OpStream::new(device, options)? })
    }

    /// Returns the device.
    pub fn device(&self) -> &Device {
        self.stream.device()
    }

    /// Runs a forward eagerly. Arena tensors of earlier forwards become stale.
    ///
    /// # Errors
    /// Those of `forward`; [`Error::Panic`] if it panics; [`Error::UnjoinedStream`].
    pub fn eager<L: LiveBatch, O>(
        &mut self,
        live: &L,
        forward: impl FnOnce(&mut Context<'_, L>) -> Result<O>,
    ) -> Result<O> {
        self.stream.begin_forward(live.rows(), 0)?;
        let stream = &mut self.stream;
        let result = catch_panic(|| {
            let output = forward(&mut Context { stream, live, recorder: None })?;
            stream.check_joined("the end of the forward")?;
            Ok(output)
        });
        result.inspect_err(|_| self.stream.reset_forks())
    }

    /// Runs more eager work in the forward that ran last, whose output is still valid: logits, sampling, read-back.
    ///
    /// # Errors
    /// As [`Runner::eager`].
    pub fn tail<L: LiveBatch, O>(&mut self, live: &L, f: impl FnOnce(&mut Eager<'_, L>) -> Result<O>) -> Result<O> {
        let stream = &mut self.stream;
        let result = catch_panic(|| {
            let output = f(&mut Eager::from_parts(stream, live))?;
            stream.check_joined("the end of the tail")?;
            Ok(output)
        });
        result.inspect_err(|_| self.stream.reset_forks())
    }

    /// Enqueues a copy of `data`, in row-major order, into a persistent tensor: an input of the coming forward.
    ///
    /// # Errors
    /// [`Error::Shape`] if dtype or length differ; those of [`OpStream::addr`]; the driver's.
    pub fn upload<T: Element>(&mut self, tensor: &Tensor, data: &[T]) -> Result<()> {
        tensor.check_dtype("Runner::upload", T::DTYPE)?;
        let ptr = self.stream.addr(tensor)?;
        write_rows("Runner::upload", self.stream.main().stream_ref(), tensor, ptr, bytemuck::cast_slice(data))
    }

    /// Reads a tensor, in row-major order, after the work enqueued so far. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Shape`] if `T` is not its dtype; [`Error::Stale`] for a tensor of an earlier forward; the first error
    /// of the work waited for.
    pub fn read<T: Element>(&mut self, tensor: &Tensor) -> Result<Vec<T>> {
        tensor.check_dtype("Runner::read", T::DTYPE)?;
        let ptr = self.stream.addr(tensor)?;
        read_rows(self.stream.main().stream_ref(), tensor, ptr)
    }

    /// Waits until the work enqueued so far has run.
    ///
    /// # Errors
    /// The first error of that work.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.main().synchronize()
    }

    /// Gives the arena's physical memory back (sleep). Addresses and graphs stay; tensors of the forward that ran last
    /// become stale, and until [`restore_memory`](Self::restore_memory) no forward begins.
    ///
    /// # Errors
    /// The first error of the work waited for.
    pub fn release_memory(&mut self) -> Result<()> {
        self.stream.device().synchronize()?;
        self.stream.arena().release();
        Ok(())
    }

    /// Puts memory behind the arena's addresses again (wake).
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn restore_memory(&mut self) -> Result<()> {
        self.stream.arena().restore()
    }

    /// Changes how graphs are replayed from now on, those that are captured already included.
    pub fn set_replay_mode(&mut self, mode: ReplayMode) {
        self.stream.set_replay_mode(mode);
    }

    /// Returns what the arena holds.
    pub fn arena_stats(&self) -> ArenaStats {
        self.stream.arena().stats()
    }

    /// Returns how much was done so far.
    pub fn stats(&self) -> RunnerStats {
        let counts = self.stream.counts;
        RunnerStats {
            num_launches: counts.launches,
            num_copies: counts.copies,
            bridge_copied_bytes: counts.bridge_copied_bytes,
        }
    }

    pub(crate) fn stream_mut(&mut self) -> &mut OpStream {
        &mut self.stream
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        // The arena's memory may go only after the work that uses it.
        if let Err(error) = self.stream.device().synchronize() {
            tracing::warn!(%error, "synchronising before a runner is dropped");
        }
    }
}

impl OpStream {
    /// Begins a forward in which the first `extent` bytes of the arena are taken.
    pub(crate) fn begin_forward(&mut self, rows: Option<Rows>, extent: usize) -> Result<()> {
        if let Some(Rows { valid, padded }) = rows
            && valid > padded
        {
            let message = format!("{valid} valid rows do not fit into {padded} padded rows");
            return Err(Error::Option { option: "LiveBatch::rows", message });
        }
        self.reset_forks();
        self.arena().begin_forward(extent)?;
        self.set_valid_rows(rows.map(|rows| rows.valid))
    }

    /// In poison mode, fills the arena memory of a replay with NaN: all of it is dead when the replay begins.
    pub(crate) fn poison_extent(&mut self, extent: usize) -> Result<()> {
        if !self.is_poisoned() {
            return Ok(());
        }
        let base = self.arena().base();
        self.fill_range(base, 0xFF, extent)
    }
}
