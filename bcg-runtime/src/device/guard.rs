//! The guards that own every object of a backend, written once for all devices.
//!
//! Invariant: each handle is destroyed exactly once, by the `Drop` of the guard that created it, or for memory that work
//! may still name as soon as that is enqueued (`watch.rs`). `Drop` never panics. [`LiveObjects`] counts the guards that are alive, which is how tests see leaks.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::Device;
use super::traits::{Backend, EventHandle, ExecHandle, GraphHandle, NodeCounts, NodeHandle, Part, StreamHandle};
use super::watch::{self, Dropped};
use crate::op::Op;
use crate::{DeviceKind, DevicePtr, Element, Error, Result};

/// How many objects of a device are alive.
///
/// # Example
/// ```
/// use bcg_runtime::{DType, Device};
/// let device = Device::host();
/// let tensor = device.empty(&[4], DType::F32)?;
/// assert_eq!(device.live_objects().allocated_bytes, 16);
/// drop(tensor);
/// assert_eq!(device.live_objects(), Default::default());
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LiveObjects {
    /// The number of memory allocations and mappings.
    pub allocations: usize,
    /// The bytes of these allocations and mappings.
    pub allocated_bytes: usize,
    /// The number of streams.
    pub streams: usize,
    /// The number of events.
    pub events: usize,
    /// The number of captured graphs.
    pub graphs: usize,
    /// The number of executable graphs.
    pub execs: usize,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    allocations: AtomicUsize,
    allocated_bytes: AtomicUsize,
    streams: AtomicUsize,
    events: AtomicUsize,
    graphs: AtomicUsize,
    execs: AtomicUsize,
}

impl Counters {
    pub(crate) fn snapshot(&self) -> LiveObjects {
        let get = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
        LiveObjects {
            allocations: get(&self.allocations),
            allocated_bytes: get(&self.allocated_bytes),
            streams: get(&self.streams),
            events: get(&self.events),
            graphs: get(&self.graphs),
            execs: get(&self.execs),
        }
    }

    pub(super) fn add_memory(&self, bytes: usize) {
        self.allocations.fetch_add(1, Ordering::Relaxed);
        self.allocated_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn sub_memory(&self, bytes: usize) {
        self.allocations.fetch_sub(1, Ordering::Relaxed);
        self.allocated_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// A plain allocation of device memory.
#[derive(Debug)]
pub(crate) struct Allocation {
    device: Device,
    ptr: DevicePtr,
    bytes: usize,
}

impl Allocation {
    pub(crate) fn new(device: &Device, bytes: usize) -> Result<Self> {
        device.check_unsealed()?;
        let ptr = device.backend().alloc(bytes.max(1))?;
        device.counters().add_memory(bytes);
        Ok(Self { device: device.clone(), ptr, bytes })
    }

    pub(crate) fn ptr(&self) -> DevicePtr {
        self.ptr
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let memory = Dropped { ptr: self.ptr, bytes: self.bytes, is_pinned: false };
        watch::free(&self.device, "freeing device memory", memory);
    }
}

/// Page-locked host memory that a captured copy may read (law L7).
///
/// # Example
/// ```
/// use bcg_runtime::{Device, PinnedBuffer};
/// let device = Device::host();
/// let mut pinned = PinnedBuffer::new(&device, 8)?;
/// pinned.write(&[1.0f32, 2.0])?;
/// assert_eq!(pinned.len_bytes(), 8);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
///
/// Nobody writes to a buffer that is shared, which another thread could be writing to as well. Inputs that change go
/// through a [`Staging`](crate::Staging) into a tensor.
/// ```compile_fail,E0596
/// use bcg_runtime::{Device, PinnedBuffer};
/// let pinned = std::sync::Arc::new(PinnedBuffer::new(&Device::host(), 8)?);
/// pinned.write(&[1.0f32, 2.0])?;
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Debug)]
pub struct PinnedBuffer {
    device: Device,
    ptr: DevicePtr,
    bytes: usize,
}

impl PinnedBuffer {
    /// Allocates `bytes` of page-locked memory.
    ///
    /// # Errors
    /// The driver's, if it has no more such memory; [`Error::Sealed`].
    pub fn new(device: &Device, bytes: usize) -> Result<Self> {
        device.check_unsealed()?;
        let ptr = device.backend().alloc_pinned(bytes.max(1))?;
        device.counters().add_memory(bytes);
        Ok(Self { device: device.clone(), ptr, bytes })
    }

    /// Writes `data` to the start of the buffer, at once. Work that was enqueued and still reads the buffer may see old
    /// and new bytes: order it with a synchronisation.
    ///
    /// # Errors
    /// [`Error::Shape`] if `data` is longer than the buffer.
    pub fn write<T: Element>(&mut self, data: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        if bytes.len() > self.bytes {
            let expected = format!("at most {} bytes", self.bytes);
            return Err(Error::shape("PinnedBuffer::write", expected, format!("{} bytes", bytes.len())));
        }
        self.write_bytes_at(0, bytes)
    }

    /// Writes `bytes`, which fit, from an offset in bytes on. Only for the one owner that writes to this buffer, although
    /// work that reads it shares it: no other thread may write it or read it meanwhile.
    pub(crate) fn write_bytes_at(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        assert!(self.holds(offset, bytes.len()), "the bytes fit into the pinned buffer");
        self.device.backend().write_pinned(self.ptr.offset_bytes(offset), bytes)
    }

    /// Fills `into` with what lies from an offset in bytes on. No work that writes the buffer may be under way, and no
    /// other thread may write it meanwhile.
    pub(crate) fn read_bytes_at(&self, offset: usize, into: &mut [u8]) -> Result<()> {
        assert!(self.holds(offset, into.len()), "the bytes lie in the pinned buffer");
        self.device.backend().read_pinned(self.ptr.offset_bytes(offset), into)
    }

    fn holds(&self, offset: usize, len: usize) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.bytes)
    }

    /// Returns the size in bytes.
    pub fn len_bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn ptr(&self) -> DevicePtr {
        self.ptr
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        let memory = Dropped { ptr: self.ptr, bytes: self.bytes, is_pinned: true };
        watch::free(&self.device, "freeing page-locked memory", memory);
    }
}

/// A range of reserved addresses whose memory comes and goes in chunks (law L9).
#[derive(Debug)]
pub(crate) struct Reservation {
    device: Device,
    base: DevicePtr,
    bytes: usize,
    /// Mapped chunks in order, without gaps: sizes in bytes.
    chunks: Vec<usize>,
}

impl Reservation {
    pub(crate) fn new(device: &Device, bytes: usize) -> Result<Self> {
        let Some(bytes) = bytes.checked_next_multiple_of(device.backend().map_granularity()) else {
            let message = format!("{bytes} bytes are more than there are addresses; lower the bound");
            return Err(Error::Option { option: "RunnerOptions::arena_bytes_max", message });
        };
        let base = device.backend().reserve(bytes)?;
        Ok(Self { device: device.clone(), base, bytes, chunks: Vec::new() })
    }

    pub(crate) fn base(&self) -> DevicePtr {
        self.base
    }

    pub(crate) fn reserved_bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn mapped_bytes(&self) -> usize {
        self.chunks.iter().sum()
    }

    /// Maps at least `bytes` more at the end.
    pub(crate) fn grow(&mut self, bytes: usize) -> Result<()> {
        let mapped = self.mapped_bytes();
        let rounded = bytes.checked_next_multiple_of(self.device.backend().map_granularity());
        let Some(bytes) = rounded.filter(|rounded| *rounded <= self.bytes - mapped) else {
            return Err(Error::ArenaFull {
                requested_bytes: bytes,
                in_use_bytes: mapped,
                limit_bytes: self.bytes,
                hint: "; raise RunnerOptions::arena_bytes_max or lower the largest capture size",
            });
        };
        self.device.backend().map(self.base, mapped, bytes)?;
        self.device.counters().add_memory(bytes);
        self.chunks.push(bytes);
        Ok(())
    }

    /// Gives all memory back; the addresses stay reserved.
    pub(crate) fn unmap_all(&mut self) {
        let mut end = self.mapped_bytes();
        while let Some(bytes) = self.chunks.pop() {
            end -= bytes;
            self.device.backend().unmap(self.base, end, bytes);
            self.device.counters().sub_memory(bytes);
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.unmap_all();
        self.device.backend().unreserve(self.base, self.bytes);
    }
}

/// A queue of device work that runs in order. Named, so that errors can tell which one was meant.
///
/// # Example
/// ```
/// use bcg_runtime::{Device, Stream};
/// let stream = Stream::new(&Device::host(), "copies")?;
/// stream.synchronize()?;
/// assert_eq!(stream.name(), "copies");
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Debug)]
pub struct Stream {
    device: Device,
    handle: StreamHandle,
    name: Arc<str>,
}

impl Stream {
    /// Creates a stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(device: &Device, name: &str) -> Result<Self> {
        let handle = device.backend().create_stream(name)?;
        device.counters().streams.fetch_add(1, Ordering::Relaxed);
        Ok(Self { device: device.clone(), handle, name: name.into() })
    }

    /// Returns the stream's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits until all work of the stream has run.
    ///
    /// # Errors
    /// The first error of that work; [`Error::CaptureForbidden`] (or the driver's) while the stream captures.
    pub fn synchronize(&self) -> Result<()> {
        watch::before_wait(&self.device, "Stream::synchronize")?;
        self.device.backend().synchronize_stream(self.handle)
    }

    pub(crate) fn handle(&self) -> StreamHandle {
        self.handle
    }

    pub(crate) fn stream_ref(&self) -> StreamRef<'_> {
        StreamRef { backend: self.device.backend(), handle: self.handle }
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn shared_name(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.device.backend().destroy_stream(self.handle);
        self.device.counters().streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A live stream and the backend that it belongs to.
#[derive(Clone, Copy)]
pub(crate) struct StreamRef<'a> {
    pub(crate) backend: &'a dyn Backend,
    pub(crate) handle: StreamHandle,
}

/// The stream of a device itself, created at its first use. It holds the backend and not the [`Device`], which holds
/// it, and does not count among the [`LiveObjects`], since nobody can leak it.
pub(super) struct OwnStream {
    backend: Arc<dyn Backend>,
    handle: Mutex<Option<StreamHandle>>,
}

impl OwnStream {
    pub(super) fn new(backend: Arc<dyn Backend>) -> Self {
        Self { backend, handle: Mutex::default() }
    }

    /// Returns the stream, and creates it if there is none yet.
    pub(super) fn get(&self) -> Result<StreamRef<'_>> {
        let mut created = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        let handle = match *created {
            Some(handle) => handle,
            None => *created.insert(self.backend.create_stream("device")?),
        };
        Ok(StreamRef { backend: &*self.backend, handle })
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        if let Some(handle) = *self.handle.get_mut().unwrap_or_else(PoisonError::into_inner) {
            self.backend.destroy_stream(handle);
        }
    }
}

/// A point in a stream's order, for other streams to wait on.
///
/// # Example
/// ```
/// use bcg_runtime::{Device, Event};
/// let event = Event::new(&Device::host())?;
/// event.synchronize()?; // never recorded: nothing to wait for
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Debug)]
pub struct Event {
    device: Device,
    handle: EventHandle,
}

impl Event {
    /// Creates an event that was never recorded.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(device: &Device) -> Result<Self> {
        let handle = device.backend().create_event()?;
        device.counters().events.fetch_add(1, Ordering::Relaxed);
        Ok(Self { device: device.clone(), handle })
    }

    /// Waits until the work before the latest record has run.
    ///
    /// # Errors
    /// The first error of that work.
    pub fn synchronize(&self) -> Result<()> {
        watch::before_wait(&self.device, "Event::synchronize")?;
        self.device.backend().synchronize_event(self.handle)
    }

    /// Makes later work of a stream, maybe of another GPU, wait for the latest record.
    /// A host device cannot wait for another one, so there the calling thread does, at once.
    pub(crate) fn hold_back(&self, stream: &Stream) -> Result<()> {
        if stream.device.kind() == DeviceKind::Host && !stream.device.is(&self.device) {
            return self.device.backend().synchronize_event(self.handle);
        }
        stream.device.backend().wait_event(stream.handle, self.handle)
    }

    /// Puts the event after the work that the stream has now.
    pub(crate) fn record(&self, stream: &Stream) -> Result<()> {
        self.device.backend().record_event(self.handle, stream.handle)
    }

    pub(crate) fn handle(&self) -> EventHandle {
        self.handle
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        self.device.backend().destroy_event(self.handle);
        self.device.counters().events.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A captured graph, before it is instantiated.
#[derive(Debug)]
pub(crate) struct Graph {
    device: Device,
    handle: GraphHandle,
}

impl Graph {
    /// Ends the capture of `stream` and owns what was captured.
    pub(crate) fn end_capture(stream: &Stream) -> Result<Self> {
        let device = stream.device.clone();
        let handle = device.backend().end_capture(stream.handle)?;
        device.counters().graphs.fetch_add(1, Ordering::Relaxed);
        Ok(Self { device, handle })
    }

    /// Makes one graph of several parts, in order; see [`GraphBackend::merge`](super::traits::GraphBackend::merge).
    pub(crate) fn merge(stream: &Stream, parts: &[Part<'_>]) -> Result<Option<(Self, Vec<NodeHandle>)>> {
        let device = stream.device.clone();
        let Some((handle, nodes)) = device.backend().merge(stream.handle, parts)? else { return Ok(None) };
        device.counters().graphs.fetch_add(1, Ordering::Relaxed);
        Ok(Some((Self { device, handle }, nodes)))
    }

    pub(crate) fn handle(&self) -> GraphHandle {
        self.handle
    }

    /// Adds a chain of another device's work; see [`RankBackend::add_chain`](super::traits::RankBackend::add_chain).
    pub(crate) fn add_chain(&self, device: &Device, parts: &[Part<'_>]) -> Result<Option<Vec<NodeHandle>>> {
        device.backend().add_chain(self.handle, parts)
    }

    pub(crate) fn node_counts(&self) -> Result<NodeCounts> {
        self.device.backend().node_counts(self.handle)
    }

    pub(crate) fn instantiate(&self) -> Result<GraphExec> {
        let handle = self.device.backend().instantiate(self.handle)?;
        self.device.counters().execs.fetch_add(1, Ordering::Relaxed);
        Ok(GraphExec { device: self.device.clone(), handle })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.device.backend().destroy_graph(self.handle);
        self.device.counters().graphs.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An executable graph.
#[derive(Debug)]
pub(crate) struct GraphExec {
    device: Device,
    handle: ExecHandle,
}

impl GraphExec {
    /// Makes later launches run the nodes of `graph`; launches that were enqueued keep theirs. Returns `false`, and
    /// changes nothing, if the graph has another structure.
    pub(crate) fn update(&self, graph: &Graph) -> Result<bool> {
        self.device.backend().update_exec(self.handle, graph.handle)
    }

    /// Makes later launches do `op` at `node`, which did work that is alike; launches that were enqueued keep theirs.
    /// Returns `false`, and changes nothing, if the driver refuses this change.
    pub(crate) fn patch(&self, node: NodeHandle, op: &Op) -> Result<bool> {
        self.patch_of(&self.device, node, op)
    }

    /// As [`GraphExec::patch`], for a node with work of `device`.
    pub(crate) fn patch_of(&self, device: &Device, node: NodeHandle, op: &Op) -> Result<bool> {
        device.backend().patch(self.handle, node, op)
    }

    pub(crate) fn launch(&self, stream: &Stream) -> Result<()> {
        self.device.backend().launch_graph(self.handle, stream.handle)
    }
}

impl Drop for GraphExec {
    fn drop(&mut self) {
        self.device.backend().destroy_exec(self.handle);
        self.device.counters().execs.fetch_sub(1, Ordering::Relaxed);
    }
}
