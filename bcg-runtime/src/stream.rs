//! The queue that ops enqueue on: the same for eager runs, captures and breaks.
//!
//! It has no way to synchronise, to read back, to copy from pageable memory or to allocate outside the arena, so
//! captured code cannot do what a graph cannot hold (law L7). It owns the bookkeeping of side streams: work on a side
//! stream must be joined before the segment, the break or the forward ends, and a missing join names the stream.

use std::sync::Arc;

use crate::arena::{Arena, FrozenTensor};
use crate::device::traits::{EventHandle, StreamHandle};
use crate::device::{Allocation, PinnedBuffer};
use crate::generation::Stamp;
use crate::launch::Launch;
use crate::op::{Op, RowCopy};
use crate::replay::record;
use crate::replay::verify::Probe;
use crate::shape::Shape;
use crate::tensor::{PersistentBuffer, Storage, Tensor};
use crate::timeline::StepLog;
use crate::{
    DType, Device, DevicePtr, Dims, Error, Event, Kernel, KernelArgs, ReplayMode, Result, RunnerOptions, Stream,
};

/// The queue of device work that ops take, whether it runs now or is captured.
///
/// # Example
/// ```
/// use bcg_runtime::{OpStream, Device, Result, Runner, RunnerOptions, Tensor};
///
/// fn copied(cx: &mut OpStream, x: &Tensor) -> Result<Tensor> {
///     let out = cx.empty(x.shape(), x.dtype())?;
///     cx.copy(&out, x)?;
///     Ok(out)
/// }
///
/// let device = Device::host();
/// let x = device.tensor(&[2], &[1i32, 2])?;
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let out = runner.eager(&(), |cx| copied(cx, &x))?;
/// assert_eq!(runner.read::<i32>(&out)?, [1, 2]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Debug)]
pub struct OpStream {
    device: Device,
    main: Arc<Stream>,
    current: Arc<Stream>,
    arena: Arena,
    forks: Vec<Fork>,
    side_streams: Vec<PooledStream>,
    scope_depth: usize,
    valid_rows: Allocation,
    valid_rows_now: Option<u32>,
    options: RunnerOptions,
    /// A capture records and nothing runs: work outside segments is dropped.
    pub(crate) is_dry: bool,
    pub(crate) segment: Option<SegmentLog>,
    pub(crate) probe: Option<Probe>,
    pub(crate) step_log: Option<StepLog>,
    pub(crate) counts: WorkCounts,
    /// Empty; kept so that scrubbing an output allocates nothing.
    pub(crate) frozen_scratch: Vec<FrozenTensor>,
}

/// How much was enqueued so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct WorkCounts {
    pub(crate) launches: usize,
    pub(crate) copies: usize,
    pub(crate) bridge_copied_bytes: usize,
}

/// What the open segment of a capture uses.
#[derive(Debug, Default)]
pub(crate) struct SegmentLog {
    pub(crate) kernels: Vec<&'static str>,
    /// Keeps alive what the captured work points at.
    pub(crate) retained: Vec<Arc<PersistentBuffer>>,
    pub(crate) pinned: Vec<Arc<PinnedBuffer>>,
    pub(crate) stamps: Vec<Stamp>,
    /// The first piece of work is a kernel that may start before the one ahead of it has ended.
    pub(crate) is_programmatic: Option<bool>,
    /// An enqueuing call failed, so the segment misses work whatever the caller makes of the error.
    pub(crate) is_broken: bool,
}

/// A side stream with work that the main stream does not wait for yet.
#[derive(Debug)]
struct Fork {
    stream: StreamHandle,
    name: Arc<str>,
    /// The event that covers all its work, if its latest work was to record one.
    covered_by: Option<EventHandle>,
}

#[derive(Debug)]
struct PooledStream {
    stream: Arc<Stream>,
    forked: Event,
    done: Event,
    /// The scope that uses it now.
    scope: Option<usize>,
}

/// A side stream of the scope that opened it.
///
/// # Example
/// ```
/// use bcg_runtime::{DType, Device, Runner, RunnerOptions};
/// let mut runner = Runner::new(&Device::host(), RunnerOptions::default())?;
/// let (a, b) = runner.eager(&(), |cx| {
///     let (a, b) = (cx.empty(&[2], DType::U8)?, cx.empty(&[2], DType::U8)?);
///     cx.scope(|cx| {
///         let side = cx.side_stream("side")?;
///         cx.on(&side, |cx| cx.fill_bytes(&a, 1))?; // beside …
///         cx.fill_bytes(&b, 2) // … this; both are done when the scope ends
///     })?;
///     Ok((a, b))
/// })?;
/// assert_eq!((runner.read::<u8>(&a)?, runner.read::<u8>(&b)?), (vec![1, 1], vec![2, 2]));
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SideStream {
    index: usize,
    scope: usize,
}

impl OpStream {
    pub(crate) fn new(device: &Device, options: RunnerOptions) -> Result<Self> {
        let main = Arc::new(Stream::new(device, &options.name)?);
        let bytes_max = match options.arena_bytes_max {
            Some(bytes) => bytes,
            None => device.memory_info()?.total_bytes,
        };
        let arena = Arena::new(device, options.arena_bytes, bytes_max)?;
        Ok(Self {
            device: device.clone(),
            current: Arc::clone(&main),
            main,
            arena,
            forks: Vec::new(),
            side_streams: Vec::new(),
            scope_depth: 0,
            valid_rows: Allocation::new(device, size_of::<u32>())?,
            valid_rows_now: None,
            options,
            is_dry: false,
            segment: None,
            probe: None,
            step_log: None,
            counts: WorkCounts::default(),
            frozen_scratch: Vec::new(),
        })
    }

    /// Returns the device that the work goes to.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Tells whether a segment is being captured: true in captured code, false in breaks, eager runs and replays.
    pub fn is_capturing(&self) -> bool {
        self.segment.is_some()
    }

    /// Takes an uninitialised tensor from the arena. Its memory is free again when the last handle drops.
    ///
    /// # Errors
    /// [`Error::ArenaFull`] if the arena would have to grow inside a segment or beyond its bound; [`Error::Shape`] for
    /// a rank above 4.
    pub fn empty(&mut self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let tensor = self.arena.alloc(Shape::new("OpStream::empty", shape)?, dtype)?;
        if self.options.poison {
            self.fill_bytes(&tensor, 0xFF)?;
        }
        Ok(tensor)
    }

    /// Returns a tensor's address for a kernel's arguments, after checking that the tensor may be used now.
    ///
    /// # Capture
    /// The address is frozen. The graph keeps a persistent tensor alive and remembers its generation.
    ///
    /// # Errors
    /// [`Error::Stale`], [`Error::Foreign`] or [`Error::Generation`].
    pub fn addr(&mut self, tensor: &Tensor) -> Result<DevicePtr> {
        match &tensor.storage {
            Storage::Arena(block) => self.arena.check(block)?,
            Storage::Persistent(buffer) => {
                if !buffer.device().is(&self.device) {
                    return Err(Error::foreign(buffer.device().name(), self.device.name()));
                }
                if let Some(stamp) = buffer.stamp() {
                    stamp.check()?;
                }
                if let Some(segment) = &mut self.segment {
                    segment.retain(buffer);
                }
            }
        }
        Ok(tensor.ptr)
    }

    /// Enqueues a kernel. A geometry without threads enqueues nothing.
    ///
    /// # Errors
    /// [`Error::Kernel`] if the kernel does not compile or load; the driver's.
    pub fn launch<A: KernelArgs>(&mut self, kernel: &'static Kernel<A>, dims: Dims, args: A) -> Result<()> {
        if dims.is_empty() {
            return Ok(());
        }
        self.count_launch(kernel.name());
        if self.is_in_break() && record::keep_launch(&self.main, kernel, dims, bytemuck::bytes_of(&args)) {
            return Ok(());
        }
        self.enqueue_op(&Op::Launch(Launch::new(kernel, dims, &args)))
    }

    /// Enqueues a copy of `src` into `dst`, of the same shape and dtype; either may be row-sliced.
    ///
    /// # Errors
    /// [`Error::Shape`]; those of [`OpStream::addr`]; the driver's.
    pub fn copy(&mut self, dst: &Tensor, src: &Tensor) -> Result<()> {
        if dst.shape != src.shape || dst.dtype != src.dtype {
            let expected = format!("{} {:?}", dst.dtype, dst.shape);
            return Err(Error::shape("OpStream::copy", expected, format!("{} {:?}", src.dtype, src.shape)));
        }
        let (dst_ptr, src_ptr) = (self.addr(dst)?, self.addr(src)?);
        let size = dst.dtype.size_bytes();
        let mut copy = RowCopy {
            dst: dst_ptr,
            dst_pitch: dst.row_stride * size,
            src: src_ptr,
            src_pitch: src.row_stride * size,
            row_bytes: dst.row_bytes(),
            rows: dst.dim(0),
        };
        if dst.is_contiguous() && src.is_contiguous() {
            copy = RowCopy { row_bytes: dst.size_bytes(), rows: 1, ..copy };
        }
        if copy.row_bytes == 0 || copy.rows == 0 {
            return Ok(());
        }
        self.counts.copies += 1;
        self.submit(&Op::Copy(copy))
    }

    /// Enqueues a copy from page-locked memory, which is read when the work runs, so again at each replay.
    ///
    /// # Errors
    /// [`Error::Shape`] if `dst` is row-sliced or larger than `src`; those of [`OpStream::addr`]; the driver's.
    pub fn copy_from_pinned(&mut self, dst: &Tensor, src: &Arc<PinnedBuffer>) -> Result<()> {
        self.copy_from_pinned_at(dst, src, 0)
    }

    /// As [`copy_from_pinned`](Self::copy_from_pinned), from an offset in bytes on.
    pub(crate) fn copy_from_pinned_at(&mut self, dst: &Tensor, src: &Arc<PinnedBuffer>, offset: usize) -> Result<()> {
        if !dst.is_contiguous() || offset + dst.size_bytes() > src.len_bytes() {
            let expected = format!("a contiguous tensor of at most {} bytes", src.len_bytes() - offset);
            return Err(Error::shape("OpStream::copy_from_pinned", expected, format!("{dst:?}")));
        }
        let (ptr, bytes) = (self.addr(dst)?, dst.size_bytes());
        if let Some(segment) = &mut self.segment {
            segment.pinned.push(Arc::clone(src));
        }
        if bytes == 0 {
            return Ok(());
        }
        self.counts.copies += 1;
        self.submit(&Op::CopyFromPinned { dst: ptr, src: src.ptr().offset_bytes(offset), bytes })
    }

    /// Enqueues a copy of a contiguous tensor into page-locked memory, from an offset in bytes on.
    pub(crate) fn copy_to_pinned(&mut self, src: &Tensor, dst: &PinnedBuffer, offset: usize) -> Result<()> {
        let (ptr, bytes) = (self.addr(src)?, src.size_bytes());
        if bytes == 0 {
            return Ok(());
        }
        self.counts.copies += 1;
        self.enqueue("a copy to the host", |device, stream| {
            device.backend().copy_to_pinned(stream, dst.ptr().offset_bytes(offset), ptr, bytes)
        })
    }

    /// Enqueues a fill of all bytes of a tensor.
    ///
    /// # Errors
    /// Those of [`OpStream::addr`]; the driver's.
    pub fn fill_bytes(&mut self, dst: &Tensor, byte: u8) -> Result<()> {
        let ptr = self.addr(dst)?;
        if dst.is_contiguous() {
            return self.fill_range(ptr, byte, dst.size_bytes());
        }
        let pitch = dst.row_stride * dst.dtype.size_bytes();
        (0..dst.dim(0)).try_for_each(|row| self.fill_range(ptr.offset_bytes(row * pitch), byte, dst.row_bytes()))
    }

    /// Enqueues a fill with zeros.
    ///
    /// # Errors
    /// As [`OpStream::fill_bytes`].
    pub fn fill_zero(&mut self, dst: &Tensor) -> Result<()> {
        self.fill_bytes(dst, 0)
    }

    /// Returns the address of an `i32` on the device: the valid rows of the forward that runs now (law L11). Without
    /// rows in the live batch it holds `i32::MAX`.
    pub fn valid_rows_ptr(&self) -> DevicePtr {
        self.valid_rows.ptr()
    }

    /// Runs `f` and joins the side streams that it opened, whether it succeeds or fails.
    ///
    /// # Errors
    /// The first error of `f`; the driver's.
    pub fn scope<R>(&mut self, f: impl FnOnce(&mut Self) -> Result<R>) -> Result<R> {
        self.scope_depth += 1;
        let scope = self.scope_depth;
        let result = f(self);
        let joined = self.join_scope(scope);
        self.scope_depth -= 1;
        self.update_keep_back();
        let value = result?;
        joined?;
        Ok(value)
    }

    /// Opens a side stream that begins after the work enqueued so far and is joined when the scope ends.
    ///
    /// # Errors
    /// [`Error::Option`] outside a scope; the driver's.
    pub fn side_stream(&mut self, name: &str) -> Result<SideStream> {
        if self.scope_depth == 0 {
            let message = format!("side stream `{name}` needs a scope, which joins it: use OpStream::scope");
            return Err(Error::Option { option: "OpStream::side_stream", message });
        }
        let is_free = |side: &PooledStream| side.scope.is_none() && side.stream.name() == name;
        let index = match self.side_streams.iter().position(is_free) {
            Some(index) => index,
            None => {
                let stream = Arc::new(Stream::new(&self.device, name)?);
                let (forked, done) = (Event::new(&self.device)?, Event::new(&self.device)?);
                self.side_streams.push(PooledStream { stream, forked, done, scope: None });
                self.side_streams.len() - 1
            }
        };
        let scope = self.scope_depth;
        self.side_streams[index].scope = Some(scope);
        let (from, side) = (self.current.handle(), self.side_streams[index].stream.handle());
        let forked = self.side_streams[index].forked.handle();
        self.enqueue("a side stream", |device, _| device.backend().record_event(forked, from))?;
        self.enqueue("a side stream", |device, _| device.backend().wait_event(side, forked))?;
        self.touch_side(index);
        Ok(SideStream { index, scope })
    }

    /// Runs `f` with its work going to a side stream of an open scope.
    ///
    /// # Errors
    /// [`Error::Option`] if the side stream's scope has ended; those of `f`.
    pub fn on<R>(&mut self, side: &SideStream, f: impl FnOnce(&mut Self) -> Result<R>) -> Result<R> {
        let Some(stream) = self.side_streams.get(side.index).filter(|pooled| pooled.scope == Some(side.scope)) else {
            let message = "the side stream's scope has ended; open another one in this scope".to_owned();
            return Err(Error::Option { option: "OpStream::on", message });
        };
        let stream = Arc::clone(&stream.stream);
        self.on_stream(&stream, f)
    }

    /// Runs `f` with its work going to a stream of the caller's own, which forks and joins through events:
    /// [`OpStream::wait`] first, [`OpStream::record`] last.
    ///
    /// # Errors
    /// [`Error::Foreign`] if the stream is another device's; those of `f`.
    pub fn on_stream<R>(&mut self, stream: &Arc<Stream>, f: impl FnOnce(&mut Self) -> Result<R>) -> Result<R> {
        if !stream.device().is(&self.device) {
            return Err(Error::foreign(stream.device().name(), self.device.name()));
        }
        let before = std::mem::replace(&mut self.current, Arc::clone(stream));
        let result = f(self);
        self.current = before;
        result
    }

    /// Records an event after the work enqueued so far on the current stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn record(&mut self, event: &Event) -> Result<()> {
        self.enqueue("an event", |device, stream| device.backend().record_event(event.handle(), stream))?;
        let current = self.current.handle();
        for fork in &mut self.forks {
            if fork.stream == current {
                fork.covered_by = Some(event.handle());
            } else if fork.covered_by == Some(event.handle()) {
                fork.covered_by = None;
            }
        }
        Ok(())
    }

    /// Makes later work of the current stream wait for an event.
    ///
    /// # Errors
    /// The driver's; during a capture, an event that was recorded outside of it.
    pub fn wait(&mut self, event: &Event) -> Result<()> {
        self.enqueue("an event", |device, stream| device.backend().wait_event(stream, event.handle()))?;
        let current = self.current.handle();
        self.forks.retain(|fork| fork.stream == current || fork.covered_by != Some(event.handle()));
        self.update_keep_back();
        Ok(())
    }
}

/// For the runtime itself.
impl OpStream {
    pub(crate) fn main(&self) -> &Arc<Stream> {
        &self.main
    }

    pub(crate) fn arena(&self) -> &Arena {
        &self.arena
    }

    pub(crate) fn replay_mode(&self) -> ReplayMode {
        self.options.replay
    }

    pub(crate) fn set_replay_mode(&mut self, mode: ReplayMode) {
        self.options.replay = mode;
    }

    pub(crate) fn is_poisoned(&self) -> bool {
        self.options.poison
    }

    /// Fails if a side stream was not joined before `place`.
    pub(crate) fn check_joined(&self, place: &str) -> Result<()> {
        match self.forks.first() {
            None => Ok(()),
            Some(fork) => Err(Error::UnjoinedStream { stream: fork.name.to_string(), place: place.to_owned() }),
        }
    }

    /// Tells whether side streams or scopes are open, so that freed blocks are kept back.
    pub(crate) fn is_forked(&self) -> bool {
        self.scope_depth > 0 || !self.forks.is_empty()
    }

    /// Counts a kernel that is about to be enqueued.
    pub(crate) fn count_launch(&mut self, name: &'static str) {
        self.counts.launches += 1;
        if let Some(segment) = &mut self.segment {
            segment.kernels.push(name);
        }
    }

    /// Forgets what a failed forward left open.
    pub(crate) fn reset_forks(&mut self) {
        if self.forks.is_empty() && self.scope_depth == 0 && Arc::ptr_eq(&self.current, &self.main) {
            return; // the usual case, on the replay path
        }
        self.forks.clear();
        self.scope_depth = 0;
        self.current = Arc::clone(&self.main);
        self.side_streams.iter_mut().for_each(|side| side.scope = None);
        self.arena.set_keep_back(false);
    }

    /// Tells the device how many rows of the coming forward are valid.
    pub(crate) fn set_valid_rows(&mut self, valid: Option<usize>) -> Result<()> {
        let valid = valid.map_or(i32::MAX as u32, |rows| rows as u32);
        if self.valid_rows_now == Some(valid) {
            return Ok(());
        }
        self.valid_rows_now = None;
        let ptr = self.valid_rows.ptr();
        self.device.backend().fill_u32(self.main.handle(), ptr, valid, 1)?;
        self.valid_rows_now = Some(valid);
        Ok(())
    }

    pub(crate) fn fill_range(&mut self, ptr: DevicePtr, byte: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.submit(&Op::Fill { dst: ptr, byte, bytes })
    }

    /// Enqueues work on the current stream, captures it, or keeps it back for a healed replay.
    pub(crate) fn submit(&mut self, op: &Op) -> Result<()> {
        if self.is_in_break() && record::keep(&self.main, op) {
            return Ok(());
        }
        self.enqueue_op(op)
    }

    /// Tells whether work goes to the main stream, outside of segments: a break may run.
    fn is_in_break(&self) -> bool {
        self.segment.is_none() && Arc::ptr_eq(&self.current, &self.main)
    }

    fn enqueue_op(&mut self, op: &Op) -> Result<()> {
        if !Arc::ptr_eq(&self.current, &self.main) {
            return self.enqueue("work on a side stream", |device, stream| device.backend().enqueue(stream, op));
        }
        match &mut self.segment {
            Some(segment) => {
                segment.is_programmatic.get_or_insert(op.is_programmatic());
                let result = self.device.backend().enqueue(self.main.handle(), op);
                segment.is_broken |= result.is_err();
                result
            }
            // A break's work: where nothing runs, it is enqueued at each replay.
            None if self.is_dry => Ok(()),
            None => self.device.backend().enqueue(self.main.handle(), op),
        }
    }

    /// Makes a driver call of a kind that no record holds, called `what`; it enqueues work on the current stream.
    pub(crate) fn enqueue(
        &mut self,
        what: &'static str,
        call: impl FnOnce(&Device, StreamHandle) -> Result<()>,
    ) -> Result<()> {
        let stream = self.current.handle();
        if stream != self.main.handle() {
            self.touch(stream, &self.current.shared_name());
        }
        if let Some(segment) = &mut self.segment {
            segment.is_programmatic.get_or_insert(false);
            let result = call(&self.device, stream);
            segment.is_broken |= result.is_err();
            return result;
        }
        record::leave_for_work(&self.main, what)?;
        if self.is_dry { Ok(()) } else { call(&self.device, stream) }
    }

    /// Notes that a side stream has work that nobody waits for.
    fn touch(&mut self, stream: StreamHandle, name: &Arc<str>) {
        match self.forks.iter_mut().find(|fork| fork.stream == stream) {
            Some(fork) => fork.covered_by = None,
            None => self.forks.push(Fork { stream, name: Arc::clone(name), covered_by: None }),
        }
        self.update_keep_back();
    }

    fn touch_side(&mut self, index: usize) {
        let stream = Arc::clone(&self.side_streams[index].stream);
        self.touch(stream.handle(), &stream.shared_name());
    }

    fn update_keep_back(&self) {
        self.arena.set_keep_back(self.is_forked());
    }

    fn join_scope(&mut self, scope: usize) -> Result<()> {
        let mut first_error = Ok(());
        for index in 0..self.side_streams.len() {
            if self.side_streams[index].scope != Some(scope) {
                continue;
            }
            self.side_streams[index].scope = None;
            let (stream, done) = (self.side_streams[index].stream.handle(), self.side_streams[index].done.handle());
            let joined =
                self.enqueue("a side stream", |device, _| device.backend().record_event(done, stream)).and_then(|()| {
                    self.enqueue("a side stream", |device, current| device.backend().wait_event(current, done))
                });
            if joined.is_ok() {
                self.forks.retain(|fork| fork.stream != stream);
            }
            first_error = first_error.and(joined);
        }
        first_error
    }
}

impl SegmentLog {
    fn retain(&mut self, buffer: &Arc<PersistentBuffer>) {
        if self.retained.iter().any(|held| Arc::ptr_eq(held, buffer)) {
            return;
        }
        self.retained.push(Arc::clone(buffer));
        if let Some(stamp) = buffer.stamp()
            && !self.stamps.iter().any(|known| known.is(stamp))
        {
            self.stamps.push(stamp.clone());
        }
    }
}
