//! A runner: one stream, one arena, one forward at a time.

use crate::arena::ArenaStats;
use crate::error::catch_panic;
use crate::tensor::{read_rows, write_rows};
use crate::{
    Communicator, Context, Device, Eager, Element, Event, Live, LiveBatch, OpStream, ReplayMode, Result, RunnerOptions,
    Tensor,
};

/// How much a runner did since it was made.
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
#[non_exhaustive]
pub struct RunnerStats {
    /// The number of kernels that were enqueued one by one, captured ones included.
    pub num_launches: usize,
    /// The number of copies that were enqueued one by one, captured ones included.
    pub num_copies: usize,
    /// The bytes that had to be copied into a bridge because a break returned other memory than at capture.
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
    /// The driver's; [`Error::OutOfMemory`](crate::Error::OutOfMemory) if `arena_bytes` are not free.
    pub fn new(device: &Device, options: RunnerOptions) -> Result<Self> {
        Ok(Self { stream: OpStream::new(device, options, None)? })
    }

    /// Makes the runner of a rank: its main stream is the one that uses the communicator.
    ///
    /// # Errors
    /// As [`Runner::new`]; [`Error::RankLost`](crate::Error::RankLost) if the world is lost already.
    pub fn in_world(communicator: Communicator, options: RunnerOptions) -> Result<Self> {
        communicator.told().check()?;
        let device = communicator.device().clone();
        Ok(Self { stream: OpStream::new(&device, options, Some(communicator))? })
    }

    /// Returns this rank, which is 0 outside of a world.
    pub fn rank(&self) -> usize {
        self.stream.rank()
    }

    /// Returns the number of ranks, which is 1 outside of a world.
    pub fn world_size(&self) -> usize {
        self.stream.world_size()
    }

    /// Returns the device.
    pub fn device(&self) -> &Device {
        self.stream.device()
    }

    /// Runs a forward eagerly. Arena tensors of earlier forwards become stale.
    ///
    /// # Errors
    /// Those of `forward`; [`Error::Panic`](crate::Error::Panic) if it panics;
    /// [`Error::UnjoinedStream`](crate::Error::UnjoinedStream).
    pub fn eager<L: LiveBatch, O>(
        &mut self,
        live: &L,
        forward: impl FnOnce(&mut Context<'_, L>) -> Result<O>,
    ) -> Result<O> {
        if let Some(ranks) = self.stream.ranks() {
            ranks.come("an eager forward")?;
        }
        self.stream.begin_forward(live.rows(), 0)?;
        let stream = &mut self.stream;
        let result = catch_panic(|| {
            let output = forward(&mut Context { stream, live, writer: None })?;
            stream.check_joined("the end of the forward")?;
            Ok(output)
        });
        self.ended(result)
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
        self.ended(result)
    }

    /// Cleans up after work that failed. The other ranks may wait for what this one did not do, so their world ends.
    fn ended<R>(&mut self, result: Result<R>) -> Result<R> {
        let result = result.inspect_err(|_| self.stream.reset_forks());
        self.stream.ended(result)
    }

    /// Enqueues a copy of `data`, in row-major order, into a persistent tensor: an input of the coming forward.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if dtype or length differ; those of [`OpStream::addr`]; the driver's.
    pub fn upload<T: Element>(&mut self, tensor: &Tensor, data: &[T]) -> Result<()> {
        tensor.check_dtype("Runner::upload", T::DTYPE)?;
        let ptr = self.stream.addr(tensor)?;
        write_rows("Runner::upload", self.stream.main().stream_ref(), tensor, ptr, bytemuck::cast_slice(data))
    }

    /// Reads a tensor, in row-major order, after the work enqueued so far. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `T` is not its dtype; [`Error::Stale`](crate::Error::Stale) for a tensor
    /// of an earlier forward; the first error of the work waited for.
    pub fn read<T: Element>(&mut self, tensor: &Tensor) -> Result<Vec<T>> {
        tensor.check_dtype("Runner::read", T::DTYPE)?;
        let ptr = self.stream.addr(tensor)?;
        let values = read_rows(self.stream.main().stream_ref(), tensor, ptr)?;
        self.stream.check_ranks()?;
        Ok(values)
    }

    /// Waits until the work enqueued so far has run.
    ///
    /// # Errors
    /// The first error of that work; [`Error::RankLost`](crate::Error::RankLost).
    pub fn synchronize(&self) -> Result<()> {
        self.stream.main().synchronize()?;
        self.stream.check_ranks()
    }

    /// Checks that no rank of this one's world is lost, as far as is known: what has run then is the work of all ranks.
    ///
    /// # Errors
    /// [`Error::RankLost`](crate::Error::RankLost).
    pub fn check_world(&self) -> Result<()> {
        self.stream.check_ranks()
    }

    /// Puts an event after the work enqueued so far.
    ///
    /// # Errors
    /// The driver's.
    pub fn record(&self, event: &Event) -> Result<()> {
        event.record(self.stream.main())
    }

    /// Makes the work that is enqueued from now on wait for an event's latest record, on this device or another one. Not
    /// within a forward. A host device cannot wait for another one: there the calling thread waits, at once.
    ///
    /// # Errors
    /// The driver's; for an event of another host device the first error of the work waited for.
    pub fn wait_for(&self, event: &Event) -> Result<()> {
        event.hold_back(self.stream.main())
    }

    /// Gives the arena's physical memory back (sleep), after the ranks have met if there are several. Addresses and graphs
    /// stay; tensors of the forward that ran last become stale, and until [`restore_memory`](Self::restore_memory) no
    /// forward begins.
    ///
    /// # Errors
    /// The first error of the work waited for.
    pub fn release_memory(&mut self) -> Result<()> {
        if let Some(ranks) = self.stream.ranks() {
            ranks.come("a release of memory")?;
        }
        self.stream.device().synchronize()?;
        self.stream.arena().release();
        Ok(())
    }

    /// Gives the arena's addresses memory again (wake): of several ranks, all or none do.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory), or [`Error::Ranks`](crate::Error::Ranks) if another rank has too
    /// little.
    pub fn restore_memory(&mut self) -> Result<()> {
        let restored = self.stream.arena().restore();
        match self.stream.ranks() {
            None => restored,
            Some(ranks) => ranks.agree("a restoring of memory", restored, |()| 0).inspect_err(|_| {
                self.stream.arena().release();
            }),
        }
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

/// Values that breaks made, for those who hold the runner.
impl<T: Clone> Live<T> {
    /// Returns the value of the run that ended last, outside of any forward.
    ///
    /// # Panics
    /// As [`Live::get`].
    pub fn get_after(&self, _runner: &Runner) -> T {
        self.value()
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
