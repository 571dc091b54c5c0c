//! The queue that ops enqueue on: the same for eager runs, captures and breaks.
//!
//! It has no way to synchronise, to read back, to copy from pageable memory or to allocate outside the arena, so
//! captured code cannot do what a graph cannot hold (law L7).
//!
//! [`side`] joins side streams, [`rows`] begins forwards, [`work_list`] holds what breaks enqueue, [`steps`] and
//! [`probe`] watch a run, [`options`] says how a stream is set up.

mod first_use;
mod gather;
mod options;
pub(crate) mod probe;
mod rows;
mod side;
pub(crate) mod steps;
pub(crate) mod work_list;

use std::hash::{DefaultHasher, Hash};
use std::sync::Arc;

use crate::arena::Arena;
use crate::device::traits::{MatmulPlan, StreamHandle};
use crate::device::watch::Needs;
use crate::device::{Allocation, PinnedBuffer};
use crate::frozen::FrozenTensor;
use crate::generation::Stamp;
use crate::launch::{self, Launch};
use crate::op::{Op, RowCopy};
use crate::shape::Shape;
use crate::tensor::{PersistentBuffer, Storage, Tensor};
use crate::{
    AnyKernel as _, Communicator, CommunicatorArgs, DType, Device, DevicePtr, Dims, Error, Kernel, KernelArgs, Result,
    Stream,
};
use first_use::FirstUses;
use probe::Probe;
use side::{Fork, PooledStream};
use steps::StepLog;
use work_list::{Destination, Origin};

use crate::world::Ranks;
use crate::world::communicator::{COLLECTIVE_BLOCKS_MAX, Told};

pub use options::{ReplayMode, RunnerOptions};
pub use rows::Rows;
pub use side::SideStream;
pub use steps::{StepKind, StepTime};

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
    /// What its collectives go through, if it is a rank of a world.
    communicator: Option<Communicator>,
    ranks: Option<Ranks>,
    /// What is loaded, where ranks share the GPU.
    first_uses: Option<FirstUses>,
    /// A capture is open in which nothing runs: work outside segments is dropped.
    pub(crate) is_dry: bool,
    pub(crate) segment: Option<SegmentLog>,
    /// Where the main stream's work goes: to the device, or to the list of a break's work.
    destination: Destination,
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
    /// Its index among the segments of the capture.
    pub(crate) index: usize,
    /// The geometries of the kernels and the algorithms of the products, in order.
    pub(crate) number: DefaultHasher,
}

impl OpStream {
    pub(crate) fn new(device: &Device, options: RunnerOptions, communicator: Option<Communicator>) -> Result<Self> {
        let main = Arc::new(Stream::new(device, &options.name)?);
        let ranks = communicator.as_ref().and_then(Communicator::ranks);
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
            first_uses: ranks.as_ref().filter(|ranks| ranks.world.shares_gpus()).map(FirstUses::new),
            ranks,
            communicator,
            is_dry: false,
            segment: None,
            destination: Destination::Device,
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
        let tensor = Tensor::in_arena(&self.arena, Shape::new("OpStream::empty", shape)?, dtype)?;
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
                if !buffer.is_reachable_from(&self.device) {
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
        if kernel.is_collective() {
            let message = format!("`{}` is a collective: use OpStream::launch_collective", kernel.name());
            return Err(Error::Option { option: "OpStream::launch", message });
        }
        if dims.is_empty() {
            return Ok(());
        }
        self.load_with_others(kernel)?;
        self.count_launch(kernel.name());
        self.note_geometry(&dims);
        if self.lists_work() && work_list::keep_launch(&self.main, kernel, dims, launch::bytes_of(&args)) {
            return Ok(());
        }
        self.enqueue_op(&Op::Launch(Launch::new(kernel, dims, &args)))
    }

    /// Returns this rank, which is 0 outside of a world.
    pub fn rank(&self) -> usize {
        self.communicator.as_ref().map_or(0, Communicator::rank)
    }

    /// Returns the number of ranks, which is 1 outside of a world.
    pub fn world_size(&self) -> usize {
        self.communicator.as_ref().map_or(1, |communicator| communicator.world().size())
    }

    /// Returns the bytes that a collective can send to each other rank in one launch: an op sends larger messages in several
    /// parts. There is no bound on the host device, and outside of a world.
    pub fn slot_bytes(&self) -> usize {
        self.communicator.as_ref().map_or(usize::MAX, Communicator::slot_bytes)
    }

    /// Returns the blocks that a collective's grid may have, each of up to 512 threads of which a multiprocessor holds two;
    /// the same on all ranks.
    pub fn collective_blocks_max(&self) -> usize {
        self.communicator.as_ref().map_or(COLLECTIVE_BLOCKS_MAX, Communicator::blocks_max)
    }

    /// Enqueues a collective, which runs when every rank has come to its own; `args` gets what it begins with. All ranks
    /// enqueue the same collectives, with the same geometry, in the same order. A geometry without threads enqueues nothing.
    ///
    /// # Errors
    /// [`Error::Option`] outside of a world, on a side stream, or for another kernel; as [`OpStream::launch`].
    pub fn launch_collective<A: KernelArgs>(
        &mut self,
        kernel: &'static Kernel<A>,
        dims: Dims,
        args: impl FnOnce(CommunicatorArgs) -> A,
    ) -> Result<()> {
        let refuse = |what: &str| {
            let message = format!("`{}` {what}", kernel.name());
            Err(Error::Option { option: "OpStream::launch_collective", message })
        };
        if self.communicator.is_none() {
            return refuse("needs a world of several ranks: make the runner with Runner::in_world");
        }
        if !kernel.is_collective() {
            return refuse("is no collective: use OpStream::launch");
        }
        if self.has_transport() {
            return refuse("cannot reach the GPUs of other nodes: use OpStream::gather_from_all");
        }
        if !Arc::ptr_eq(&self.current, &self.main) {
            return refuse("is on a side stream, but a communicator has one order: enqueue it on the main stream");
        }
        if dims.is_empty() {
            return Ok(());
        }
        self.load_with_others(kernel)?;
        let Some(communicator) = &self.communicator else { return Ok(()) };
        let segment = self.segment.as_ref().map(|segment| segment.index);
        let args = args(communicator.args(kernel.name(), segment));
        let launch = Launch { plane: Some(communicator.plane()), ..Launch::new(kernel, dims, &args) };
        self.count_launch(kernel.name());
        self.note_geometry(&dims);
        self.submit(&Op::Launch(launch))
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

    /// Enqueues a copy from page-locked memory, which is read when the work runs, so again at each replay. A graph keeps
    /// the memory alive.
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
        let op = Op::CopyFromPinned { dst: ptr, src: src.ptr().offset_bytes(offset), bytes };
        if self.lists_work() && work_list::keep_copy(&self.main, &op, src) {
            return Ok(());
        }
        self.enqueue_op(&op)
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
}

/// For the runtime itself.
impl OpStream {
    pub(crate) fn main(&self) -> &Arc<Stream> {
        &self.main
    }

    pub(crate) fn arena(&self) -> &Arena {
        &self.arena
    }

    /// This rank, if it is one of several.
    pub(crate) fn ranks(&self) -> Option<&Ranks> {
        self.ranks.as_ref()
    }

    /// What this rank's kernels say of the other ranks.
    pub(crate) fn told(&self) -> Option<&Arc<Told>> {
        self.communicator.as_ref().map(Communicator::told)
    }

    /// Checks that no rank is lost: what was waited for is not the result of all ranks then.
    ///
    /// # Errors
    /// [`Error::RankLost`].
    pub(crate) fn check_ranks(&self) -> Result<()> {
        self.told().map_or(Ok(()), |told| told.check())
    }

    /// Ends the world if the work of this rank failed: the others may wait for what it did not do.
    pub(crate) fn ended<R>(&self, result: Result<R>) -> Result<R> {
        match self.ranks() {
            Some(ranks) => ranks.ended(result),
            None => result,
        }
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

    /// Counts a kernel that is about to be enqueued.
    pub(crate) fn count_launch(&mut self, name: &'static str) {
        self.counts.launches += 1;
        if let Some(segment) = &mut self.segment {
            segment.kernels.push(name);
        }
    }

    /// Notes the geometry of a kernel that is captured.
    fn note_geometry(&mut self, dims: &Dims) {
        if let Some(segment) = &mut self.segment {
            dims.hash(&mut segment.number);
        }
    }

    /// Notes how a product that is captured is computed.
    pub(crate) fn note_algorithm(&mut self, plan: &MatmulPlan) {
        if let Some(segment) = &mut self.segment {
            plan.algorithm.hash(&mut segment.number);
        }
    }

    pub(crate) fn fill_range(&mut self, ptr: DevicePtr, byte: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.submit(&Op::Fill { dst: ptr, byte, bytes })
    }

    /// Enqueues work on the current stream, captures it, or keeps it back for a healed replay.
    pub(crate) fn submit(&mut self, op: &Op) -> Result<()> {
        if self.lists_work() && work_list::keep(&self.main, op) {
            return Ok(());
        }
        self.enqueue_op(op)
    }

    /// Tells whether work that is enqueued now goes to the work list of this thread.
    fn lists_work(&self) -> bool {
        self.destination == Destination::WorkList && self.segment.is_none() && Arc::ptr_eq(&self.current, &self.main)
    }

    /// Begins a break whose work goes to this thread's list. A break that is not healable keeps nothing back at a
    /// replay.
    pub(crate) fn begin_listing(&mut self, origin: Origin, not_healable: Option<&'static str>) {
        self.destination = Destination::WorkList;
        work_list::begin_break(origin, not_healable);
    }

    /// Ends a break and returns why it cannot be healed, if so.
    ///
    /// # Errors
    /// Those of [`work_list::end_break`].
    pub(crate) fn end_listing(&mut self) -> Result<Option<&'static str>> {
        self.destination = Destination::Device;
        work_list::end_break()
    }

    /// Leaves the work list before a call that it cannot hold.
    ///
    /// # Errors
    /// Those of [`work_list::leave`].
    pub(crate) fn leave_list(&self, what: &'static str, needs: Needs) -> Result<()> {
        work_list::leave(&self.device, what, needs)
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

    /// Makes a driver call of a kind that no work list holds, called `what`; it enqueues work on the current stream.
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
        work_list::leave_for_work(&self.main, what)?;
        if self.is_dry { Ok(()) } else { call(&self.device, stream) }
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
